"""Adapters as the trainers of this world save them: every ordinary one is accepted, and what was dropped is listed.

`tests/fixtures/adapter_configs/peft-*.json` were written by those versions of PEFT themselves. The trainers save
through PEFT; what each adds or leaves beside its adapter is below.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from adapters.bases import PROJECTIONS, BaseModel
from adapters.canonical import canonicalise, check
from adapters.inspect import inspect_folder
from adapters.lora_config import read_config
from adapters.publish import PublishContext, publish
from adapters.types import VersionStatus
from tests.fixtures.adapters import CONFIG_FILE, QWEN25_7B, shape_only_base, write_adapter

CONFIGS = Path(__file__).parents[1] / "fixtures" / "adapter_configs"
PEFT_VERSIONS = sorted(path.stem.removeprefix("peft-") for path in CONFIGS.glob("peft-*.json"))
QWEN = "Qwen/Qwen2.5-7B-Instruct"
MODELSCOPE = "/root/.cache/modelscope/hub/models/Qwen/Qwen2___5-7B-Instruct"
QWEN2_CLASS = {"base_model_class": "Qwen2ForCausalLM", "parent_library": "transformers.models.qwen2.modeling_qwen2"}


@dataclass(frozen=True)
class Trainer:
    """How one trainer's adapter_config.json differs from its PEFT's, and the files it leaves beside it."""

    peft: str
    changes: Mapping[str, Any]
    beside: tuple[str, ...] = ()
    is_claim_known: bool = True  # else the upload has to say that its base is the served one


TRAINERS = {
    "unsloth": Trainer(
        "0.14.0",
        {"base_model_name_or_path": "unsloth/qwen2.5-7b-instruct-unsloth-bnb-4bit", "lora_dropout": 0},
        ("README.md", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"),
    ),
    "unsloth with its auto_mapping": Trainer(
        "0.18.1",
        {
            "base_model_name_or_path": "unsloth/Qwen2.5-7B-Instruct-bnb-4bit",
            "auto_mapping": {**QWEN2_CLASS, "unsloth_fixed": True},
            "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)",
            "lora_dropout": 0,
        },
        ("README.md", "chat_template.jinja"),
    ),
    "llama-factory": Trainer(
        "0.15.2",
        {"base_model_name_or_path": "/data/models/Qwen2.5-7B-Instruct", "lora_dropout": 0.0},
        ("README.md", "all_results.json", "trainer_log.jsonl", "training_args.bin", "training_loss.png"),
        is_claim_known=False,
    ),
    "llama-factory with rslora+": Trainer("0.12.0", {"use_rslora": True, "modules_to_save": []}, ("optimizer.pt",)),
    "ms-swift": Trainer(
        "0.18.1",
        {"base_model_name_or_path": MODELSCOPE, "modules_to_save": [], "target_modules": r"^(model.*(q|v)_proj)$"},
        ("README.md", "additional_config.json", "args.json"),
        is_claim_known=False,
    ),
    "ms-swift 2": Trainer("0.10.0", {"lora_dtype": None, "lorap_lr_ratio": None, "lorap_emb_lr": 1e-06}),
    "trl": Trainer("0.19.1", {"auto_mapping": QWEN2_CLASS, "task_type": None}, ("README.md", "training_args.bin")),
    "axolotl": Trainer(
        "0.18.1",
        {"fan_in_fan_out": None, "lora_dropout": None, "target_parameters": [], "loftq_config": {}},
        ("README.md", "config.json", "tokenizer.json"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """Qwen2.5-7B-Instruct's shapes: a folder with just its config.json."""
    folder = tmp_path_factory.mktemp("bases") / "qwen2.5-7b-instruct"
    return dataclasses.replace(shape_only_base(folder, **QWEN25_7B), names=(QWEN, str(folder)))


def config_of(version: str) -> dict[str, Any]:
    config = json.loads((CONFIGS / f"peft-{version}.json").read_text())
    assert isinstance(config, dict)
    return config


