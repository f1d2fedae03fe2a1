"""The export as a whole: complete, atomic, and the same bytes again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.bases import BaseModel, load_base
from adapters.errors import (
    BaseMismatch,
    HotshoeError,
    MergeFailed,
    OutputExists,
)
from adapters.export import ExportRequest, canonical_copy, export
from tests.adapters.exporting import MERGED, contents, left_in
from tests.fixtures.adapters import (
    write_adapter,
)
from tests.fixtures.bases import tiny_qwen2, tiny_qwen3

OPEN_BOTH = """
import sys; sys.modules["peft"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] - ids["input_ids"].shape[1]
    print("made" if 1 <= made <= 3 else made)
"""


def test_folders_open_in_transformers_without_peft_and_their_logits_are_those_of_peft(tmp_path: Path) -> None:
    folders = []
    for make, with_logits in ((tiny_qwen2, False), (tiny_qwen3, True)):
        place = tmp_path / make.__name__
        base = load_base(make(place / "base", tokenizer="bytes"))
        adapter = write_adapter(place / "adapter", base, rank=8, use_rslora=True, rank_pattern={"v_proj": 3})
        canonical = canonical_copy(adapter, base, place / "canonical")
        result = export(ExportRequest(canonical, base, place / "out", source="adapter", with_logits=with_logits))
        assert result.parity["verdict"] == "passed" and result.lacking == ()
        folders.append(str(result.folder))
    assert result.parity["level"] == "logits"
    assert result.parity["logits"]["merged_against_rounded_peft"]["top1_agreement"] == 1.0
    done = subprocess.run([sys.executable, "-c", OPEN_BOTH, *folders], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["made", "made"]


def test_a_second_run_and_another_number_of_workers_give_the_same_bytes(
    request_for: Callable[..., ExportRequest], tmp_path: Path
) -> None:
    folders = [tmp_path / "outputs" / name for name in ("one", "two", "three")]
    for folder, workers in zip(folders, (1, 1, 4), strict=True):
        export(request_for(out=folder, workers=workers))
    first, *others = map(contents, folders)
    assert all(other == first for other in others)
    manifest = json.loads(first["manifest.json"])
    assert set(manifest["files"]) == set(first) - {"manifest.json"}


def test_an_output_folder_that_exists_is_left_alone(request_for: Callable[..., ExportRequest]) -> None:
    request = request_for()
    request.out.mkdir(parents=True)
    (request.out / "mine").write_text("mine")
    with pytest.raises(OutputExists):
        export(request)
    assert left_in(request.out.parent) == ["out"] and left_in(request.out) == ["mine"]


def test_a_folder_that_appears_meanwhile_is_left_alone(request_for: Callable[..., ExportRequest]) -> None:
    request = request_for()
    with pytest.raises(OutputExists):
        export(request, lambda message: request.out.mkdir() if message == MERGED else None)
    assert left_in(request.out.parent) == ["out"] and left_in(request.out) == []


def test_what_the_base_lacks_and_what_is_left_out_are_listed(
    base: BaseModel, request_for: Callable[..., ExportRequest], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(base.folder, bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    (bare / "modeling_custom.py").write_text("raise SystemExit")
    result = export(request_for(base=load_base(bare)))
    assert set(result.lacking) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert not (result.folder / "modeling_custom.py").exists()
    assert any("modeling_custom.py" in note for note in result.parity["notes"])


def test_a_version_with_a_template_of_its_own_is_exported_with_it(request_for: Callable[..., ExportRequest]) -> None:
    result = export(request_for(chat_template="{{ messages }}"))
    assert (result.folder / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "chat_template.jinja" in result.manifest["files"] and "chat_template.jinja" not in result.lacking
    assert any("the version's own" in note for note in result.parity["notes"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_chosen_dtype_is_that_of_every_weight_and_of_the_config(
    request_for: Callable[..., ExportRequest], dtype: str
) -> None:
    from safetensors.torch import load_file

    result = export(request_for(dtype=dtype))
    weights = load_file(result.folder / "model.safetensors")
    assert {str(tensor.dtype) for tensor in weights.values()} == {f"torch.{dtype}"}
    config = json.loads((result.folder / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == dtype


def test_an_adapter_for_another_base_is_refused_unless_its_family_is_declared(
    request_for: Callable[..., ExportRequest],
) -> None:
    other = "sha256:" + "0" * 64
    with pytest.raises(BaseMismatch):
        export(request_for(base_digest=other))
    assert export(request_for(base_digest=other, accepted_digests=(other,))).parity["verdict"] == "passed"


def test_an_nf4_adapter_is_noted(request_for: Callable[..., ExportRequest]) -> None:
    result = export(request_for(card={"training": {"method": "qlora"}}))
    assert any("NF4" in note for note in result.parity["notes"])


def test_a_result_that_overflows_names_the_tensor_and_leaves_nothing(
    request_for: Callable[..., ExportRequest], base: BaseModel, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "huge", base, rank=1, fill=(300.0, 300.0), targets=["up_proj"], layers=[1])
    request = request_for(adapter=adapter, dtype="float16")
    with pytest.raises(MergeFailed, match=r"layers\.1\.mlp\.up_proj\.weight is not finite in float16"):
        export(request)
    assert left_in(request.out.parent) == []


def test_nan_in_the_adapter_is_found_by_the_merge_too(
    request_for: Callable[..., ExportRequest], base: BaseModel, tmp_path: Path
) -> None:
    request = request_for(adapter=write_adapter(tmp_path / "nan", base, fill=(float("nan"), 1.0)))
    with pytest.raises(MergeFailed, match="not finite"):
        export(request)
    assert left_in(request.out.parent) == []


def test_errors_of_the_file_system_are_ours(request_for: Callable[..., ExportRequest], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HotshoeError):
        export(request_for(out=tmp_path / "file" / "out"))
