"""When the engine core may be forked: no thread is left behind that somebody might wait for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from server.vllm_plugin import startup


def test_a_thread_of_ours_is_seen_and_forbids_a_fork() -> None:
    before = len(startup.other_threads())
    is_done = threading.Event()
    thread = threading.Thread(target=is_done.wait)
    thread.start()
    try:
        assert len(startup.other_threads()) == before + 1
    finally:
        is_done.set()
        thread.join()


def test_openmps_pool_is_seen_after_one_parallel_region() -> None:
    """What a forked child would wait for in vain; asked of a process that has just made one."""
    program = (
        "import torch; from server.vllm_plugin.startup import other_threads\n"
        "torch.set_num_threads(2); before = len(other_threads())\n"
        "torch.ones(1 << 20).add_(1); print(before, len(other_threads()))\n"
    )
    before, after = run_python(program)
    assert after > before, (before, after)


def test_zmqs_threads_are_no_obstacle_and_others_are_named(tmp_path: Path) -> None:
    for number, name in enumerate(("ZMQbg/IO/0", "ZMQbg/Reaper", "python", "jemalloc_bg_thd")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "comm").write_text(f"{name}\n")
    assert startup.other_threads(tmp_path) == ["jemalloc_bg_thd", "python"]


def test_engines_that_bind_threads_start_as_stock_vllm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(startup.BINDING, startup.UNBOUND)
    assert startup.is_wanted()
    monkeypatch.setenv(startup.SWITCH, "0")
    assert not startup.is_wanted()
    monkeypatch.setenv(startup.SWITCH, "yes")
    with pytest.raises(ValueError, match="takes 0 or 1"):
        startup.is_wanted()
    monkeypatch.setenv(startup.SWITCH, "1")
    monkeypatch.setenv(startup.BINDING, "0-3")
    assert not startup.is_wanted()


def run_python(program: str) -> list[int]:
    """The numbers that a new interpreter prints."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    return [int(word) for word in done.stdout.split()]