def save(folder: Path, base: BaseModel, config: dict[str, Any], targets: tuple[str, ...]) -> Path:
    """The config as it is, with constant weights of its rank for `targets`."""
    write_adapter(
        folder, base, rank=config["r"], alpha=config["lora_alpha"], targets=targets, fill=(0.5, 0.25), dtype="BF16"
    )
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2))
    return folder


@pytest.mark.parametrize("version", PEFT_VERSIONS)
def test_adapters_of_every_peft_since_0_2_are_accepted(tmp_path: Path, tiny: BaseModel, version: str) -> None:
    base = dataclasses.replace(tiny, names=(QWEN,))
    config = config_of(version)
    folder = save(tmp_path / "adapter", base, config, ("q_proj", "v_proj"))
    inspection = inspect_folder(folder)
    verdict = check(inspection, base, max_rank=64)
    assert (verdict.verdict, verdict.reasons) == ("accept", ())
    assert {module.scaling for module in verdict.modules.values()} == {2.0}
    kept = {"peft_type", "r", "lora_alpha", "task_type", "target_modules", "base_model_name_or_path", "use_rslora"}
    listed = {line.partition(":")[0] for line in verdict.dropped}
    assert listed == set(config) - kept  # every field is either used or named as dropped


def test_an_adapter_that_the_installed_peft_saves_is_accepted(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from adapters.bases import load_base
    from tests.fixtures.bases import tiny_qwen2

    base = load_base(tiny_qwen2(tmp_path / "base"))
    model = AutoModelForCausalLM.from_pretrained(base.folder)
    options = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "use_rslora": True}
    patterns = {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}}
    config = peft.LoraConfig(target_modules="all-linear", **options, **patterns)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    verdict = check(inspect_folder(tmp_path / "adapter"), base, max_rank=64)
    assert (verdict.verdict, verdict.reasons) == ("accept", ())
    assert set(verdict.modules) == set(base.shapes)
    assert verdict.modules["model.layers.1.self_attn.q_proj"].rank == 6
    assert verdict.modules["model.layers.1.mlp.up_proj"].alpha == 3


@pytest.mark.parametrize("name", TRAINERS)
def test_a_qwen2_5_7b_adapter_as_its_trainer_writes_it_fits_a_shape_only_base(
    tmp_path: Path, qwen: BaseModel, name: str
) -> None:
    trainer = TRAINERS[name]
    config = {**config_of(trainer.peft), "r": 2, "lora_alpha": 4, **trainer.changes}
    if isinstance(config["target_modules"], list):
        config["target_modules"] = list(PROJECTIONS)
    folder = save(tmp_path / "adapter", qwen, config, PROJECTIONS)
    for file in trainer.beside:
        (folder / file).write_bytes(b"x")
    inspection = inspect_folder(folder)
    verdict = check(inspection, qwen, max_rank=64, base_is_served=not trainer.is_claim_known)
    assert (verdict.verdict, verdict.reasons) == ("accept", ())
    assert (len(verdict.modules), verdict.rank) == (28 * 7, 2)
    assert inspection.left_out == tuple(sorted(trainer.beside))
    if not trainer.is_claim_known:
        refusal = check(inspection, qwen, max_rank=64)
        assert [reason.code for reason in refusal.reasons] == ["base_mismatch"]


def test_a_qwen2_5_7b_adapter_of_unsloth_becomes_canonical_files_of_its_dtype(tmp_path: Path, qwen: BaseModel) -> None:
    trainer = TRAINERS["unsloth"]
    config = {
        **config_of(trainer.peft),
        "r": 1,
        "lora_alpha": 2,
        **trainer.changes,
        "target_modules": list(PROJECTIONS),
    }
    inspection = inspect_folder(save(tmp_path / "adapter", qwen, config, PROJECTIONS))
    made = canonicalise(tmp_path / "adapter", inspection, check(inspection, qwen, max_rank=64), tmp_path / "out")
    again = inspect_folder(made.folder)
    assert {tensor.dtype for tensor in again.tensors} == {"BF16"}
    assert check(again, qwen, max_rank=64).verdict == "accept"
    assert made.size_bytes == pytest.approx(
        2 * sum(s.out_features + s.in_features for s in qwen.shapes.values()), rel=0.02
    )


