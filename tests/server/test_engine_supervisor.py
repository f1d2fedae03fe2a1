"""The supervisor of the engine process: ready, dead, back, stopped; with a light process in vLLM's place."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from adapters.bases import BaseModel
from adapters.errors import ConfigInvalid, EngineUnavailable
from server.engine.base import EngineOptions
from server.engine.vllm import Backoff, VllmEngine
from tests.fixtures import stand_in
from tests.fixtures.adapters import shape_only_base

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    return shape_only_base(tmp_path / "tiny-base")


def make(base: BaseModel, tmp_path: Path, behaviour: str = "serve", start_timeout_seconds: float = 30.0) -> VllmEngine:
    options = EngineOptions(base.folder, base.id, tmp_path / "run", start_timeout_seconds=start_timeout_seconds)
    engine = VllmEngine(options)
    arguments = [str(engine.socket_path), base.id, behaviour, str(tmp_path / "pids")]
    engine.command = [sys.executable, "-m", stand_in.__name__, *arguments]
    engine.env = dict(os.environ)
    return engine


def processes(tmp_path: Path) -> list[int]:
    return [int(number) for number in (tmp_path / "pids").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def within(seconds: float, claim: Callable[[], bool]) -> float:
    begun = time.monotonic()
    while not claim():
        assert time.monotonic() - begun < seconds, f"not true within {seconds} s"
        await asyncio.sleep(0.02)
    return time.monotonic() - begun


async def all_gone(tmp_path: Path) -> None:
    """A killed process may take a moment to go."""
    await within(2, lambda: not any(map(is_alive, processes(tmp_path))))


async def test_it_is_ready_after_start_and_nothing_is_left_after_stop(base: BaseModel, tmp_path: Path) -> None:
    engine = make(base, tmp_path)
    assert not engine.is_ready()
    await engine.start()
    assert engine.is_ready()
    assert (await engine.capacity()).base_id == base.id
    assert set(engine.phases) == {"imports_api_server", "routes"}
    await engine.stop(1.0)
    assert not engine.is_ready()
    await all_gone(tmp_path)
    assert not engine.socket_path.exists()
    await engine.stop(1.0)


async def test_the_socket_and_the_log_are_for_our_user_only(base: BaseModel, tmp_path: Path) -> None:
    engine = make(base, tmp_path)
    await engine.start()
    await engine.stop(0.0)
    assert engine.options.run_dir.stat().st_mode & 0o777 == 0o700
    assert engine.log_path.stat().st_mode & 0o777 == 0o600


async def test_a_killed_engine_is_not_ready_within_two_seconds_and_comes_back(base: BaseModel, tmp_path: Path) -> None:
    engine = make(base, tmp_path)
    ready_at_callback: list[bool] = []

    async def failing() -> None:
        raise RuntimeError("a callback's own trouble")

    async def noting() -> None:
        ready_at_callback.append(engine.is_ready())

    callbacks: tuple[Callable[[], Awaitable[None]], ...] = (failing, noting)
    for callback in callbacks:
        engine.on_restart(callback)
    await engine.start()
    leader, child = processes(tmp_path)
    os.kill(leader, signal.SIGKILL)
    await within(2, lambda: not engine.is_ready())
    await within(30, lambda: bool(ready_at_callback))
    assert ready_at_callback == [True]
    assert engine.restarts == 1
    await within(2, lambda: not is_alive(child))
    assert await engine.loaded() == []
    await engine.stop(0.0)
    await all_gone(tmp_path)


@pytest.mark.parametrize("which", [0, 1], ids=["API process", "core"])
async def test_a_stopped_process_is_not_ready_until_it_goes_on(base: BaseModel, tmp_path: Path, which: int) -> None:
    engine = make(base, tmp_path)
    await engine.start()
    pid = processes(tmp_path)[which]
    os.kill(pid, signal.SIGSTOP)
    await within(2, lambda: not engine.is_ready())
    os.kill(pid, signal.SIGCONT)
    await within(5, engine.is_ready)
    assert engine.restarts == 0
    await engine.stop(0.0)


@pytest.mark.parametrize("which", [0, 1], ids=["API process", "core"])
async def test_a_stopped_process_with_which_nobody_goes_on_is_replaced(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    monkeypatch.setattr("server.engine.vitals.STOPPED_SECONDS", 1.0)
    engine = make(base, tmp_path)
    await engine.start()
    os.kill(processes(tmp_path)[which], signal.SIGSTOP)
    await within(2, lambda: not engine.is_ready())
    await within(30, lambda: engine.restarts == 1)
    assert engine.is_ready() and not any(map(is_alive, processes(tmp_path)[:2]))
    await engine.stop(0.0)
    await all_gone(tmp_path)


@pytest.mark.parametrize("which", [0, 1], ids=["API process", "core"])
async def test_a_killed_process_ends_the_other_and_the_engine_comes_back(
    base: BaseModel, tmp_path: Path, which: int
) -> None:
    engine = make(base, tmp_path)
    await engine.start()
    os.kill(processes(tmp_path)[which], signal.SIGKILL)
    await within(2, lambda: not engine.is_ready())
    await within(30, lambda: engine.restarts == 1)
    assert engine.is_ready() and not any(map(is_alive, processes(tmp_path)[:2]))
    await engine.stop(0.0)


async def test_a_core_that_hangs_behind_a_lively_api_process_is_replaced(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.vitals.HANG_SECONDS", 2.0)
    monkeypatch.setattr("server.engine.vllm.TERMINATE_SECONDS", 0.5)
    engine = make(base, tmp_path, "silent")
    await engine.start()
    await within(30, lambda: engine.restarts == 1)
    await engine.stop(0.0)


async def test_a_core_that_is_slow_to_answer_because_it_computes_is_left_alone(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.vitals.HANG_SECONDS", 2.0)
    monkeypatch.setattr("server.engine.vllm.TERMINATE_SECONDS", 0.5)
    engine = make(base, tmp_path, "busy")
    await engine.start()
    await asyncio.sleep(5)
    assert engine.is_ready() and engine.restarts == 0 and len(processes(tmp_path)) == 2
    await engine.stop(0.0)
    await all_gone(tmp_path)


async def test_an_engine_that_dies_at_every_start_does_not_spin(base: BaseModel, tmp_path: Path) -> None:
    engine = make(base, tmp_path)
    await engine.start()
    engine.command[-2:] = ["fail", str(tmp_path / "pids")]
    os.kill(processes(tmp_path)[0], signal.SIGKILL)
    await asyncio.sleep(4)
    assert len(processes(tmp_path)) <= 2 * 4, "pauses of 0.5, 1 and 2 seconds, then of 4"
    assert not engine.is_ready() and engine.restarts == 0
    await engine.stop(0.0)
    await all_gone(tmp_path)


async def test_a_start_that_the_machine_does_not_allow_is_tried_again(base: BaseModel, tmp_path: Path) -> None:
    engine = make(base, tmp_path)
    await engine.start()
    log_path, blocked = engine.log_path, tmp_path / "blocked"
    engine.log_path = blocked / "engine.log"
    blocked.write_text("a file, where a folder is needed")
    os.kill(processes(tmp_path)[0], signal.SIGKILL)
    await within(2, lambda: not engine.is_ready())
    await asyncio.sleep(1)
    assert engine.restarts == 0
    engine.log_path = log_path
    await within(30, lambda: engine.restarts == 1)
    await engine.stop(0.0)


def test_the_pause_before_a_start_grows_and_is_short_again_after_a_minute_of_life() -> None:
    backoff = Backoff()
    assert [backoff.after(0.0) for _ in range(9)] == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert [backoff.after(59.0), backoff.after(61.0), backoff.after(0.0)] == [30, 0.5, 1]


async def test_a_start_that_fails_gives_the_logs_root_error(base: BaseModel, tmp_path: Path) -> None:
    engine = make(base, tmp_path, "fail")
    with pytest.raises(EngineUnavailable, match="No available memory for the cache blocks") as raised:
        await engine.start()
    assert str(engine.log_path) in raised.value.message
    await all_gone(tmp_path)
    await engine.stop(0.0)


async def test_a_start_that_never_ends_is_given_up(base: BaseModel, tmp_path: Path) -> None:
    engine = make(base, tmp_path, "hang", start_timeout_seconds=3.0)
    with pytest.raises(EngineUnavailable, match="not ready after 3 s"):
        await engine.start()
    await all_gone(tmp_path)


async def test_a_vllm_without_our_plugins_is_no_engine(base: BaseModel, tmp_path: Path) -> None:
    engine = make(base, tmp_path, "no-plugins")
    with pytest.raises(EngineUnavailable, match="without our plugins"):
        await engine.start()


async def test_an_engine_that_ignores_sigterm_is_killed(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.vllm.TERMINATE_SECONDS", 0.5)
    engine = make(base, tmp_path, "stubborn")
    await engine.start()
    await engine.stop(0.0)
    await all_gone(tmp_path)


async def test_the_engine_does_not_outlive_a_killed_parent(base: BaseModel, tmp_path: Path) -> None:
    program = f"""
        import asyncio, os, sys
        sys.path.insert(0, {str(Path.cwd())!r})
        from pathlib import Path
        from adapters.bases import load_base
        from tests.server.test_engine_supervisor import make
        async def main():
            engine = make(load_base({str(base.folder)!r}), Path({str(tmp_path)!r}))
            await engine.start()
            print("ready", flush=True)
            await asyncio.sleep(600)
        asyncio.run(main())
    """
    command = (sys.executable, "-c", textwrap.dedent(program))
    parent = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        assert parent.stdout is not None
        async with asyncio.timeout(60):
            while not (await parent.stdout.readline()).endswith(b"ready\n"):
                pass
        leader, _ = processes(tmp_path)
        parent.kill()
        await parent.wait()
        await within(5, lambda: not is_alive(leader))
    finally:
        for pid in processes(tmp_path):
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_socket_path_that_linux_does_not_take_is_refused(base: BaseModel, tmp_path: Path) -> None:
    options = EngineOptions(base.folder, base.id, tmp_path / ("long" * 30))
    with pytest.raises(ConfigInvalid, match="107"):
        VllmEngine(options)
