"""SIGKILL at every system call that changes the disk: a version is whole or absent, an alias never dangles."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from adapters.bases import BaseModel
from adapters.doctor import run_doctor
from adapters.publish import PublishContext, publish, remove_files
from adapters.registry import Registry
from adapters.store import BlobStore
from adapters.types import DEFAULT_TENANT, STABLE, Candidate, VersionStatus
from tests.fixtures.adapters import write_adapter
from tests.fixtures.killing import Run, run_and_kill, why_not_here

WHERE = (DEFAULT_TENANT, "router")
SAMPLE_EVERY = 9  # a first start has ten times the calls and is sampled more thinly


@dataclass(frozen=True)
class State:
    """A state folder with router@1 (stable) and router@2, both ready, and a third adapter's files beside it."""

    home: Path
    source: Path
    base: BaseModel

    def open(self) -> PublishContext:
        return PublishContext(Registry.open(self.home), BlobStore(self.home / "blobs"), self.base, max_rank=64)

    def copy(self, to: Path, *, is_fresh: bool) -> State:
        shutil.rmtree(to, ignore_errors=True)
        if not is_fresh:
            shutil.copytree(self.home, to)
        return State(to, self.source, self.base)


@dataclass(frozen=True)
class Scenario:
    """What the child does, and what must hold afterwards, however far it came."""

    act: Callable[[State], object]
    holds: Callable[[State, Run], None]
    is_fresh: bool = False


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory, tiny: BaseModel) -> State:
    folder = tmp_path_factory.mktemp("killed")
    state = State(folder / "home", folder / "third", tiny)
    context = state.open()
    for number in (1, 2):
        publish(write_adapter(folder / f"adapter{number}", tiny, seed=number), "router", context=context)
        context.registry.set_status(*WHERE, number, VersionStatus.READY)
    context.registry.close()
    write_adapter(state.source, tiny, seed=3)
    return state


def act_publish(state: State) -> None:
    publish(state.source, "router", context=state.open())


def published_whole_or_absent(state: State, run: Run) -> None:
    context = state.open()
    versions = context.registry.versions(*WHERE)
    assert [version.number for version in versions] in ([1, 2], [1, 2, 3])
    assert len(versions) == 3 or not run.acknowledged
    assert context.registry.aliases(*WHERE)[0].number == 1
    if len(versions) == 3:
        assert versions[2].digest is not None
        context.store.verify(versions[2].digest)
    context.registry.close()
    again = state.open()
    assert publish(state.source, "router", context=again).number == 3  # a retry always succeeds
    again.registry.close()


def act_promote(state: State) -> None:
    state.open().registry.move_alias(*WHERE, STABLE, 2, expected_generation=1, actor="test")


def promoted_or_not(state: State, run: Run) -> None:
    registry = state.open().registry
    (alias,) = registry.aliases(*WHERE)
    assert (alias.number, alias.generation, alias.previous) in ((1, 1, ()), (2, 2, (1,)))
    assert alias.number == 2 or not run.acknowledged
    promotions = [event.number for event in registry.events(*WHERE) if event.kind == "promoted"]
    assert (2 in promotions) == (alias.number == 2)  # the event is written with the change or not at all
    registry.close()


def act_try(state: State) -> None:
    state.open().registry.set_candidate(*WHERE, STABLE, Candidate(2, 0.05), expected_generation=1, actor="test")


def tried_or_not(state: State, run: Run) -> None:
    registry = state.open().registry
    (alias,) = registry.aliases(*WHERE)
    assert (alias.number, alias.generation, alias.candidate) in ((1, 1, None), (1, 2, Candidate(2, 0.05)))
    assert alias.candidate or not run.acknowledged
    assert ("candidate_set" in {event.kind for event in registry.events(*WHERE)}) == (alias.candidate is not None)
    registry.close()


def act_retire(state: State) -> None:
    context = state.open()
    version = context.registry.retire(*WHERE, 2, actor="test")
    assert version.digest is not None
    remove_files(context.registry, context.store, version.digest)


def retired_or_not(state: State, run: Run) -> None:
    context = state.open()
    version = context.registry.get(*WHERE, 2)
    assert version.status in (VersionStatus.READY, VersionStatus.RETIRED)
    assert version.status is VersionStatus.RETIRED or not run.acknowledged
    if version.status is VersionStatus.READY:
        assert version.digest is not None
        context.store.verify(version.digest)
    context.registry.close()


def act_first(state: State) -> None:
    """The first start ever: folders, tables, a version, and its alias in the transaction that makes it ready."""
    act_publish(state)
    state.open().registry.set_status(*WHERE, 1, VersionStatus.READY)


def begun_or_not(state: State, run: Run) -> None:
    registry = state.open().registry
    if registry.adapters(DEFAULT_TENANT):
        (version,) = registry.versions(*WHERE)
        is_ready = version.status is VersionStatus.READY
        assert [alias.number for alias in registry.aliases(*WHERE)] == ([1] if is_ready else [])
        assert is_ready or not run.acknowledged
    else:
        assert not run.acknowledged
    registry.close()


SCENARIOS = {
    "publish": Scenario(act_publish, published_whole_or_absent),
    "promote": Scenario(act_promote, promoted_or_not),
    "candidate": Scenario(act_try, tried_or_not),
    "retire": Scenario(act_retire, retired_or_not),
    "first start": Scenario(act_first, begun_or_not, is_fresh=True),
}
needs_ptrace = pytest.mark.skipif(bool(why_not_here()), reason=why_not_here() or "ptrace works here")


@needs_ptrace
@pytest.mark.parametrize("name", SCENARIOS)
def test_f2_f3_f6_a_kill_at_sampled_system_calls_leaves_whole_or_nothing(
    state: State, tmp_path: Path, name: str
) -> None:
    assert (
        kill_everywhere(state, SCENARIOS[name], tmp_path, step=SAMPLE_EVERY * (4 if SCENARIOS[name].is_fresh else 1))
        >= 8
    )


@needs_ptrace
@pytest.mark.long
@pytest.mark.parametrize("name", SCENARIOS)
def test_f2_f3_f6_a_kill_at_every_system_call_leaves_whole_or_nothing(state: State, tmp_path: Path, name: str) -> None:
    assert kill_everywhere(state, SCENARIOS[name], tmp_path, step=1) >= 8


def kill_everywhere(state: State, scenario: Scenario, folder: Path, step: int) -> int:
    """Kill at every `step`-th changing call and at the last; returns how many such calls the whole run has."""
    whole = run(state, scenario, folder / "whole", None)
    assert whole.acknowledged
    for kill_at in sorted({*range(0, len(whole.calls), step), len(whole.calls) - 1}):
        killed = run(state, scenario, folder / "killed", kill_at)
        assert killed.was_killed
    return len(whole.calls)


def run(state: State, scenario: Scenario, home: Path, kill_at: int | None) -> Run:
    """One run on a copy of the state, and all that must hold after it."""
    copy = state.copy(home, is_fresh=scenario.is_fresh)
    outcome = run_and_kill(lambda: scenario.act(copy), kill_at)
    if (home / "registry.sqlite3").exists():
        report = run_doctor(home)
        assert report.is_sound, (outcome, report.lines())
    scenario.holds(copy, outcome)
    assert run_doctor(home).is_sound, outcome
    run_doctor(home, repair=True)
    report = run_doctor(home)
    assert report.is_clean, (outcome, report.lines())
    return outcome