def test_a_trainers_folder_publishes_as_it_is(tmp_path: Path, context: PublishContext) -> None:
    config = {**config_of("0.18.1"), **TRAINERS["axolotl"].changes, "base_model_name_or_path": context.base.id}
    folder = save(tmp_path / "adapter", context.base, config, ("q_proj", "v_proj"))
    (folder / "README.md").write_text("x")
    version = publish(folder, "router", context=context)
    assert version.status is VersionStatus.QUARANTINED
    assert "file README.md" in version.dropped
    assert "fan_in_fan_out" in version.dropped


@pytest.mark.parametrize(
    ("trainer", "change", "code"),
    [
        ("unsloth", {"modules_to_save": ["lm_head", "embed_tokens"]}, "not_servable"),
        ("llama-factory", {"use_dora": True}, "not_servable"),
        ("ms-swift", {"task_type": "SEQ_CLS"}, "feature_not_supported"),
        ("trl", {"target_parameters": ["mlp.experts.down_proj"]}, "feature_not_supported"),
        ("axolotl", {"init_lora_weights": "totally_new"}, "feature_not_supported"),
    ],
)
def test_the_same_configs_with_one_setting_that_matters_are_not_accepted_silently(
    trainer: str, change: dict[str, Any], code: str
) -> None:
    made = TRAINERS[trainer]
    reading = read_config({**config_of(made.peft), **made.changes, **change})
    assert [problem.code for problem in (*reading.problems, *reading.limits)] == [code]


PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
FOUND = {
    "a wrapped PeftModel's own auto_mapping": {
        "auto_mapping": {"base_model_class": "PeftModel", "parent_library": "peft.peft_model"}
    },
    "a trainer's towers excluded": {
        "exclude_modules": ".*(audio_tower|vision_tower|embed_vision|embed_audio).*",
        "target_modules": "(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)",
    },
    "the wrong task on a causal model": {"task_type": "SEQ_2_SEQ_LM"},
    "an era without patterns": {"enable_lora": None, "merge_weights": False, "fan_in_fan_out": False, "bias": "none"},
    "nothing about the base or its layers": {"base_model_name_or_path": None, "target_modules": None},
    "an empty base": {"base_model_name_or_path": "", "revision": None, "lora_dropout": 0},
    "full paths": {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]},
    "one layer as a number": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "an EVA start with its settings": {
        "init_lora_weights": "eva",
        "eva_config": {"rho": 2.0, "tau": 0.99, "use_label_mask": True, "adjust_scaling_factors": True},
    },
    "companions of switches that are off": {"use_qalora": False, "qalora_group_size": 32, "use_bdlora": None},
    "what a person wrote beside PEFT's fields": {
        "task": "question_answering",
        "domain": "general",
        "metadata": {"built_by": "ci", "rank": "4"},
        "model_type": "qwen2",
        "load_in_4bit": True,
    },
    "enumerations as Python prints them": {"peft_type": "PeftType.LORA", "task_type": "TaskType.CAUSAL_LM"},
    "a task in small letters": {"task_type": "causal_lm"},
    "an empty task": {"task_type": ""},
    "lists of nothing": {"trainable_token_indices": [], "alora_invocation_tokens": [], "target_modules": []},
    "fields of a PEFT to come": {"use_sparkle": False, "sparkle_config": None, "sparkle_targets": [], "notes": {}},
}


@pytest.mark.parametrize("name", FOUND)
def test_what_public_configs_hold_is_accepted_and_listed(tmp_path: Path, tiny: BaseModel, name: str) -> None:
    config = {**PLAIN, **FOUND[name]}
    folder = save(tmp_path / "adapter", tiny, config, ("q_proj", "v_proj"))
    verdict = check(inspect_folder(folder), tiny, max_rank=64)
    assert (verdict.verdict, verdict.reasons) == ("accept", ())
    listed = {line.partition(":")[0].partition(" ")[0] for line in verdict.dropped}
    assert set(config) - {*PLAIN, "base_model_name_or_path", "task_type", "target_modules"} <= listed
