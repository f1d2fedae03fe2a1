"""The forms of an export beside the plain one: shards of a chosen size, the adapter itself, other weights beneath."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.bases import BaseModel, load_base
from adapters.errors import InvalidRequest
from adapters.export import ExportRequest, check_order, export
from adapters.merge import merge, plan_merge
from tests.adapters.exporting import left_in
from tests.fixtures.adapters import shape_only_base, write_adapter


def test_shards_of_a_chosen_size_hold_the_same_tensors(request_for: Callable[..., ExportRequest]) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    request = request_for()
    whole = load_file(export(request).folder / "model.safetensors")
    out = request.out.parent / "many"
    out.mkdir()
    plan = plan_merge(request.adapter, request.base, shard_bytes=60_000)
    merge(plan, out)
    shards = {path.name: load_file(path) for path in sorted(out.glob("*.safetensors"))}
    assert len(shards) > 3 and list(shards) == [file.name for file in plan.files]
    assert all(file.size_bytes - len(file.header) <= 60_000 or len(file.tensors) == 1 for file in plan.files)
    index = json.loads((out / "model.safetensors.index.json").read_bytes())
    assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
    tensors = {name: tensor for held in shards.values() for name, tensor in held.items()}
    assert tensors.keys() == whole.keys() and all((tensors[name] == whole[name]).all() for name in whole)
    (out / "config.json").write_bytes((request.out / "config.json").read_bytes())
    AutoModelForCausalLM.from_pretrained(out)


def test_an_export_takes_the_size_of_its_shards(request_for: Callable[..., ExportRequest], tmp_path: Path) -> None:
    wide = _wide(request_for().base, tmp_path, hidden_size=256, intermediate_size=2048)
    request = request_for(base=wide, adapter=write_adapter(tmp_path / "of-wide", wide), shard_bytes=1 << 20)
    result = export(request)
    shards = {name: file["size_bytes"] for name, file in result.manifest["files"].items() if name.startswith("model-")}
    assert len(shards) == 9 and max(shards.values()) <= (1 << 20) + 4096
    assert result.parity["verdict"] == "passed"


def test_the_adapter_itself_is_exported_file_for_file(request_for: Callable[..., ExportRequest]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    request = request_for(format="adapter")
    result = export(request)
    assert left_in(result.folder) == [
        *("adapter_config.json", "adapter_model.safetensors", "manifest.json", "parity.html", "parity.json")
    ]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (result.folder / name).read_bytes() == (request.adapter / name).read_bytes()
    assert (result.parity["verdict"], result.parity["level"]) == ("passed", "files")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(request.base.folder), result.folder)


@pytest.mark.parametrize(
    ("order", "named"),
    [
        ({"format": "zip"}, "format"),
        ({"format": "hf", "dtype": "q8_0"}, "dtype"),
        ({"format": "adapter", "dtype": "float32"}, "dtype"),
        ({"format": "adapter", "merge_into": "nf4"}, "merge_into"),
        ({"format": "hf", "merge_into": "int8"}, "merge_into"),
        ({"format": "hf", "shard_bytes": 1000}, "shard_bytes"),
        ({"format": "adapter", "shard_bytes": 1 << 30}, "shard_bytes"),
    ],
    ids=str,
)
def test_an_order_that_cannot_be_right_names_its_field(order: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_order(**order)
    assert refused.value.param == named


def test_a_merge_into_nf4_is_the_sum_of_what_training_computed_with(
    request_for: Callable[..., ExportRequest], base: BaseModel, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    from adapters.nf4 import nf4_weight

    wide = _wide(base, tmp_path, intermediate_size=192)
    request = request_for(base=wide, adapter=write_adapter(tmp_path / "of-wide", wide, rank=4), merge_into="nf4")
    result = export(request)
    assert result.manifest["merged_into"] == "nf4"
    original, merged = (load_file(folder / "model.safetensors") for folder in (request.base.folder, result.folder))
    adapter = load_file(request.adapter / "adapter_model.safetensors")
    updates = {update.module: update for update in plan_merge(request.adapter, request.base).updates}
    for name, weight in original.items():
        module = name.removesuffix(".weight")
        if module not in request.base.shapes:
            assert torch.equal(merged[name], weight)
            continue
        update = updates[module]
        a, b = (adapter[f"base_model.model.{module}.lora_{half}.weight"].float() for half in "AB")
        expected = (nf4_weight(weight).float() + update.scaling * (b @ a)).to(weight.dtype)
        torch.testing.assert_close(merged[name], expected)
        assert not torch.equal(nf4_weight(weight), weight)


def _wide(base: BaseModel, folder: Path, **changes: Any) -> BaseModel:
    """The base with other widths, in bf16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{**base.config, **changes})
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder / "wide")
    return load_base(folder / "wide")


def test_widths_that_nf4_cannot_do_are_refused(tmp_path: Path) -> None:
    base = shape_only_base(tmp_path / "base", hidden_size=96, intermediate_size=160)
    adapter = write_adapter(tmp_path / "adapter", base)
    with pytest.raises(InvalidRequest, match="96, 160 wide"):
        plan_merge(adapter, base, through_nf4=True, allow_shape_only=True)
