"""A call that changes the disk fails: the reason is said, nothing is half there, and no failed fsync is tried again."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from adapters.doctor import run_doctor
from adapters.errors import HotshoeError, StorageDamaged, StorageFull
from adapters.types import DEFAULT_TENANT
from tests.adapters.test_killed import SCENARIOS, State, needs_ptrace, state
from tests.fixtures.killing import FOLDER_SYNC, Fault, Run, run_and_fail, run_and_kill

__all__ = ["state"]  # the fixture

pytestmark = needs_ptrace
SAMPLE_EVERY = 9
UNEXPLAINED = {"open", "fdatasync", FOLDER_SYNC, "unlink"}
SYNCS = ("fsync", "fdatasync")  # SQLite looks away when the sync of its folder fails after it made a journal
NO_SPACE, BROKEN = (StorageFull.__name__,), (StorageDamaged.__name__,)


@pytest.mark.parametrize("name", SCENARIOS)
def test_f8_an_input_output_error_at_sampled_calls_is_said_and_leaves_nothing_half(
    state: State, tmp_path: Path, name: str
) -> None:
    assert fail_everywhere(state, name, tmp_path, errno.EIO, step=sampled(name)) >= 2


@pytest.mark.long
@pytest.mark.parametrize("name", SCENARIOS)
def test_f8_an_input_output_error_at_every_call_is_said_and_leaves_nothing_half(
    state: State, tmp_path: Path, name: str
) -> None:
    assert fail_everywhere(state, name, tmp_path, errno.EIO, step=1) >= 8


@pytest.mark.parametrize("is_lasting", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_f7_a_full_disk_at_sampled_calls_is_said_and_leaves_nothing_half(
    state: State, tmp_path: Path, name: str, is_lasting: bool
) -> None:
    step = 2 * sampled(name)
    assert fail_everywhere(state, name, tmp_path, errno.ENOSPC, step=step, is_lasting=is_lasting) >= 1


@pytest.mark.long
@pytest.mark.parametrize("is_lasting", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_f7_a_full_disk_at_every_call_is_said_and_leaves_nothing_half(
    state: State, tmp_path: Path, name: str, is_lasting: bool
) -> None:
    assert fail_everywhere(state, name, tmp_path, errno.ENOSPC, step=1, is_lasting=is_lasting) >= 8


def sampled(name: str) -> int:
    return SAMPLE_EVERY * (4 if SCENARIOS[name].is_fresh else 1)


def fail_everywhere(state: State, name: str, folder: Path, number: int, *, step: int, is_lasting: bool = False) -> int:
    """Fail every `step`-th changing call in a run of its own; returns in how many of them the error came out."""
    scenario = SCENARIOS[name]
    whole = state.copy(folder / "whole", is_fresh=scenario.is_fresh)
    calls = run_and_kill(lambda: scenario.act(whole), None).calls
    refusals = 0
    for at in range(0, len(calls), step):
        home = folder / "failing"
        copy = state.copy(home, is_fresh=scenario.is_fresh)
        run = run_and_fail(lambda copy=copy: act_and_read(copy, name), Fault(at, number, is_lasting))  # type: ignore[misc]
        check(run, calls[at], number, is_lasting=is_lasting)
        refusals += not run.acknowledged
        if (home / "registry.sqlite3").exists():
            report = run_doctor(home)
            assert report.is_sound, (at, run, report.lines())
        scenario.holds(copy, run)
        assert run_doctor(home).is_sound, (at, run)
    return refusals


def act_and_read(state: State, name: str) -> None:
    """The scenario; where it is refused, what was there can still be read by the same process."""
    try:
        SCENARIOS[name].act(state)
    except HotshoeError:
        if not SCENARIOS[name].is_fresh:
            assert len(state.open().registry.versions(DEFAULT_TENANT, "router")) >= 2
        raise


def check(run: Run, failed: str, number: int, *, is_lasting: bool) -> None:
    assert not run.was_killed
    if failed in SYNCS:  # success after a failed fsync would mean that it was tried again, or not looked at
        assert not run.acknowledged, run
    if not run.acknowledged:
        # SQLite does not say why it could not open or sync its journal, and the file system here says it has room.
        is_unexplained = bool(UNEXPLAINED & {failed, *(run.calls if is_lasting else ())})
        told = (*NO_SPACE, *BROKEN) if is_unexplained else NO_SPACE
        assert run.error in (told if number == errno.ENOSPC else BROKEN), (failed, run)
