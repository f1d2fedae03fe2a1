"""The export as a process: its messages, its memory, and nothing left behind when it is ended or the disk is full."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.bases import BaseModel
from adapters.export import ExportRequest, export
from adapters.staging import sweep_partial
from tests.adapters.exporting import MERGED, damage, left_in
from tests.fixtures.adapters import (
    shape_only_base,
    write_adapter,
)


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
