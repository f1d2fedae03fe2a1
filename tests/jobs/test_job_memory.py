"""A job's memory: the limit that the kernel or a watch keeps, what is planned beyond it, and another try in less."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import server.job_worker
from adapters.bases import load_base
from adapters.errors import ConfigInvalid, MemoryLacking
from adapters.job_rows import JobRow
from server.job_memory import DELEGATED, Group, MemoryLimit, Watched, limit_memory, sweep_groups
from server.job_room import reserved
from server.job_training import smaller_pass
from server.machine import Machine
from tests.fixtures.bases import tiny_qwen2
from tests.fixtures.jobs import SECONDS, created, ended, messages, rows, sent, steps
from tests.fixtures.service import eventually, running
from training.config import Facts, TrainingConfig, choose
from training.job_gates import check_memory, check_place
from training.jobs import Order, is_out_of_memory

GB = 10**9
GROUP = f"hotshoe-{os.getpid()}-job"
EATER = "import sys; x = bytearray({size}); sys.stdout.write('full'); sys.stdout.flush(); sys.stdin.read()"


@contextmanager
def eater(size: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that takes so many bytes once it is told to go on."""
    code = "import sys; sys.stdin.readline(); " + EATER.format(size=size)
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"go\n")
    process.stdin.flush()


def test_a_watched_process_that_holds_more_than_it_may_is_told_of() -> None:
    limit = Watched(100_000_000)
    with eater(200_000_000) as process:
        limit.take(process.pid)
        assert not limit.is_over()
        go(process)
        assert process.stdout is not None and process.stdout.read(4) == b"full"
        assert limit.is_over()
    assert limit.is_over()  # and it stays known


def test_the_kernel_ends_a_process_in_a_group_that_holds_more_than_it_may() -> None:
    limit = limit_memory(100_000_000, f"hotshoe-test-{os.getpid()}")
    if not isinstance(limit, Group):
        pytest.skip("no control group with a memory limit may be made here")
    with eater(300_000_000) as process:
        limit.take(process.pid)
        assert not limit.is_over()
        go(process)
        assert process.wait(30) == -9
        assert limit.is_over()
    limit.close()
    assert not limit.folder.exists()


def machine(root: Path, line: str, group: str, files: tuple[str, ...]) -> Path:
    """Files as the kernel shows them, of a process in this control group; the folder that groups are made in.

    The kernel fills a new group's folder by itself; here the files are there before.
    """
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(line, encoding="ascii")
    folder = root / group
    (folder / GROUP).mkdir(parents=True)
    for name in files:
        (folder / GROUP / name).touch()
    return folder


def test_a_group_of_version_2_is_made_only_inside_one_that_was_handed_to_us(tmp_path: Path) -> None:
    files = ("memory.max", "memory.swap.max", "memory.oom.group", "cgroup.procs")
    above = machine(tmp_path, "0::/hotshoe.service/server\n", "sys/fs/cgroup/hotshoe.service", files)
    (above / "cgroup.subtree_control").touch()
    assert isinstance(limit_memory(7, "job", tmp_path), Watched)
    try:
        os.setxattr(above, DELEGATED, b"1")
    except OSError as error:
        pytest.skip(f"this file system has no attributes of users: {error}")
    limit = limit_memory(7, "job", tmp_path)
    assert isinstance(limit, Group) and limit.folder == above / GROUP
    assert (above / "cgroup.subtree_control").read_text() == "+memory"  # else the kernel limits none of its children
    assert [(limit.folder / name).read_text() for name in files[:3]] == ["7", "0", "1"]
    limit.take(42)
    assert (limit.folder / "cgroup.procs").read_text() == "42"
    assert not limit.is_over()
    (limit.folder / "memory.events").write_text("low 0\nhigh 0\nmax 9\noom 1\noom_kill 0\n")
    assert not limit.is_over()
    (limit.folder / "memory.events").write_text("low 0\nmax 9\noom 1\noom_kill 1\n")
    assert limit.is_over()


def test_a_group_of_version_1_is_made_inside_our_own(tmp_path: Path) -> None:
    files = ("memory.limit_in_bytes", "cgroup.procs")
    own = machine(tmp_path, "4:memory:/ours\n3:cpuset:/\n", "sys/fs/cgroup/memory/ours", files)
    limit = limit_memory(9, "job", tmp_path)
    assert isinstance(limit, Group) and limit.folder == own / GROUP
    assert (limit.folder / "memory.limit_in_bytes").read_text() == "9"


def test_where_the_kernel_gives_a_group_no_limit_the_processes_are_watched(tmp_path: Path) -> None:
    own = machine(tmp_path, "4:memory:/ours\n", "sys/fs/cgroup/memory/ours", ("cgroup.procs",))
    assert isinstance(limit_memory(9, "job", tmp_path), Watched)
    gone = own / "hotshoe-999999999-job"  # of a server that is not there any more
    gone.mkdir()
    (own / GROUP / "cgroup.procs").unlink()
    sweep_groups(tmp_path)
    assert not gone.exists() and (own / GROUP).exists()


def test_without_control_groups_the_processes_are_watched(tmp_path: Path) -> None:
    assert isinstance(limit_memory(9, "job", tmp_path), Watched)


def with_settings(**settings: Any) -> JobRow:
    return JobRow("ftjob-1", "default", "a", "router", "tiny", "file-1", settings=settings)


