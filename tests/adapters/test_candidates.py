"""A candidate's share of an alias, as rows: who may be one, what ends it, and that it is a change like any other."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import Conflict, GenerationMismatch, InvalidRequest, ModelNotFound, NotServable
from adapters.registry import NewVersion, Registry
from adapters.types import DEFAULT_TENANT, STABLE, AdapterRef, Alias, Candidate, VersionStatus

WHERE = (DEFAULT_TENANT, "router")
ANY: dict[str, Any] = {"expected_generation": None, "actor": "ann"}


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """With router@1 (stable), router@2 and router@3, all ready."""
    opened = Registry.open(tmp_path / "home")
    for number in (1, 2, 3):
        digest = "sha256:" + str(number).rjust(64, "0")
        opened.add_version(NewVersion("router", digest=digest, base_digest="b"))
        opened.set_status(*WHERE, number, VersionStatus.READY)
    yield opened
    opened.close()


def stable(registry: Registry) -> Alias:
    (alias,) = registry.aliases(*WHERE)
    return alias


def tried(registry: Registry) -> str | None:
    candidate = registry.split(AdapterRef.parse("router")).candidate
    return candidate.ref if candidate else None


def test_a_candidate_is_a_change_of_the_alias_and_moves_nothing(registry: Registry) -> None:
    before = stable(registry)
    alias = registry.set_candidate(*WHERE, STABLE, Candidate(2, 0.05), expected_generation=1, actor="ann")
    assert alias == stable(registry)
    assert (alias.number, alias.previous, alias.generation) == (1, before.previous, 2)
    assert alias.candidate == Candidate(2, 0.05)
    split = registry.split(AdapterRef.parse("router"))
    assert (split.version.ref, split.alias, split.share, tried(registry)) == ("router@1", STABLE, 0.05, "router@2")
    assert registry.resolve(AdapterRef.parse("router")).ref == "router@1"
    assert registry.split(AdapterRef.parse("router@1")).candidate is None
    assert registry.set_candidate(*WHERE, STABLE, Candidate(2, 0.05), **ANY) == alias  # nothing to do
    assert registry.set_candidate(*WHERE, STABLE, Candidate(3, 0.5), **ANY).candidate == Candidate(3, 0.5)
    assert registry.set_candidate(*WHERE, STABLE, None, **ANY).candidate is None
    assert tried(registry) is None


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan"), float("inf")])
def test_a_share_is_more_than_nothing_and_less_than_all(registry: Registry, share: float) -> None:
    with pytest.raises(InvalidRequest, match=f"not {share:g}: promote"):
        registry.set_candidate(*WHERE, STABLE, Candidate(2, share), **ANY)


def test_a_candidate_is_another_version_that_is_ready_of_an_alias_that_exists(registry: Registry) -> None:
    registry.add_version(NewVersion("router", digest="sha256:" + "9" * 64, base_digest="b"))
    with pytest.raises(NotServable):
        registry.set_candidate(*WHERE, STABLE, Candidate(4, 0.1), **ANY)
    with pytest.raises(ModelNotFound):
        registry.set_candidate(*WHERE, STABLE, Candidate(9, 0.1), **ANY)
    with pytest.raises(Conflict, match="is version 1 already"):
        registry.set_candidate(*WHERE, STABLE, Candidate(1, 0.1), **ANY)
    for change in (Candidate(2, 0.1), None):
        with pytest.raises(ModelNotFound):
            registry.set_candidate(*WHERE, "canary", change, **ANY)
        with pytest.raises(ModelNotFound):
            registry.set_candidate("acme", "router", STABLE, change, **ANY)
        with pytest.raises(GenerationMismatch, match="generation 1, not 7"):
            registry.set_candidate(*WHERE, STABLE, change, expected_generation=7, actor="ann")
    assert stable(registry).generation == 1


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_promote_of_any_version_ends_the_share(registry: Registry, number: int) -> None:
    registry.set_candidate(*WHERE, STABLE, Candidate(2, 0.05), **ANY)
    moved = registry.move_alias(*WHERE, STABLE, number, **ANY)
    assert (moved.number, moved.candidate, moved.generation) == (number, None, 3)
    assert moved.previous == (() if number == 1 else (1,))
    assert stable(registry) == moved


def test_a_roll_back_ends_the_share_and_a_refused_one_says_that_the_candidate_is_there(registry: Registry) -> None:
    registry.set_candidate(*WHERE, STABLE, Candidate(3, 0.05), **ANY)
    with pytest.raises(Conflict, match="its candidate router@3 can be ended alone"):
        registry.rollback(*WHERE, actor="ann")
    registry.move_alias(*WHERE, STABLE, 2, **ANY)
    registry.set_candidate(*WHERE, STABLE, Candidate(3, 0.05), **ANY)
    back = registry.rollback(*WHERE, actor="ann")
    assert (back.number, back.candidate) == (1, None) and stable(registry) == back


def test_a_candidate_cannot_be_retired_until_its_share_has_ended(registry: Registry) -> None:
    registry.set_candidate(*WHERE, STABLE, Candidate(2, 0.05), **ANY)
    with pytest.raises(Conflict, match="is the candidate of stable: end its share first"):
        registry.retire(*WHERE, 2)
    registry.set_candidate(*WHERE, STABLE, None, **ANY)
    assert registry.retire(*WHERE, 2).status is VersionStatus.RETIRED


def test_a_candidate_that_is_no_longer_ready_gets_nothing_and_one_that_is_again_gets_its_share(
    registry: Registry,
) -> None:
    registry.set_candidate(*WHERE, STABLE, Candidate(2, 0.05), **ANY)
    registry.set_status(*WHERE, 2, VersionStatus.QUARANTINED)
    assert tried(registry) is None
    assert registry.resolve(AdapterRef.parse("router")).ref == "router@1"
    registry.set_status(*WHERE, 2, VersionStatus.READY)
    assert tried(registry) == "router@2"


def test_every_change_of_a_candidate_is_an_event(registry: Registry) -> None:
    def newest() -> tuple[object, ...]:
        event = registry.events(*WHERE, limit=1)[0]
        return event.kind, event.actor, event.alias, event.number, event.detail

    registry.set_candidate(*WHERE, STABLE, Candidate(2, 0.05), **ANY)
    expected = {"of": 1, "share": 0.05, "generation": 2}
    assert newest() == ("candidate_set", "ann", STABLE, 2, expected)
    registry.set_candidate(*WHERE, STABLE, Candidate(2, 0.2), **ANY)
    ended = {"number": 2, "share": 0.05}
    assert newest() == ("candidate_set", "ann", STABLE, 2, {"of": 1, "share": 0.2, "ended": ended, "generation": 3})
    registry.set_candidate(*WHERE, STABLE, None, **ANY)
    ended = {"number": 2, "share": 0.2}
    assert newest() == ("candidate_ended", "ann", STABLE, 2, {"of": 1, "share": 0, "ended": ended, "generation": 4})
    registry.set_candidate(*WHERE, STABLE, Candidate(2, 0.5), **ANY)
    registry.move_alias(*WHERE, STABLE, 2, **ANY)
    ended = {"number": 2, "share": 0.5}
    assert newest() == ("promoted", "ann", STABLE, 2, {"from": 1, "ended": ended, "generation": 6})
    registry.set_candidate(*WHERE, STABLE, Candidate(1, 0.5), **ANY)
    registry.remove_alias(*WHERE, STABLE, actor="ann")
    assert newest() == ("alias_removed", "ann", STABLE, 2, {"ended": {"number": 1, "share": 0.5}})


def test_f10_of_promoters_and_roll_outs_with_one_generation_exactly_one_wins(registry: Registry) -> None:
    threads = 8
    for generation in range(1, 16):
        barrier, own = threading.Barrier(threads), stable(registry).number

        def change(
            kind: str, generation: int = generation, barrier: threading.Barrier = barrier, other: int = own % 3 + 1
        ) -> bool:
            barrier.wait()
            expected: dict[str, Any] = {"expected_generation": generation, "actor": "x"}
            try:
                if kind == "move":
                    registry.move_alias(*WHERE, STABLE, other, **expected)
                else:
                    registry.set_candidate(*WHERE, STABLE, Candidate(other, 0.5) if kind == "try" else None, **expected)
            except GenerationMismatch:
                return False
            return True

        with ThreadPoolExecutor(threads) as pool:
            assert list(pool.map(change, random.choices(("move", "try", "end"), k=threads))).count(True) == 1
        alias = stable(registry)
        assert alias.generation == generation + 1
        assert alias.candidate is None or alias.candidate.number != alias.number
