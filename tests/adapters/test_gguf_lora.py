"""Adapters alone as GGUF files: the scaling of every layer, to the number, and what reading back finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.bases import BaseModel
from adapters.errors import InvalidRequest, MergeFailed
from adapters.gguf_lora import GgufLoraPlan, plan_gguf_lora, verify_gguf_lora, write_gguf_lora
from tests.fixtures.adapters import write_adapter

PATTERNS = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"model.layers.1.mlp.up_proj": 3.0}}
LORA: dict[str, dict[str, Any]] = {
    "plain": {"rank": 4, "alpha": 8},
    "rslora": {"rank": 8, "alpha": 16, "use_rslora": True},
    "patterns": {"rank": 4, "alpha": 8, **PATTERNS},
    "patterns_rslora_bf16": {"rank": 8, "alpha": 8, "use_rslora": True, "dtype": "BF16", **PATTERNS},
    "no_scaling_at_all": {"rank": 4, "alpha": 0},
}


def written(adapter: Path, base: BaseModel, path: Path, dtype: str = "float32") -> GgufLoraPlan:
    plan = plan_gguf_lora(adapter, base, dtype=dtype, name="router 1")
    write_gguf_lora(plan, path)
    return plan


def opened(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def scaling(lora: dict[str, Any], module: str) -> float:
    rank = lora.get("rank_pattern", {}).get(module.rpartition(".")[2], lora["rank"])
    alpha = lora.get("alpha_pattern", {}).get(module, lora["alpha"])
    return float(alpha / (rank**0.5 if lora.get("use_rslora") else rank))


NAMES = {"q_proj": "attn_q", "v_proj": "attn_v", "o_proj": "attn_output", "up_proj": "ffn_up", "down_proj": "ffn_down"}


@pytest.mark.parametrize("name", LORA)
def test_every_layer_has_its_own_scaling_whatever_the_one_alpha(base: BaseModel, tmp_path: Path, name: str) -> None:
    lora = LORA[name]
    plan = written(write_adapter(tmp_path / "a", base, fill=(0.5, 0.25), **lora), base, tmp_path / "f.gguf")
    metadata, tensors = opened(tmp_path / "f.gguf")
    said = {"general.type": "adapter", "general.architecture": "qwen2", "adapter.type": "lora"}
    assert said.items() <= metadata.items() and metadata["adapter.lora.alpha"] != 0 and len(tensors) == 28
    for module in base.shapes:
        layer, projection = module.split(".")[2], module.rpartition(".")[2]
        if projection not in NAMES:
            continue
        a, b = (tensors[f"blk.{layer}.{NAMES[projection]}.weight.lora_{half}"] for half in "ab")
        assert b.shape[1] == a.shape[0] and np.all(a == 0.5)
        update = metadata["adapter.lora.alpha"] / b.shape[1] * b.astype(np.float64) @ a.astype(np.float64)
        wanted = scaling(lora, module) * a.shape[0] * 0.125
        assert np.allclose(update, wanted, rtol=2.0**-22, atol=0), module
    assert verify_gguf_lora(plan, tmp_path / "f.gguf").problems == []


def test_only_layers_that_one_alpha_does_not_fit_are_scaled_and_they_are_listed(
    base: BaseModel, tmp_path: Path
) -> None:
    plan = plan_gguf_lora(write_adapter(tmp_path / "a", base, rank=4, alpha=8, **PATTERNS), base)
    # v_proj has alpha 8 and rank 2, and needs no scaling: llama.cpp divides by that rank itself.
    assert plan.alpha == 8 and plan.folded == ("model.layers.1.mlp.up_proj",)
    assert plan.as_dict()["scaled_into_b"] == list(plan.folded) and plan.as_dict()["notes"]
    rslora = plan_gguf_lora(write_adapter(tmp_path / "r", base, rank=8, alpha=16, use_rslora=True), base)
    assert rslora.folded == () and rslora.alpha == pytest.approx(16 * 8**0.5)


def test_float16_is_the_nearest_and_what_it_cannot_hold_is_refused(base: BaseModel, tmp_path: Path) -> None:
    plan = written(write_adapter(tmp_path / "a", base, **PATTERNS), base, tmp_path / "f.gguf", "float16")
    report = verify_gguf_lora(plan, tmp_path / "f.gguf")
    assert report.problems == [] and report.as_dict()["equal_to_rounded_exact"] > 0.999
    with pytest.raises(MergeFailed, match="does not fit F16"):
        written(write_adapter(tmp_path / "b", base, fill=(1.0, 1e6)), base, tmp_path / "g.gguf", "float16")


def test_a_wrong_alpha_or_b_is_found(base: BaseModel, tmp_path: Path) -> None:
    plan = written(write_adapter(tmp_path / "a", base), base, tmp_path / "f.gguf")
    content = bytearray((tmp_path / "f.gguf").read_bytes())
    at = content.index(b"adapter.lora.alpha") + len("adapter.lora.alpha") + 4
    for place in (at + 3, plan.file.tensors[1].begin + 3):
        wrong = bytearray(content)
        wrong[place] ^= 1
        (tmp_path / "wrong.gguf").write_bytes(wrong)
        assert verify_gguf_lora(plan, tmp_path / "wrong.gguf").problems
    # The alpha of the plan is no witness for itself: one that is wrong there too is found by the layers' own scaling.
    from dataclasses import replace

    metadata = {**plan.file.metadata, "adapter.lora.alpha": ("FLOAT32", 16.0)}
    mistaken = replace(plan, file=replace(plan.file, metadata=metadata))
    wrong = bytearray(content)
    wrong[at : at + 4] = np.float32(16).tobytes()
    (tmp_path / "wrong.gguf").write_bytes(wrong)
    problems = verify_gguf_lora(mistaken, tmp_path / "wrong.gguf").problems
    assert len(problems) == 14 and "are not scaling * B" in problems[0]


def test_what_is_more_than_low_rank_updates_is_refused(base: BaseModel, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", base, config={"use_dora": True})
    with pytest.raises(MergeFailed) as raised:
        plan_gguf_lora(adapter, base)
    assert [problem.path for problem in raised.value.problems] == ["config.use_dora"]
    with pytest.raises(InvalidRequest, match="'q8_0' is not one of f32, f16"):
        plan_gguf_lora(adapter, base, dtype="q8_0")
