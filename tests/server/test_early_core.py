"""A process that was begun before it is wanted becomes the one that is, with its open files; or it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import popen_spawn_posix
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest

from server.vllm_plugin import early_core
from server.vllm_plugin.early_core import NAME, EarlyCore, begin, other_variables, preload
from tests.fixtures.engines import EngineRig

CONTEXT = multiprocessing.get_context("spawn")
MODULES = ("json", "http.client")


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> Iterator[EarlyCore]:
    yield from started(monkeypatch, MODULES)


def started(monkeypatch: pytest.MonkeyPatch, modules: tuple[str, ...]) -> Iterator[EarlyCore]:
    """Variables are those that vLLM sets before it starts its core, so that the two are alike."""
    monkeypatch.setattr(popen_spawn_posix.Popen, "_launch", popen_spawn_posix.Popen._launch)
    monkeypatch.setattr(early_core, "preload", lambda given: os.environ.get("LD_PRELOAD", ""))
    for name, value in {**early_core.AHEAD, "LD_PRELOAD": ""}.items():
        monkeypatch.setenv(name, value)
    forget_pytest()
    one = begin(modules)
    pid = one.pid
    yield one
    if pid is not None and one.pid is not None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def forget_pytest() -> None:
    """Its own variable changes while a test runs; the others readline sets, past Python's `os.environ`."""
    for name in ("PYTEST_CURRENT_TEST", "COLUMNS", "LINES"):
        os.environ.pop(name, None)
        os.unsetenv(name)


def answer(connection: Connection, queue: Any, event: Any) -> None:
    """What a core does: it speaks to its parent by every way that it was given."""
    connection.send((os.getpid(), sorted(name for name in MODULES if name in sys.modules), os.environ.get("LATE")))
    queue.put(connection.recv())
    event.wait(20)
    raise SystemExit(7)


def ask(name: str) -> tuple[int, list[str], str | None]:
    """Run `answer` in a process of this name; its pid, what it had imported, what it knows of a late variable."""
    forget_pytest()
    ours, theirs = CONTEXT.Pipe()
    queue, event = CONTEXT.Queue(), CONTEXT.Event()
    child = CONTEXT.Process(target=answer, args=(theirs, queue, event), name=name)
    child.start()
    theirs.close()
    told: tuple[int, list[str], str | None] = ours.recv()
    assert told[0] == child.pid and child.is_alive()
    ours.send({"a": 1})
    assert queue.get(timeout=20) == {"a": 1}
    event.set()
    assert wait([child.sentinel], timeout=20) == [child.sentinel]
    child.join(20)
    assert child.exitcode == 7
    return told


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_the_core_is_the_process_that_was_begun_with_what_it_had_imported(early: EarlyCore) -> None:
    pid = early.pid
    assert ask("another")[0] != pid
    assert ask(NAME)[:2] == (pid, sorted(MODULES))
    assert gone(pid or 0)
    assert ask(NAME)[0] != pid, "a second core is started as any other"


def test_variables_that_vllm_sets_late_come_with_it(early: EarlyCore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    pid = early.pid
    assert ask(NAME)[0] == pid


def test_with_another_variable_it_is_ended_and_a_new_process_started(
    early: EarlyCore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pid = early.pid
    monkeypatch.setenv("LATE", "yes")
    told = ask(NAME)
    assert told[0] != pid and told[2] == "yes"
    assert gone(pid or 0)
    assert "started anew" in caplog.text and "LATE" in caplog.text


def test_one_that_cannot_import_is_replaced(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for early in started(monkeypatch, ("no_such_module",)):
        pid = early.pid
        assert ask(NAME)[0] != pid
        assert gone(pid or 0) and "started anew" in caplog.text


def test_it_dies_with_its_parent() -> None:
    program = (
        "import sys, time; from server.vllm_plugin.early_core import EarlyCore; "
        "print(EarlyCore('', ['json']).pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(1.0)  # it has asked the kernel by then
        assert not gone(pid)
        parent.kill()
    deadline = time.monotonic() + 10
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(pid)


def test_what_differs_is_named_but_for_what_is_read_late() -> None:
    assert other_variables({"A": "1", "LOCAL_WORLD_SIZE": "2"}, {"A": "1"}) == []
    assert other_variables({"A": "1", "B": "2"}, {"A": "2", "C": ""}) == ["A", "B", "C"]


@pytest.mark.model
def test_the_real_engines_core_was_begun_early(vllm_engine: EngineRig) -> None:
    if len(os.sched_getaffinity(0)) == 1:
        pytest.skip("with one core nothing is begun early")
    log = (vllm_engine.scratch / "run" / "engine.log").read_text()
    assert "which was begun early" in log and "started anew" not in log


@pytest.mark.model
def test_it_preloads_what_vllm_would() -> None:
    """vLLM's own words, from the function that sets them, in a process of its own."""
    program = """
import os
os.environ.pop("LD_PRELOAD", None)
from vllm.engine.arg_utils import EngineArgs
from adapters.embedded import default_base
config = EngineArgs(model=str(default_base()), enforce_eager=True).create_engine_config()
print("preloaded", os.environ.get("LD_PRELOAD", ""))
"""
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={**clean, "HF_HUB_OFFLINE": "1"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("preloaded")]
    assert lines == [f"preloaded {preload('')}"], done.stderr[-2000:]
