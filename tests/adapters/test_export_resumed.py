"""A killed export goes on from its work folder: finished files are not made again, and the result is the same."""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.bases import BaseModel, load_base
from adapters.errors import AlreadyRunning, MergeFailed, ParityFailed
from adapters.export import ExportRequest, export
from adapters.staging import INPUTS
from tests.adapters.exporting import MERGED, contents, damage, left_in
from tests.fixtures.adapters import write_adapter
from tests.fixtures.killing import Run, run_and_kill, why_not_here

needs_ptrace = pytest.mark.skipif(bool(why_not_here()), reason=why_not_here() or "ptrace works here")


@pytest.fixture
def request_(base: BaseModel, tmp_path: Path) -> ExportRequest:
    """In shards of 100 kB, with a work folder."""
    sharded = load_base(damage(base, tmp_path / "sharded", lambda _: None))
    adapter = write_adapter(tmp_path / "adapter", sharded)
    out = tmp_path / "out"
    out.mkdir()  # so that every run has the same calls
    return ExportRequest(adapter, sharded, out / "done", "router@1", with_logits=False, workers=1, work=out / "work")


def publishing(run: Run) -> int:
    """The call that takes away the note of the inputs, before the folder gets its name: all files are whole."""
    return max(i for i, call in enumerate(run.calls) if call.startswith("unlink"))


def killed(request: ExportRequest, at: int) -> bool:
    return run_and_kill(lambda: export(request), at).was_killed


@needs_ptrace
def test_killed_at_sampled_system_calls_it_goes_on_and_ends_in_the_same_bytes(request_: ExportRequest) -> None:
    whole = replace(request_, out=request_.out.parent / "whole")
    calls = len(run_and_kill(lambda: export(whole), None).calls)
    expected = contents(whole.out)
    assert calls > 20
    kept = 0
    for at in range(0, calls, 7):
        assert killed(request_, at)
        assert request_.work is not None
        before = {path.name: path.stat().st_ino for path in request_.work.glob("*.safetensors")}
        kept += len(before)
        if not request_.out.exists():  # killed after it was published
            export(request_)
        after = {path.name: path.stat().st_ino for path in request_.out.glob("*.safetensors")}
        assert before.items() <= after.items(), "a finished file was made again"
        assert contents(request_.out) == expected and left_in(request_.out.parent) == ["done", "whole"]
        shutil.rmtree(request_.out)
    assert kept > 5


@needs_ptrace
def test_a_file_that_was_flipped_in_between_fails_parity_and_goes(request_: ExportRequest) -> None:
    whole = replace(request_, out=request_.out.parent / "whole")
    run = run_and_kill(lambda: export(whole), None)
    assert killed(request_, publishing(run)) and request_.work is not None
    victim = sorted(request_.work.glob("*.safetensors"))[0]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 0xFF
    victim.write_bytes(content)
    with pytest.raises(ParityFailed):
        export(request_)
    assert left_in(request_.out.parent) == ["whole"]
    export(request_)
    assert contents(request_.out) == contents(whole.out)


@needs_ptrace
def test_what_another_order_left_is_not_gone_on_from(request_: ExportRequest) -> None:
    whole = replace(request_, out=request_.out.parent / "whole")
    run = run_and_kill(lambda: export(whole), None)
    assert killed(replace(request_, dtype="float32"), publishing(run)) and request_.work is not None
    assert (request_.work / INPUTS).is_file() and len(list(request_.work.glob("*.safetensors"))) > 2
    export(request_)
    assert contents(request_.out) == contents(whole.out)


def test_an_exit_keeps_the_work_and_an_error_does_not(request_: ExportRequest) -> None:
    def leave(message: dict[str, object]) -> None:
        if message == MERGED:
            raise SystemExit(143)

    with pytest.raises(SystemExit):
        export(request_, leave)
    assert request_.work is not None and len(list(request_.work.glob("*.safetensors"))) > 2
    nan = write_adapter(request_.work.parent.parent / "nan", request_.base, fill=(float("nan"), 1.0))
    with pytest.raises(MergeFailed, match="not finite"):
        export(replace(request_, adapter=nan))
    assert left_in(request_.out.parent) == []


def test_a_work_folder_has_one_process_at_a_time(request_: ExportRequest) -> None:
    assert request_.work is not None
    request_.work.mkdir(parents=True)
    handle = os.open(request_.work, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(AlreadyRunning):
        export(request_)
    os.close(handle)
    assert export(request_).folder.is_dir()
