"""The forms of an export beside the plain one: shards of a chosen size, the adapter itself, other weights beneath."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.bases import BaseModel, load_base
from adapters.errors import InvalidRequest, ParityFailed
from adapters.export import ExportRequest, canonical_copy, check_order, export
from adapters.export_forms import plan_form
from adapters.llamacpp import missing
from adapters.merge import merge, plan_merge
from tests.adapters.exporting import MERGED, left_in
from tests.adapters.test_export_by_peft import KINDS, trained
from tests.fixtures.adapters import shape_only_base, write_adapter

needs_llamacpp = pytest.mark.skipif(missing() is not None, reason=missing() or "llama.cpp is here")

LLAMACPP = [
    ("gguf", "f32"),
    pytest.param("gguf-lora", None, marks=pytest.mark.long),
    pytest.param("gguf", "q8_0", marks=pytest.mark.long),
]


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


@pytest.fixture(scope="module")
def of_nf4(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> ExportRequest:
    """An adapter of a QLoRA run, as its card says, of a base that NF4 can do."""
    folder = tmp_path_factory.mktemp("nf4")
    wide = _wide(base, folder, intermediate_size=192)
    adapter = write_adapter(folder / "adapter", wide, rank=4)
    return ExportRequest(adapter, wide, folder / "out", "router@1", card={"training": {"method": "qlora"}})


@pytest.mark.parametrize("merge_into", [pytest.param("original", marks=pytest.mark.long), "nf4"])
def test_both_merges_of_a_qlora_adapter_are_measured_against_training(
    of_nf4: ExportRequest, merge_into: str, tmp_path: Path
) -> None:
    result = export(replace(of_nf4, merge_into=merge_into, out=tmp_path / "out"))
    found = result.parity["logits"]["training_base"]
    original, nf4 = found["probe"]["merged_into_original"], found["probe"]["merged_into_nf4"]
    assert found["closer"] == "merged_into_nf4" and nf4["mean_abs"] < original["mean_abs"] / 2
    assert any("Nearer to training is what NF4 leaves of them" in note for note in result.parity["notes"])
    own = result.parity["logits"]["merged_against_peft"]["mean_abs"]
    assert own == pytest.approx(nf4["mean_abs"]) if merge_into == "nf4" else own < original["mean_abs"]


@needs_llamacpp
def test_progress_is_of_what_is_delivered_and_not_of_a_base_that_lies_beside_it_for_the_proof(
    request_for: Callable[..., ExportRequest],
) -> None:
    request = request_for(format="gguf-lora", with_logits=True)
    form, told = plan_form(request), []
    export(request, told.append)
    (planned,) = (message for message in told if message["stage"] == "planned")
    delivered = next(request.out.glob("*.gguf")).stat().st_size
    assert planned["weight_bytes"] == delivered < form.size_bytes


@needs_llamacpp
@pytest.mark.parametrize(("form", "dtype"), LLAMACPP, ids=str)
def test_what_llama_cpp_runs_is_asked_there_and_its_answers_are_in_the_report(
    request_for: Callable[..., ExportRequest], form: str, dtype: str | None
) -> None:
    request = request_for(format=form, dtype=dtype, with_logits=True)
    result = export(request)
    named = {"gguf": f"router-1-{(dtype or '').upper()}.gguf", "gguf-lora": "router-1-lora-F32.gguf"}[form]
    assert left_in(result.folder) == sorted([named, "manifest.json", "parity.html", "parity.json"])
    assert (result.parity["verdict"], result.parity["level"]) == ("passed", "answers")
    assert result.parity["tokenizer"]["different"] == []
    (answers,) = result.parity["forms"]
    assert answers["against_peft"]["prompts"] == 8
    if dtype != "q8_0":
        assert answers["against_peft"]["identical"] == answers["against_merged"]["identical"] == 8
    page = (result.folder / "parity.html").read_text()
    assert "llama.cpp" in page and "not compared" not in page


@needs_llamacpp
@pytest.mark.long
def test_llama_cpp_answers_from_a_merge_into_nf4_as_the_nf4_base_and_the_adapter_do(
    of_nf4: ExportRequest, base: BaseModel, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (of_nf4.base.folder / name).write_bytes((base.folder / name).read_bytes())
    request = replace(of_nf4, format="gguf", dtype="f32", merge_into="nf4", out=tmp_path / "out")
    (answers,) = export(request).parity["forms"]
    assert answers["against_peft"]["identical"] == 8 and answers["against_peft"]["max_abs"] < 1e-3


@needs_llamacpp
@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own, about the settings it is given here
def test_what_peft_merges_becomes_one_file_too(base: BaseModel, tmp_path: Path) -> None:
    source, _ = trained(base, tmp_path / "source", KINDS["dora"])
    adapter = canonical_copy(source, base, tmp_path / "canonical", base_is_named=True)
    request = ExportRequest(adapter, base, tmp_path / "out", "dora@1", format="gguf", dtype="f32")
    result = export(request)
    assert (result.parity["verdict"], result.parity["merged_by"]) == ("passed", "peft")
    assert result.parity["forms"][0]["against_peft"]["identical"] == 8
    assert left_in(result.folder) == ["dora-1-F32.gguf", "manifest.json", "parity.html", "parity.json"]
    with pytest.raises(InvalidRequest, match="more than low-rank updates"):
        export(replace(request, format="gguf-lora", out=tmp_path / "other"))


def test_a_weight_of_the_file_that_is_not_right_fails_the_export(request_for: Callable[..., ExportRequest]) -> None:
    request = request_for(format="gguf", dtype="q8_0")

    def tampering(message: dict[str, Any]) -> None:
        if message == MERGED:
            (path,) = request.out.parent.glob(".*/*.gguf")
            with path.open("r+b") as file:
                file.seek(path.stat().st_size // 2)
                file.write(b"\x55" * 64)

    with pytest.raises(ParityFailed) as failed:
        export(request, tampering)
    assert all("elements are not what Q8_0 makes of" in problem.message for problem in failed.value.problems)
    assert left_in(request.out.parent) == []
