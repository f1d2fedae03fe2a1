"""What cannot be merged is refused before a byte is written, with everything that is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.bases import BaseModel, load_base
from adapters.errors import (
    AdapterRefused,
    BaseInvalid,
    InvalidRequest,
    MergeFailed,
)
from adapters.export import ExportRequest, canonical_copy, export
from adapters.merge import plan_merge
from adapters.merge_plan import BLOCK_BOUND_BYTES, MAX_WORKERS
from tests.adapters.exporting import damage, left_in
from tests.fixtures.adapters import (
    QWEN25_7B,
    AdapterSpec,
    adapter_tensors,
    shape_only_base,
    write_adapter,
    write_safetensors,
)


def cut_shard(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 10)


def drop_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def forget_in_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].pop("model.norm.weight")
    path.write_text(json.dumps(index))


def claim_another_layer(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_hidden_layers": 3}))


DAMAGES = {
    "cut shard": (cut_shard, "bytes where its header needs"),
    "missing shard": (drop_shard, "lacks model-"),
    "tensor not in the index": (forget_in_index, "do not match"),
    "layers missing": (claim_another_layer, "do not match"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_base_is_refused_before_a_byte_is_written(
    base: BaseModel, request_for: Callable[..., ExportRequest], tmp_path: Path, name: str
) -> None:
    change, message = DAMAGES[name]
    folder = damage(base, tmp_path / "damaged", change)
    request = request_for()
    with pytest.raises(BaseInvalid, match=message):
        export(replace(request, base=load_base(folder)))
    assert left_in(request.out.parent) == []


def test_every_tensor_and_field_without_a_place_in_a_merge_is_reported_at_once(base: BaseModel, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", base, AdapterSpec(rank=4))
    tensors = adapter_tensors(base, AdapterSpec(rank=4))
    tensors.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight")
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    tensors[key] = tensors[key][:2]
    tensors["base_model.model.lm_head.weight"] = np.zeros((2, 2), np.float32)
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    with pytest.raises(MergeFailed) as failed:
        plan_merge(folder, base)
    assert {(problem.code, problem.path) for problem in failed.value.problems} == {
        ("tensor_set_invalid", "model.layers.0.mlp.up_proj"),
        ("shape_mismatch", "model.layers.1.mlp.up_proj"),
        ("tensor_set_invalid", "lm_head.weight"),
    }


def test_doubled_spellings_of_one_tensor_are_a_leftover(base: BaseModel, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", base, AdapterSpec(rank=4))
    tensors = adapter_tensors(base, AdapterSpec(rank=4))
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    tensors[key.removeprefix("base_model.model.")] = tensors[key]
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    with pytest.raises(MergeFailed) as failed:
        plan_merge(folder, base)
    assert [problem.path for problem in failed.value.problems] == [key.removeprefix("base_model.model.")]


def test_dora_is_refused_by_name(base: BaseModel, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", base, config={"use_dora": True})
    with pytest.raises(MergeFailed) as failed:
        plan_merge(folder, base)
    assert [problem.path for problem in failed.value.problems] == ["config.use_dora"]


def test_a_folder_that_is_no_adapter_is_refused(base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused):
        canonical_copy(base.folder, base, tmp_path / "canonical")
    with pytest.raises(InvalidRequest):
        plan_merge(tmp_path, base)


def test_a_7b_adapter_is_planned_without_weights(tmp_path: Path) -> None:
    """Qwen2.5-7B: 7,615,616,512 parameters (its model card: 7.61B), 15.23 GB in bfloat16."""
    config: dict[str, Any] = {**QWEN25_7B, "torch_dtype": "bfloat16"}
    base = shape_only_base(tmp_path / "qwen2.5-7b", **config)
    adapter = write_adapter(tmp_path / "adapter", base, rank=16, alpha=32, dtype="BF16")
    plan = plan_merge(adapter, base, allow_shape_only=True)
    assert plan.weight_bytes - len(plan.files[0].header) == 2 * 7_615_616_512
    assert len(plan.updates) == 7 * 28 and plan.as_dict()["scalings"] == [2.0]
    assert BLOCK_BOUND_BYTES == 64 << 20 and plan.memory_bound_bytes < 96 << 20
    assert plan_merge(adapter, base, dtype="float32", allow_shape_only=True).weight_bytes > 30_000_000_000
    with pytest.raises(BaseInvalid, match="holds no safetensors"):
        plan_merge(adapter, base)


def test_the_bound_of_memory_holds_for_the_layout_of_72b(tmp_path: Path) -> None:
    """Qwen2.5-72B: 72,706,203,648 parameters (its model card: 72.7B); one gate_proj is 484 MB in bfloat16."""
    config: dict[str, Any] = {**QWEN25_7B, "torch_dtype": "bfloat16", "hidden_size": 8192, "intermediate_size": 29_568}
    config |= {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    base = shape_only_base(tmp_path / "qwen2.5-72b", **config)
    adapter = write_adapter(tmp_path / "adapter", base, rank=16, layers=[0, 79], dtype="BF16")
    plan = plan_merge(adapter, base, allow_shape_only=True, shard_bytes=4 * 10**9)
    assert sum(file.size_bytes - len(file.header) for file in plan.files) == 2 * 72_706_203_648
    assert len(plan.files) == 38 and max(file.size_bytes for file in plan.files) < 4 * 10**9 + 10**6
    gate = next(
        one for file in plan.files for one in file.tensors if one.source.name.endswith("0.mlp.gate_proj.weight")
    )
    assert gate.size_bytes == 484_442_112
    assert max((end - first) * 8192 for first, end in gate.row_blocks()) <= BLOCK_BOUND_BYTES / 4 / MAX_WORKERS / 4
    assert plan.memory_bound_bytes < 96 << 20
