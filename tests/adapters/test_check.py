"""An adapter against a base: claims, shapes, sets of tensors, spellings, and what the verdict says about each."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.bases import BaseModel
from adapters.canonical import Verdict, canonicalise, check
from adapters.claims import claim_means
from adapters.inspect import inspect_folder
from tests.fixtures.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterSpec,
    adapter_tensors,
    shape_only_base,
    write_adapter,
    write_safetensors,
)

Tensors = dict[str, np.ndarray]
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def verdict_of(folder: Path, base: BaseModel, **options: Any) -> Verdict:
    return check(inspect_folder(folder), base, **{"max_rank": 64, **options})


def refusals(verdict: Verdict) -> set[tuple[str, str]]:
    assert verdict.verdict == "refuse"
    return {(reason.code, reason.path) for reason in verdict.reasons}


def with_tensors(folder: Path, base: BaseModel, change: Callable[[Tensors], Tensors], **spec: Any) -> Path:
    write_adapter(folder, base, **spec)
    write_safetensors(folder / WEIGHTS_FILE, change(adapter_tensors(base, AdapterSpec(**spec))))
    return folder


def renamed(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): array for name, array in tensors.items()}


def test_an_ordinary_adapter_is_accepted_with_rank_and_scaling_of_every_layer(tmp_path: Path, tiny: BaseModel) -> None:
    verdict = verdict_of(write_adapter(tmp_path, tiny, rank=4, alpha=8), tiny)
    assert verdict.verdict == "accept"
    assert verdict.reasons == ()
    assert set(verdict.modules) == set(tiny.shapes)
    assert {(module.rank, module.alpha, module.scaling) for module in verdict.modules.values()} == {(4, 8, 2.0)}


def test_rslora_scales_by_the_root_of_each_layers_rank(tmp_path: Path, tiny: BaseModel) -> None:
    folder = write_adapter(tmp_path, tiny, rank=4, alpha=8, use_rslora=True, rank_pattern={"layers.1.mlp.up_proj": 9})
    modules = verdict_of(folder, tiny).modules
    assert modules["model.layers.0.mlp.up_proj"].scaling == 4.0
    assert modules["model.layers.1.mlp.up_proj"].scaling == pytest.approx(8 / 3)


def test_the_first_matching_pattern_key_wins_as_in_peft(tmp_path: Path, tiny: BaseModel) -> None:
    alphas = {"q_proj": 3, "model.layers.1.self_attn.q_proj": 5, "self_attn.k_proj": 7, "k_proj": 9, "_proj": 11}
    modules = verdict_of(write_adapter(tmp_path, tiny, alpha_pattern=alphas), tiny).modules
    assert modules["model.layers.1.self_attn.q_proj"].alpha == 3
    assert modules["model.layers.0.self_attn.k_proj"].alpha == 7
    assert modules["model.layers.0.self_attn.v_proj"].alpha == 8  # `_proj` begins inside a name: no match


@pytest.mark.parametrize(
    "claim", ["/somewhere/else/model", "https://example.com/model", "meta-llama/Llama-3-8B", "../../etc"]
)
def test_u6_a_claim_of_another_base_is_refused_unless_the_upload_says_it_is_this_one(
    tmp_path: Path, tiny: BaseModel, claim: str
) -> None:
    folder = write_adapter(tmp_path, tiny, config={"base_model_name_or_path": claim})
    verdict = verdict_of(folder, tiny)
    assert refusals(verdict) == {("base_mismatch", "config.base_model_name_or_path")}
    assert "--base-is served" in verdict.reasons[0].advice
    assert verdict_of(folder, tiny, base_is_served=True).verdict == "accept"


def test_u6_the_bases_own_path_digest_id_and_declared_names_are_it(tmp_path: Path, tiny: BaseModel) -> None:
    declared = dataclasses.replace(tiny, names=(*tiny.names, "Acme/Tiny-Chat"))
    for claim in (str(tiny.folder), f"{tiny.folder}/", tiny.digest, tiny.id, "Acme/Tiny-Chat", "acme/tiny-chat"):
        folder = write_adapter(tmp_path, tiny, config={"base_model_name_or_path": claim})
        assert verdict_of(folder, declared).verdict == "accept", claim
    for claim in (None, ""):
        folder = write_adapter(tmp_path, tiny, config={"base_model_name_or_path": claim})
        assert verdict_of(folder, tiny).verdict == "accept"


@pytest.mark.parametrize(
    ("claim", "is_it"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", True),
        ("unsloth/Qwen2.5-7B-Instruct", True),
        ("unsloth/Qwen2.5-7B-Instruct-bnb-4bit", True),
        ("unsloth/qwen2.5-7b-instruct-unsloth-bnb-4bit", True),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", True),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", True),
        ("Qwen/Qwen2.5-7B", False),
        ("Qwen/Qwen2.5-14B-Instruct", False),
        ("Qwen/Qwen2.5-Coder-7B-Instruct", False),
        ("somebody/Qwen2.5-7B-Instruct", False),
        ("/models/Qwen2.5-7B-Instruct", False),
        ("https://huggingface.co/Qwen/Qwen2.5-7B-Instruct", False),
    ],
)
def test_u6_quantised_copies_by_known_publishers_map_to_their_base(tiny: BaseModel, claim: str, is_it: bool) -> None:
    base = dataclasses.replace(tiny, id="qwen2.5-7b-instruct", names=("Qwen/Qwen2.5-7B-Instruct", "/data/q7"))
    assert claim_means(claim, base) is is_it


def test_u20_an_adapter_of_a_larger_base_is_refused_layer_by_layer(tmp_path: Path, tiny: BaseModel) -> None:
    larger = shape_only_base(tmp_path / "larger", hidden_size=32)
    folder = write_adapter(tmp_path / "adapter", larger, config={"base_model_name_or_path": None})
    verdict = verdict_of(folder, tiny)
    assert refusals(verdict) == {("shape_mismatch", name) for name in tiny.shapes}
    assert "another size" in verdict.reasons[0].message


def test_u20_swapped_halves_and_a_rank_that_is_not_the_configs_are_told_apart(tmp_path: Path, tiny: BaseModel) -> None:
    def swap(tensors: Tensors) -> Tensors:
        a, b = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
        return {**tensors, a: tensors[b], b: tensors[a]}

    verdict = verdict_of(with_tensors(tmp_path / "swapped", tiny, swap), tiny)
    assert refusals(verdict) == {("shape_mismatch", "model.layers.0.self_attn.q_proj")}
    assert "swapped" in verdict.reasons[0].message
    verdict = verdict_of(write_adapter(tmp_path / "rank", tiny, rank=4, config={"r": 8}), tiny)
    assert len(verdict.reasons) == len(tiny.shapes)
    assert "the file has rank 4, the config says 8" in verdict.reasons[0].message


@pytest.mark.parametrize(
    ("change", "code", "path"),
    [
        (lambda t: {k: v for k, v in t.items() if k != f"{Q0}.lora_B.weight"}, "tensor_set_invalid",
         "model.layers.0.self_attn.q_proj"),
        (renamed(lambda k: k.replace("layers.1.", "layers.99.")), "tensor_set_invalid",
         "base_model.model.model.layers.99.mlp.down_proj.lora_A.weight"),
        (renamed(lambda k: k.replace("q_proj", "qkv_proj")), "tensor_set_invalid",
         "base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight"),
        (renamed(lambda k: k.replace("base_model.model.model.", "base_model.model.language_model.model.")),
         "tensor_set_invalid", "base_model.model.language_model.model.layers.0.mlp.up_proj.lora_B.weight"),
        (renamed(lambda k: k.replace("layers.0", "layers.00")), "tensor_set_invalid",
         "base_model.model.model.layers.00.mlp.down_proj.lora_A.weight"),
    ],
    ids=["half missing", "layer 99", "unknown module", "wrong prefix", "leading zero"],
)  # fmt: skip
def test_u21_tensors_that_do_not_fit_the_base_are_named(
    tmp_path: Path, tiny: BaseModel, change: Callable[[Tensors], Tensors], code: str, path: str
) -> None:
    assert (code, path) in refusals(verdict_of(with_tensors(tmp_path, tiny, change), tiny))


@pytest.mark.parametrize(
    "spell",
    [
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.replace(".weight", ".my-adapter.weight"),
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.removeprefix("base_model.model.model."),
        lambda key: key.replace("base_model.model.model.", "base_model.model."),
        lambda key: f"module.{key}",
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: key.replace("base_model.model.", "base_model.model.base_model.model."),
    ],
    ids=["default", "named", "no prefix", "layers only", "inner model", "DDP", "compiled", "twice"],
)
def test_u21_other_spellings_are_converted_to_the_same_files(
    tmp_path: Path, tiny: BaseModel, spell: Callable[[str], str]
) -> None:
    plain = write_adapter(tmp_path / "plain", tiny)
    folder = with_tensors(tmp_path / "spelled", tiny, renamed(spell))
    verdict = verdict_of(folder, tiny)
    assert verdict.verdict == "convert"
    assert [reason.code for reason in verdict.reasons] == ["converted"]
    made = [
        canonicalise(source, inspect_folder(source), verdict_of(source, tiny), tmp_path / f"out{i}")
        for i, source in enumerate((plain, folder))
    ]
    assert made[0].digest == made[1].digest


def test_u21_two_spellings_of_one_tensor_or_two_adapters_in_one_file_are_refused(
    tmp_path: Path, tiny: BaseModel
) -> None:
    twice = with_tensors(
        tmp_path / "twice", tiny, lambda t: {**t, **renamed(lambda k: k[len("base_model.model.") :])(t)}
    )
    assert "means the same tensor as" in verdict_of(twice, tiny).reasons[0].message
    two = with_tensors(
        tmp_path / "two", tiny, renamed(lambda k: k.replace(".weight", f".{'a' if '.0.' in k else 'b'}.weight"))
    )
    assert ("tensor_set_invalid", "tensors") in refusals(verdict_of(two, tiny))


@pytest.mark.parametrize(
    "extra",
    [
        {"base_model.model.lm_head.lora_A.weight": (4, 16), "base_model.model.lm_head.lora_B.weight": (64, 4)},
        {"base_model.model.model.embed_tokens.weight": (64, 16)},
        {"base_model.model.model.embed_tokens.lora_embedding_A": (4, 64)},
        {"base_model.model.lm_head.modules_to_save.weight": (64, 16)},
        {f"{Q0}.lora_magnitude_vector": (16,)},
        {f"{Q0}.lora_B.bias": (16,)},
        {f"{Q0}.bias": (16,)},
    ],
    ids=lambda extra: next(iter(extra)).removeprefix("base_model.model."),
)
def test_u4b_tensors_beyond_the_projections_make_an_export_only_version(
    tmp_path: Path, tiny: BaseModel, extra: dict[str, tuple[int, ...]]
) -> None:
    more = {name: np.ones(shape, np.float32) for name, shape in extra.items()}
    verdict = verdict_of(with_tensors(tmp_path, tiny, lambda tensors: {**tensors, **more}), tiny)
    assert verdict.verdict == "export_only"
    assert [reason.code for reason in verdict.reasons] == ["not_servable"]
    assert "to serve it" in verdict.reasons[0].advice


def test_a_rank_above_the_served_one_is_export_only_and_names_the_setting(tmp_path: Path, tiny: BaseModel) -> None:
    folder = write_adapter(tmp_path, tiny, rank=16)
    verdict = verdict_of(folder, tiny, max_rank=8)
    assert verdict.verdict == "export_only"
    assert "--max-rank" in verdict.reasons[0].advice
    assert verdict_of(folder, tiny, max_rank=16).verdict == "accept"


def test_u5_an_init_that_changed_the_base_needs_the_initial_adapter(tmp_path: Path, tiny: BaseModel) -> None:
    for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq"):
        folder = write_adapter(tmp_path / init, tiny, config={"init_lora_weights": init})
        verdict = verdict_of(folder, tiny)
        assert refusals(verdict) == {("feature_not_supported", "config.init_lora_weights")}
        assert "initial_adapter" in verdict.reasons[0].advice


@pytest.mark.parametrize("use_rslora", [False, True])
def test_u5_with_the_initial_adapter_the_difference_becomes_a_plain_adapter(
    tmp_path: Path, tiny: BaseModel, use_rslora: bool
) -> None:
    folder = write_adapter(tmp_path, tiny, seed=1, use_rslora=use_rslora, config={"init_lora_weights": "pissa"})
    before, after = (adapter_tensors(tiny, AdapterSpec(seed=seed)) for seed in (2, 1))
    write_safetensors(folder / "initial_adapter.safetensors", before)
    verdict = verdict_of(folder, tiny)
    assert verdict.verdict == "convert"
    made = canonicalise(folder, inspect_folder(folder), verdict, tmp_path / "out")
    assert made.rank == 8
    from safetensors.numpy import load_file

    tensors = load_file(made.folder / WEIGHTS_FILE)
    scaling = 8 / math.sqrt(4) if use_rslora else 2
    for name, module in made.modules.items():
        a, b = (f"base_model.model.{name}.lora_{side}.weight" for side in "AB")
        expected = scaling * (after[b] @ after[a] - before[b] @ before[a])
        assert np.allclose(module.scaling * (tensors[b] @ tensors[a]), expected, atol=1e-6)
    again = verdict_of(made.folder, tiny)
    assert (again.verdict, again.modules) == ("accept", dict(made.modules))


def test_u5_an_initial_adapter_of_another_dtype_loses_nothing(tmp_path: Path, tiny: BaseModel) -> None:
    folder = write_adapter(tmp_path, tiny, dtype="BF16", fill=(0.5, 0.25), config={"init_lora_weights": "olora"})
    before = {key: array + np.float32(1e-4) for key, array in adapter_tensors(tiny, AdapterSpec()).items()}
    write_safetensors(folder / "initial_adapter.safetensors", before)
    made = canonicalise(folder, inspect_folder(folder), verdict_of(folder, tiny), tmp_path / "out")
    from safetensors.numpy import load_file

    tensors = load_file(made.folder / WEIGHTS_FILE)
    assert np.array_equal(tensors[f"{Q0}.lora_A.weight"][4:], before[f"{Q0}.lora_A.weight"])
    assert np.array_equal(tensors[f"{Q0}.lora_B.weight"][:, 4:], -before[f"{Q0}.lora_B.weight"])


def test_patterns_and_targets_that_meet_no_tensor_are_listed(tmp_path: Path, tiny: BaseModel) -> None:
    folder = write_adapter(
        tmp_path,
        tiny,
        targets=("q_proj",),
        alpha_pattern={"lm_head": 4},
        config={"target_modules": ["q_proj", "visual.proj"]},
    )
    verdict = verdict_of(folder, tiny)
    assert verdict.verdict == "accept"
    assert "alpha_pattern.lm_head: no tensor of that module is in the file" in verdict.dropped
    assert "target_modules visual.proj: no tensor of that module is in the file" in verdict.dropped


def test_an_adapter_of_nothing_is_refused(tmp_path: Path, tiny: BaseModel) -> None:
    folder = write_adapter(tmp_path, tiny, targets=())
    assert refusals(verdict_of(folder, tiny)) == {("tensor_set_invalid", WEIGHTS_FILE)}


def test_a_missing_file_and_a_pickle_in_its_place_are_told_apart(tmp_path: Path, tiny: BaseModel) -> None:
    folder = write_adapter(tmp_path, tiny)
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    assert refusals(verdict_of(folder, tiny)) == {("format_not_allowed", "adapter_model.bin")}
    (folder / "adapter_model.bin").unlink()
    (folder / CONFIG_FILE).unlink()
    assert refusals(verdict_of(folder, tiny)) == {("file_missing", WEIGHTS_FILE), ("file_missing", CONFIG_FILE)}


def test_files_beside_the_adapter_are_listed_and_left_alone(tmp_path: Path, tiny: BaseModel) -> None:
    folder = write_adapter(tmp_path, tiny)
    for name in ("README.md", "tokenizer.json", "chat_template.jinja", "evil.py"):
        (folder / name).write_text("x")
    inspection = inspect_folder(folder)
    assert inspection.left_out == ("README.md", "chat_template.jinja", "evil.py", "tokenizer.json")
    assert json.dumps(inspection.as_dict())
    assert json.dumps(check(inspection, tiny, max_rank=64).as_dict())


def test_all_problems_of_config_tensors_and_claim_come_in_one_answer(tmp_path: Path, tiny: BaseModel) -> None:
    folder = with_tensors(
        tmp_path,
        tiny,
        lambda tensors: {key.replace("layers.1.mlp", "layers.9.mlp"): array for key, array in tensors.items()},
        targets=("q_proj", "up_proj"),
    )
    config = json.loads((folder / CONFIG_FILE).read_text())
    other = shape_only_base(tmp_path / "other", hidden_size=32)
    config |= {"r": "8", "use_rslora": "yes", "base_model_name_or_path": "Somebody/Else", "surprise": 1}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    found = refusals(verdict_of(folder, other))
    assert {("type_error", "config.r"), ("type_error", "config.use_rslora"), ("field_unknown", "config.surprise"),
            ("base_mismatch", "config.base_model_name_or_path"),
            ("shape_mismatch", "model.layers.0.self_attn.q_proj"),
            ("tensor_set_invalid", "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight")} <= found  # fmt: skip
    assert len(found) == 4 + 3 + 2


def test_a_bad_header_does_not_hide_what_the_config_says_and_makes_no_halves_up(
    tmp_path: Path, tiny: BaseModel
) -> None:
    folder = write_adapter(tmp_path, tiny, config={"base_model_name_or_path": "Somebody/Else"})
    tensors = adapter_tensors(tiny, AdapterSpec())
    write_safetensors(folder / WEIGHTS_FILE, tensors, "F64")
    codes = {code for code, _ in refusals(verdict_of(folder, tiny))}
    assert codes == {"dtype_not_allowed", "base_mismatch"}


def test_u6_a_windows_path_that_the_operator_declared_is_the_base(tmp_path: Path, tiny: BaseModel) -> None:
    base = dataclasses.replace(tiny, names=(r"D:\Models\Tiny-Qwen",))
    for claim, is_it in ((r"d:\models\tiny-qwen", True), ("D:/Models/Tiny-Qwen/", True), (r"D:\Models\Other", False)):
        assert claim_means(claim, base) is is_it
