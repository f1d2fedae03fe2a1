"""The export as a whole: complete, atomic, the same bytes again, and nothing left behind when it fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
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
    BaseMismatch,
    HotshoeError,
    InvalidRequest,
    MergeFailed,
    OutputExists,
    ParityFailed,
)
from adapters.export import ExportRequest, canonical_copy, export
from adapters.merge import plan_merge
from adapters.merge_plan import BLOCK_BOUND_BYTES
from adapters.parity import compare_logits
from adapters.parity_logits import probe
from adapters.parity_report import logits_problems
from adapters.parity_served import read_answer
from adapters.staging import SUFFIX, sweep_partial
from tests.fixtures.adapters import (
    QWEN25_7B,
    AdapterSpec,
    adapter_tensors,
    shape_only_base,
    write_adapter,
    write_safetensors,
)
from tests.fixtures.bases import tiny_qwen2, tiny_qwen3

MERGED = {"stage": "merging", "percent": 100}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base(tiny_qwen2(tmp_path_factory.mktemp("base") / "tiny-qwen2"))


@pytest.fixture
def request_for(base: BaseModel, tmp_path: Path) -> Callable[..., ExportRequest]:
    def make(**changes: Any) -> ExportRequest:
        adapter = write_adapter(tmp_path / "adapter", base, rank=4)
        out = tmp_path / "outputs" / "out"
        request = ExportRequest(adapter, base, out, source="router@1", with_logits=False)
        return replace(request, **changes)

    return make


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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


def tampered(request: ExportRequest, change: Callable[[bytearray], None]) -> Callable[[dict[str, Any]], None]:
    """Changes the merged weights after they were written, before they are checked."""

    def report(message: dict[str, Any]) -> None:
        if message == MERGED:
            (folder,) = request.out.parent.glob(f".*{SUFFIX}")
            content = bytearray((folder / "model.safetensors").read_bytes())
            change(content)
            (folder / "model.safetensors").write_bytes(content)

    return report


def test_one_wrong_element_fails_parity_and_nothing_is_exported(request_for: Callable[..., ExportRequest]) -> None:
    request = request_for()
    plan = plan_merge(request.adapter, request.base)
    for tensor in (tensor for file in plan.files for tensor in file.tensors):
        if tensor.source.name.endswith(("layers.1.mlp.down_proj.weight", "norm.weight")):

            def flip(content: bytearray, at: int = tensor.begin + tensor.size_bytes - 2) -> None:
                content[at] ^= 1 << 3  # a low bit of the last element's upper half: 2e-5 of it or so

            with pytest.raises(ParityFailed) as failed:
                export(request, tampered(request, flip))
            (problem,) = failed.value.problems
            assert tensor.source.name in problem.message
            assert left_in(request.out.parent) == []


def test_a_dropped_scaling_fails_parity(
    request_for: Callable[..., ExportRequest], base: BaseModel, tmp_path: Path
) -> None:
    """The classic silent bug: everything is finite, everything loads, and the adapter is half as strong."""
    request = request_for()
    half = write_adapter(tmp_path / "half", base, rank=4, alpha=4)  # the same A and B, alpha 4 in place of 8
    wrong = export(replace(request, adapter=half, out=tmp_path / "wrong")).folder / "model.safetensors"
    with pytest.raises(ParityFailed) as failed:
        export(request, tampered(request, lambda content: content.__setitem__(slice(None), wrong.read_bytes())))
    assert len(failed.value.problems) == len(plan_merge(half, base).updates)


def damage(base: BaseModel, folder: Path, change: Callable[[Path], None]) -> Path:
    """A sharded copy of the base with something wrong."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100KB")
    change(folder)
    return folder


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