@pytest.mark.parametrize(
    ("batch", "rows_at_once", "fewer"), [(16, 16, 8), (16, 8, 4), (12, 12, 6), (15, 15, 5), (7, 7, 1), (8, 1, None)]
)
def test_the_next_try_has_at_most_half_the_rows_at_a_time_and_the_same_batch(
    batch: int, rows_at_once: int, fewer: int | None
) -> None:
    assert smaller_pass(with_settings(batch_size=batch, pass_size=rows_at_once)) == fewer
    if fewer is not None:
        config = TrainingConfig(data=Path("x"), name="x", batch_size=batch, pass_size=fewer)
        chosen = choose(config, Facts(100, 50, False, 10**6, 2048, "float32", "cpu", 2**33, False))
        assert (chosen.batch_size, chosen.pass_size, chosen.evaluation_pass_size) == (batch, fewer, fewer)


def test_it_is_tried_in_less_memory_once() -> None:
    tried = JobRow(
        "ftjob-1", "default", "a", "r", "t", "f", request={"pass_size": 8}, settings={"batch_size": 16, "pass_size": 8}
    )
    assert smaller_pass(tried) is None
    assert smaller_pass(JobRow("ftjob-1", "default", "a", "r", "t", "f")) is None  # it had not come so far


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_a_refused_allocation_is_recognised(error: Exception, is_it: bool) -> None:
    assert is_out_of_memory(error) is is_it


def test_a_run_that_is_planned_to_need_more_than_it_may_have_is_refused_with_the_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = {"peak_bytes": 3 * GB, "peak_low_bytes": 2.5 * GB}
    run: Any = SimpleNamespace(plan=plan)
    monkeypatch.setattr(
        "training.job_gates._smaller", lambda _: [("hotshoe.method qlora", GB), ("batch_size 1", 9 * GB)]
    )
    check_memory(run, None)
    check_memory(run, int(2.6 * GB))
    check_memory(SimpleNamespace(plan={"left_out": "too short"}), 1)  # type: ignore[arg-type]
    with pytest.raises(MemoryLacking) as refused:
        check_memory(run, 2 * GB)
    assert "about 3.00 GB of memory (2.50 GB at least), and a job may have 2.00 GB here" in refused.value.message
    assert "give hotshoe.method qlora (1.00 GB), or" in refused.value.message


def test_on_a_gpu_a_run_has_what_is_reserved_and_else_nothing() -> None:
    order = Order({}, "folder", memory_bytes=7, gpu_memory_bytes=9)
    assert (check_place(order, "cpu"), check_place(order, "cuda")) == (7, 9)
    with pytest.raises(MemoryLacking, match="HOTSHOE_JOB_GPU_MEMORY_BYTES"):
        check_place(replace(order, gpu_memory_bytes=None), "cuda")


def test_the_engine_leaves_a_part_of_the_gpu_to_training() -> None:
    card = Machine(64 * GB, 80 * GB)
    assert reserved((), 8 * GB, card) == ("--gpu-memory-utilization=0.8200",)
    given = ("--gpu-memory-utilization", "0.5")
    assert reserved(given, 8 * GB, card) == (*given, "--gpu-memory-utilization=0.4000")
    with pytest.raises(ConfigInvalid, match="nothing would be left to serve with"):
        reserved((), 80 * GB, card)
    with pytest.raises(ConfigInvalid, match="write the flag out"):
        reserved(("--gpu-memory-util", "0.5"), 8 * GB, card)
    with pytest.raises(ConfigInvalid, match="no GPU's memory is known"):
        reserved((), 8 * GB, Machine(64 * GB))


def test_a_job_that_has_no_room_even_to_begin_fails_with_what_it_may_have(tmp_path: Path) -> None:
    with running(load_base(tiny_qwen2(tmp_path / "base")), tmp_path, job_memory_bytes=100_000_000) as server:
        job = ended(server, created(server, sent(server, rows())), "failed")
        assert job.error is not None and job.error.code == "out_of_memory"
        assert "more than the 100 MB of memory that a job may have" in job.error.message
        assert "HOTSHOE_JOB_MEMORY_BYTES" in job.error.message
        assert server.http.get("/ready").status_code == 200


def test_a_job_that_runs_out_of_memory_is_tried_again_with_fewer_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[Watched] = []

    def watched(limit_bytes: int, name: str) -> MemoryLimit:
        limits.append(Watched(limit_bytes))
        return limits[-1]

    monkeypatch.setattr(server.job_worker, "limit_memory", watched)
    with ExitStack() as stack:
        one = stack.enter_context(running(load_base(tiny_qwen2(tmp_path / "base")), tmp_path))
        job = created(one, sent(one, rows()), epochs=20, suffix="large")
        eventually(lambda: bool(steps(one, job)), SECONDS)
        limits[0].limit_bytes = 1
        job = ended(one, job)
        said = messages(one, job)
        assert any("It is tried again with 4 rows at a time instead of 8" in line for line in said)
        assert "Going on from the last checkpoint" in said
        used = job.model_dump()["hotshoe"]["settings"]
        assert (used["batch_size"], used["pass_size"], used["accumulation"]) == (8, 4, 2)
        assert len(limits) == 2 and not limits[1].is_over()
