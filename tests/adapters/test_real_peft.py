"""Adapters that the installed PEFT makes itself: ordinary ones are accepted, what is converted computes the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.bases import BaseModel, load_base
from adapters.canonical import CanonicalAdapter, Verdict, canonicalise, check
from adapters.inspect import INITIAL_ADAPTER_FILE, WEIGHTS_FILE, inspect_folder
from tests.fixtures.bases import tiny_qwen2

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # PEFT's, about odd settings

LORA = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
REGEX = r"(?:.*?(?:language|text|visual).*?mlp.*?|(?:model\.)?layers\.\d+\.(?:self_attn|mlp)\.(?:q_proj|down_proj))"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base(tiny_qwen2(tmp_path_factory.mktemp("peft") / "base", tie_word_embeddings=False))


def load(base: BaseModel, kind: str = "AutoModelForCausalLM") -> Any:
    import transformers

    return getattr(transformers, kind).from_pretrained(base.folder, dtype=torch.float32).eval()


def trained(model: Any, config: Any) -> Any:
    """The model with a trained adapter: every trainable number has moved."""
    made = peft.get_peft_model(model, config).eval()
    move(made)
    return made


def move(model: Any) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.arange(1, 33).reshape(2, 16)).logits


def read(folder: Path, base: BaseModel) -> Verdict:
    return check(inspect_folder(folder), base, max_rank=64)


def written(folder: Path, base: BaseModel, out: Path) -> CanonicalAdapter:
    inspection = inspect_folder(folder)
    return canonicalise(folder, inspection, check(inspection, base, max_rank=64), out)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_dropout": 0.2},
        {"target_modules": "all-linear", "exclude_modules": ["lm_head", "up_proj"]},
        {"target_modules": REGEX},
        {"target_modules": ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"]},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, r"layers\.1\.mlp\.down_proj": 6}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False},
        {"fan_in_fan_out": True},
        {"r": 1},
        {"task_type": None},
        {"task_type": "SEQ_2_SEQ_LM"},
    ],
    ids=lambda options: ", ".join(f"{key}={str(value)[:24]}" for key, value in options.items()) or "plain",
)
def test_what_peft_saves_with_ordinary_settings_is_accepted_and_computes_the_same(
    tmp_path: Path, base: BaseModel, options: dict[str, Any]
) -> None:
    model = peft.get_peft_model(load(base), peft.LoraConfig(**{**LORA, **options})).eval()
    move(model)
    model.save_pretrained(tmp_path / "source")
    verdict = read(tmp_path / "source", base)
    assert (verdict.verdict, verdict.reasons) == ("accept", ())
    made = written(tmp_path / "source", base, tmp_path / "out")
    if options.get("task_type", "") != "SEQ_2_SEQ_LM":
        again = peft.PeftModel.from_pretrained(load(base), made.folder).eval()
        assert torch.allclose(logits(again), logits(model), atol=1e-5)


def test_u21_an_adapter_of_a_backbone_only_class_is_converted(tmp_path: Path, base: BaseModel) -> None:
    config = peft.LoraConfig(**{**LORA, "task_type": "FEATURE_EXTRACTION"})
    model = trained(load(base, "AutoModel"), config)
    model.save_pretrained(tmp_path / "source")
    verdict = read(tmp_path / "source", base)
    assert [reason.code for reason in verdict.reasons] == ["converted"]
    assert set(verdict.modules) == {name for name in base.shapes if name.endswith(("q_proj", "v_proj", "down_proj"))}
    made = written(tmp_path / "source", base, tmp_path / "out")
    again = peft.PeftModel.from_pretrained(load(base), made.folder).eval()
    tokens = torch.arange(1, 33).reshape(2, 16)
    with torch.no_grad():
        expected = model(tokens).last_hidden_state
        assert torch.allclose(again.get_base_model().model(tokens).last_hidden_state, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("wrap", "verdict"),
    [(lambda model: torch.compile(model), "convert"), (lambda model: model.to(torch.bfloat16), "accept")],
    ids=["torch.compile", "bfloat16"],
)
def test_a_model_that_was_compiled_or_cast_before_peft_saved_it_is_taken(
    tmp_path: Path, base: BaseModel, wrap: Callable[[Any], Any], verdict: str
) -> None:
    model = trained(wrap(load(base)), peft.LoraConfig(**LORA))
    model.save_pretrained(tmp_path / "source")
    assert read(tmp_path / "source", base).verdict == verdict


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4", "use_rslora": True},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "olora", "rank_pattern": {"down_proj": 6}, "alpha_pattern": {"q_proj": 3}},
        {"init_lora_weights": "corda"},
    ],
    ids=["pissa", "fast pissa, rslora", "olora", "olora, patterns", "corda"],
)
def test_u5_what_is_converted_with_the_initial_adapter_is_what_peft_converts(
    tmp_path: Path, base: BaseModel, options: dict[str, Any]
) -> None:
    plain = load(base)
    config = peft.LoraConfig(**{**LORA, **options})
    if options["init_lora_weights"] == "corda":
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        config.corda_config = CordaConfig(corda_method="kpm")
        preprocess_corda(plain, config, run_model=lambda: plain(torch.arange(1, 17).reshape(1, 16)))
    model = peft.get_peft_model(plain, config).eval()
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide says, so that loading it changes nothing
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = options["init_lora_weights"]
    move(model)
    model.save_pretrained(tmp_path / "source")
    assert read(tmp_path / "source", base).reasons[0].path == "config.init_lora_weights"

    shutil.copy(tmp_path / "initial" / WEIGHTS_FILE, tmp_path / "source" / INITIAL_ADAPTER_FILE)
    assert read(tmp_path / "source", base).verdict == "convert"
    ours = written(tmp_path / "source", base, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(load(base), ours.folder).eval()
    assert torch.allclose(logits(again), logits(model), atol=1e-4)
    assert (logits(again) - logits(load(base))).abs().max() > 1e-2

    if not {"rank_pattern", "alpha_pattern", "use_rslora"} & set(options):
        model.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
        assert written(tmp_path / "theirs", base, tmp_path / "canonical").digest == ours.digest


@pytest.mark.parametrize(
    "make",
    [
        lambda: peft.AdaLoraConfig(
            task_type="CAUSAL_LM", init_r=4, target_r=2, total_step=10, target_modules=["q_proj"]
        ),
        lambda: peft.IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]),
        lambda: peft.LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
        lambda: peft.VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        lambda: peft.LoraConfig(**LORA, alora_invocation_tokens=[1, 2]),
    ],
    ids=["adalora", "ia3", "loha", "vera", "prompt tuning", "alora"],
)
def test_u4_what_is_not_lora_is_refused_by_name(tmp_path: Path, base: BaseModel, make: Callable[[], Any]) -> None:
    peft.get_peft_model(load(base), make()).save_pretrained(tmp_path)
    reasons = read(tmp_path, base).reasons
    assert {reason.code for reason in reasons} == {"feature_not_supported"}


def test_u4_a_classifiers_head_is_refused(tmp_path: Path, base: BaseModel) -> None:
    config = peft.LoraConfig(**{**LORA, "task_type": "SEQ_CLS"})
    model = trained(load(base, "AutoModelForSequenceClassification"), config)
    model.save_pretrained(tmp_path)
    found = {(reason.code, reason.path) for reason in read(tmp_path, base).reasons}
    assert ("feature_not_supported", "config.task_type") in found
    assert any("score" in path for _, path in found)