def child(tmp_path: Path, request: ExportRequest, **more: Any) -> subprocess.Popen[str]:
    spec = {
        "adapter": str(request.adapter),
        "base": str(request.base.folder),
        "out": str(request.out),
        "source": request.source,
        **more,
    }
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    return subprocess.Popen(
        [sys.executable, "-m", "adapters.export", str(tmp_path / "spec.json")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def messages(process: subprocess.Popen[str], until: str) -> list[dict[str, Any]]:
    """Lines of the child up to the first with this stage."""
    assert process.stdout is not None
    read: list[dict[str, Any]] = []
    for line in process.stdout:
        read.append(json.loads(line))
        if read[-1]["stage"] == until:
            break
    return read


def closed(process: subprocess.Popen[str]) -> int:
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        stream.close()
    return process.wait(30)


def test_the_child_process_speaks_json_lines_and_ends_with_the_result(
    request_for: Callable[..., ExportRequest], tmp_path: Path
) -> None:
    request = request_for()
    process = child(tmp_path, request, with_logits=False, nice=5)
    stages = messages(process, "result")
    assert process.wait(30) == 0
    closed(process)
    assert stages[0]["stage"] == "planned"
    assert stages[-1]["result"]["parity"]["verdict"] == "passed"
    again = child(tmp_path, request, with_logits=False)
    assert messages(again, "error")[-1]["error"]["code"] == "output_exists"
    assert again.wait(30) == 3
    closed(again)


@pytest.mark.parametrize("ending", ["SIGTERM", "parent gone", "SIGKILL"])
def test_a_child_that_is_ended_leaves_nothing_that_the_next_export_does_not_sweep(
    request_for: Callable[..., ExportRequest], tmp_path: Path, ending: str
) -> None:
    request = request_for()
    process = child(tmp_path, request)
    messages(process, "comparing logits")
    assert len(left_in(request.out.parent)) == 1
    if ending == "parent gone":
        assert process.stdin is not None
        process.stdin.close()
    else:
        os.killpg(process.pid, getattr(signal, ending))
    process.wait(30)
    closed(process)
    if ending == "SIGKILL":
        assert len(sweep_partial(request.out.parent)) == 1
    assert left_in(request.out.parent) == []


def test_a_sweep_leaves_a_live_export_alone(request_for: Callable[..., ExportRequest]) -> None:
    request = request_for()
    swept: list[Path] = []
    export(request, lambda message: swept.extend(sweep_partial(request.out.parent)) if message == MERGED else None)
    assert swept == [] and left_in(request.out.parent) == ["out"]


IN_A_SMALL_FILE_SYSTEM = """
import json, pathlib, sys
from dataclasses import replace
from adapters.errors import StorageFull
from adapters.export import export, request_from_spec
request = request_from_spec(json.loads(pathlib.Path(sys.argv[1]).read_text()))
disk = request.out.parent

def fill(message):
    if message["stage"] == "merging" and not (disk / "filler").exists():
        with (disk / "filler").open("wb") as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
                    file.flush()
            except OSError:
                file.truncate(file.tell())

for report in (lambda message: None, fill):
    try:
        export(request, report)
        print("exported")
        request = replace(request, out=disk / "second")
    except StorageFull as error:
        print("full")
(disk / "filler").unlink()
print(sorted(path.name for path in disk.iterdir()))
"""


def test_a_disk_that_fills_up_meanwhile_is_said_so_and_nothing_is_left(
    base: BaseModel, request_for: Callable[..., ExportRequest], tmp_path: Path
) -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a small file system of their own")
    folder = damage(base, tmp_path / "sharded", lambda folder: None)
    request = request_for()
    spec = {"adapter": str(request.adapter), "base": str(folder), "out": str(tmp_path / "disk" / "out")}
    (tmp_path / "spec.json").write_text(json.dumps({**spec, "source": "router@1", "with_logits": False}))
    (tmp_path / "run.py").write_text(IN_A_SMALL_FILE_SYSTEM)
    (tmp_path / "disk").mkdir()
    command = f"exec {sys.executable} {tmp_path}/run.py {tmp_path}/spec.json"
    mount = f"mount -t tmpfs -o size=20m none {tmp_path}/disk && {command}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:3] == ["exported", "full", "['out']"], done.stdout + done.stderr


def test_the_merge_imports_neither_transformers_nor_peft(base: BaseModel, request_for: Any, tmp_path: Path) -> None:
    request = request_for()
    spec = {"adapter": str(request.adapter), "base": str(base.folder), "out": str(tmp_path / "out"), "source": "x"}
    (tmp_path / "spec.json").write_text(json.dumps({**spec, "with_logits": False}))
    code = (
        "import json, sys; from adapters.export import export, request_from_spec;"
        "export(request_from_spec(json.load(open(sys.argv[1]))));"
        "print(sorted({'transformers', 'peft', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "spec.json")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


PEAK = """
import json, pathlib, resource, sys
import torch, numpy
from adapters.merge import merge, plan_merge
from adapters.bases import load_base
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
plan = plan_merge(pathlib.Path(sys.argv[2]), load_base(sys.argv[1]))
out = pathlib.Path(sys.argv[3]); out.mkdir()
merge(plan, out)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([(peak - before) * 1024, plan.memory_bound_bytes]))
"""


def test_peak_memory_stays_under_the_stated_bound_beside_a_tensor_three_times_as_large(tmp_path: Path) -> None:
    """Up, gate and down of 268 MB each, in a sparse file of zeros; 16 MiB are for the allocator and the threads."""
    from adapters.checkpoint import encode_header, expected_tensors

    folder = tmp_path / "wide"
    base = shape_only_base(
        folder, hidden_size=256, intermediate_size=524_288, num_hidden_layers=1, torch_dtype="bfloat16"
    )
    required, _ = expected_tensors(base.config)
    header = encode_header((name, "BF16", shape) for name, shape in sorted(required.items()))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * sum(int(np.prod(shape)) for shape in required.values()))
    adapter = write_adapter(tmp_path / "adapter", base, rank=2, dtype="BF16")
    arguments = [str(folder), str(adapter), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=True)
    grown, bound = json.loads(done.stdout)
    assert grown <= bound + (16 << 20), f"{grown:,} bytes, the bound is {bound:,}"


def test_compare_logits_knows_a_shift_from_a_change() -> None:
    random = np.random.default_rng(0)
    logits = [random.normal(size=(5, 11)), random.normal(size=(1, 11))]
    same = compare_logits(logits, logits)
    assert (same.positions, same.max_abs, same.max_kl, same.top1_agreement) == (6, 0.0, 0.0, 1.0)
    shifted = compare_logits(logits, [row + 3 for row in logits])
    assert shifted.max_abs == pytest.approx(3) and shifted.max_kl < 1e-12 and shifted.top1_agreement == 1.0
    swapped = compare_logits(logits, [-row for row in logits])
    assert swapped.top1_agreement < 0.5 and swapped.mean_kl > 0.1
    assert swapped.top1_disagreements_beyond_margin >= 3
    with pytest.raises(ValueError, match="shapes"):
        compare_logits(logits, [row[:, :3] for row in logits])


def test_what_a_server_says_is_held_against_peft_and_merged(request_for: Callable[..., ExportRequest]) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    request = request_for()
    merged = export(request).folder
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(request.base.folder), request.adapter)
    ids = list(b"served by an engine")
    with torch.no_grad():
        log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    rows = [None] + [
        {str(token): {"logprob": float(row[token]), "rank": 1} for token in row.topk(5).indices.tolist()}
        for row in log_probabilities[:-1]
    ]
    answer = read_answer({"choices": [{"prompt_token_ids": ids, "prompt_logprobs": rows}]})
    assert answer is not None and read_answer({"choices": [{"text": "no log-probabilities"}]}) is None
    spec = {"base": request.base.folder, "adapter": request.adapter, "merged": merged, "dtype": "float32"}
    found = probe({**spec, "served": [answer]})
    assert found["served_against_peft"]["positions"] == len(ids) - 1
    assert found["served_against_peft"]["max_abs"] < 1e-5 > found["served_against_merged"]["max_abs"] / 10
    bare = probe({**spec, "served": [answer], "merged": request.base.folder})  # the adapter forgotten
    assert bare["served_against_merged"]["max_abs"] > 1e-3
    assert logits_problems(bare) and not logits_problems(found)


def test_errors_of_the_file_system_are_ours(request_for: Callable[..., ExportRequest], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HotshoeError):
        export(request_for(out=tmp_path / "file" / "out"))
