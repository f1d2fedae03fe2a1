"""The registry on real SQLite: numbers, statuses, aliases under races, events with every change, keys, exports."""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from adapters import database, schema
from adapters.errors import (
    Conflict,
    GenerationMismatch,
    IdempotencyReused,
    ModelNotFound,
    NameInvalid,
    NotServable,
    Problem,
    RegistryBusy,
    StateNewer,
    StorageDamaged,
)
from adapters.registry import NewVersion, Registry
from adapters.types import DEFAULT_TENANT, STABLE, AdapterRef, AdapterVersion, VersionStatus

WHERE = (DEFAULT_TENANT, "router")


@pytest.fixture
def registry(tmp_path: Path) -> Any:
    opened = Registry.open(tmp_path / "home")
    yield opened
    opened.close()


def add(registry: Registry, digit: int, **changes: Any) -> AdapterVersion:
    digest = "sha256:" + f"{digit:x}".rjust(64, "0")
    return registry.add_version(NewVersion(**{"name": "router", "digest": digest, "base_digest": "b", **changes}))


def ready(registry: Registry, count: int) -> None:
    for number in range(1, count + 1):
        add(registry, number)
        registry.set_status(*WHERE, number, VersionStatus.READY)


def resolved(registry: Registry, text: str) -> str:
    return registry.resolve(AdapterRef.parse(text)).ref


def test_versions_count_from_one_and_the_first_ready_one_becomes_stable(registry: Registry) -> None:
    assert [add(registry, digit).number for digit in (1, 2)] == [1, 2]
    with pytest.raises(ModelNotFound):
        resolved(registry, "router")
    registry.set_status(*WHERE, 2, VersionStatus.READY, proof={"moved": 0.5})
    assert resolved(registry, "router") == "router@2"
    registry.set_status(*WHERE, 1, VersionStatus.READY)
    assert resolved(registry, "router") == "router@2"  # later ones wait for a promote
    assert registry.get(*WHERE, 2).proof == {"moved": 0.5}
    assert registry.status_counts()[VersionStatus.READY] == 2


def test_u26_the_same_files_again_are_the_same_version_and_other_files_under_its_number_a_conflict(
    registry: Registry,
) -> None:
    first = add(registry, 1)
    again = add(registry, 1)
    assert (first.is_new, again.is_new, again.number) == (True, False, 1)
    assert add(registry, 1, number=1).number == 1
    with pytest.raises(Conflict):
        add(registry, 2, number=1)
    with pytest.raises(Conflict):
        add(registry, 2, number=3)
    assert add(registry, 2, number=2).number == 2
    assert add(registry, 1, base_digest="other").number == 3  # checked against another base it is another version


def test_a_retired_versions_files_may_come_back_under_a_new_number(registry: Registry) -> None:
    ready(registry, 2)
    registry.move_alias(*WHERE, STABLE, 2, expected_generation=None, actor="x")
    registry.retire(*WHERE, 1)
    assert add(registry, 1).number == 3


def test_u7_names_are_checked_and_unique_regardless_of_case(registry: Registry) -> None:
    for name in (
        "..",
        "a/../b",
        "%2e%2e",
        "a\0b",
        "a\r\nb",
        "\u202eevil",
        "x" * 300,
        "-lead",
        "e\u0301",
        "é",
        "",
        "a b",
    ):
        with pytest.raises(NameInvalid):
            add(registry, 1, name=name)
    add(registry, 1)
    with pytest.raises(Conflict, match="differs only in case"):
        add(registry, 1, name="Router")
    with pytest.raises(ModelNotFound):
        registry.get(DEFAULT_TENANT, "ROUTER", 1)


@pytest.mark.parametrize("end", [VersionStatus.REJECTED, VersionStatus.RETIRED])
def test_rejected_and_retired_are_final(registry: Registry, end: VersionStatus) -> None:
    add(registry, 1)
    if end is VersionStatus.RETIRED:
        registry.set_status(*WHERE, 1, VersionStatus.EXPORT_ONLY)
    problem = Problem("load_failed", "weights", "did not load")
    registry.set_status(*WHERE, 1, end, reasons=(problem,))
    assert registry.get(*WHERE, 1).reasons == (problem.as_dict(),)
    for status in set(VersionStatus) - {end}:
        with pytest.raises(Conflict, match="it is final"):
            registry.set_status(*WHERE, 1, status)


def test_a_version_that_killed_the_engine_can_be_quarantined_again(registry: Registry) -> None:
    ready(registry, 1)
    registry.set_warm(*WHERE, 1, True)
    assert registry.set_status(*WHERE, 1, VersionStatus.QUARANTINED).is_warm is False
    assert [version.ref for version in registry.quarantined()] == ["router@1"]


def test_promote_compares_and_swaps_and_remembers_where_it_was(registry: Registry) -> None:
    ready(registry, 3)
    assert registry.move_alias(*WHERE, STABLE, 2, expected_generation=1, actor="x").generation == 2
    with pytest.raises(GenerationMismatch, match="generation 2, not 1"):
        registry.move_alias(*WHERE, STABLE, 3, expected_generation=1, actor="x")
    moved = registry.move_alias(*WHERE, STABLE, 3, expected_generation=None, actor="x")
    assert (moved.number, moved.generation, moved.previous) == (3, 3, (2, 1))
    assert registry.move_alias(*WHERE, STABLE, 3, expected_generation=None, actor="x") == moved  # nothing to do
    canary = registry.move_alias(*WHERE, "canary", 1, expected_generation=0, actor="x")
    assert (canary.generation, resolved(registry, "router@canary")) == (1, "router@1")
    with pytest.raises(GenerationMismatch):
        registry.move_alias(*WHERE, "canary", 2, expected_generation=0, actor="x")
    with pytest.raises(Conflict):
        registry.move_alias(*WHERE, "7", 1, expected_generation=None, actor="x")


def test_only_ready_versions_can_be_promoted(registry: Registry) -> None:
    ready(registry, 1)
    add(registry, 2)
    add(registry, 3, status=VersionStatus.EXPORT_ONLY)
    for number in (2, 3):
        with pytest.raises(NotServable):
            registry.move_alias(*WHERE, STABLE, number, expected_generation=None, actor="x")
    with pytest.raises(ModelNotFound):
        registry.move_alias(*WHERE, STABLE, 9, expected_generation=None, actor="x")


def test_rollback_returns_to_the_newest_earlier_version_that_is_still_ready(registry: Registry) -> None:
    ready(registry, 3)
    for number in (2, 3):
        registry.move_alias(*WHERE, STABLE, number, expected_generation=None, actor="x")
    registry.retire(*WHERE, 2)
    back = registry.rollback(*WHERE, actor="x")
    assert (back.number, back.generation, back.previous) == (1, 4, ())
    with pytest.raises(Conflict, match="no earlier version"):
        registry.rollback(*WHERE, actor="x")
    assert registry.move_alias(*WHERE, STABLE, 3, expected_generation=4, actor="x").number == 3


def test_a_version_an_alias_points_at_cannot_be_retired(registry: Registry) -> None:
    ready(registry, 2)
    with pytest.raises(Conflict, match="is stable: promote another"):
        registry.retire(*WHERE, 1)
    registry.remove_alias(*WHERE, STABLE, actor="x")
    assert registry.retire(*WHERE, 1).status is VersionStatus.RETIRED
    assert registry.retire(*WHERE, 1).status is VersionStatus.RETIRED  # again is the same
    assert registry.digests_in_use() == {registry.get(*WHERE, 2).digest}


def race(registry: Registry, promoters: int, threads: int) -> list[list[str]]:
    """Rounds of promoters that all expect the same generation; per round the outcomes."""
    rounds = []
    for generation in range(1, promoters // threads + 1):
        barrier = threading.Barrier(threads)

        def promote(number: int, generation: int = generation, barrier: threading.Barrier = barrier) -> str:
            barrier.wait()
            try:
                registry.move_alias(*WHERE, STABLE, number, expected_generation=generation, actor=f"p{number}")
            except GenerationMismatch:
                return "lost"
            return "won"

        with ThreadPoolExecutor(threads) as pool:
            rounds.append(list(pool.map(promote, [random.randint(1, 3) for _ in range(threads)])))
    return rounds


def test_f10_of_racing_promoters_exactly_one_wins_each_generation(registry: Registry) -> None:
    ready(registry, 3)
    assert [outcomes.count("won") for outcomes in race(registry, 80, threads=8)] == [1] * 10
    assert registry.aliases(*WHERE)[0].generation == 11


@pytest.mark.long
def test_f10_a_thousand_racing_promoters(registry: Registry) -> None:
    ready(registry, 3)
    assert [outcomes.count("won") for outcomes in race(registry, 1000, threads=10)] == [1] * 100


def test_numbers_stay_whole_when_many_threads_add_at_once(registry: Registry) -> None:
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda digit: add(registry, digit), range(1, 25)))
    assert sorted(version.number for version in versions) == list(range(1, 25))


def test_agreement_with_peft_is_kept_with_the_proof_that_it_is_of_and_goes_with_it(registry: Registry) -> None:
    here = {"is_proven": True, "code": "proven", "engine_version": "vLLM 1", "shows": ["effect"]}
    add(registry, 1)
    registry.note_agreement(*WHERE, 1, {"max_abs": 1e-5}, actor="exports")
    assert registry.get(*WHERE, 1).proof is None, "there is no proof that it could belong to"
    registry.set_status(*WHERE, 1, VersionStatus.READY, proof=here)
    registry.note_agreement(*WHERE, 1, {"max_abs": 1e-5}, actor="exports")
    assert registry.get(*WHERE, 1).proof == {**here, "shows": ["effect", "agreement"], "peft": {"max_abs": 1e-5}}
    assert registry.events(DEFAULT_TENANT, "router")[0].kind == "agreement_noted"
    there = {**here, "engine_version": "vLLM 2"}
    registry.renew_proof(*WHERE, 1, there, actor="prover")
    assert registry.get(*WHERE, 1).proof == there


def test_f14_a_locked_database_is_busy_after_the_wait_and_says_when_to_retry(tmp_path: Path) -> None:
    Registry.open(tmp_path).close()
    impatient = Registry(database.Database(tmp_path / database.FILE, busy_seconds=0.2))
    other = sqlite3.connect(tmp_path / database.FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    with pytest.raises(RegistryBusy) as caught:
        add(impatient, 1)
    assert time.monotonic() - started < 5
    assert caught.value.retry_after_seconds == 1
    assert impatient.adapters(DEFAULT_TENANT) == []  # reads go on
    other.close()
    assert add(impatient, 1).number == 1
    impatient.close()


def test_two_processes_worth_of_registries_see_each_others_changes(tmp_path: Path) -> None:
    one, two = Registry.open(tmp_path), Registry.open(tmp_path)
    ready(one, 2)
    two.move_alias(*WHERE, STABLE, 2, expected_generation=1, actor="two")
    assert resolved(one, "router") == "router@2"
    one.close()
    two.close()


def test_engine_ids_are_one_per_version_and_a_burnt_one_never_returns(registry: Registry) -> None:
    ready(registry, 2)
    ids = [registry.engine_id(*WHERE, 1), registry.engine_id(*WHERE, 1), registry.engine_id(*WHERE, 2)]
    assert ids == [1, 1, 2]
    assert registry.burn_engine_id(*WHERE, 1) == 3
    assert registry.engine_id(*WHERE, 1) == 3
    with registry.database.writing() as connection:
        connection.execute(text("UPDATE versions SET engine_id = NULL"))
        connection.execute(text("DELETE FROM engine_ids"))
    assert registry.engine_id(*WHERE, 1) == 4  # not even when its rows are gone


def test_the_warm_set_is_of_ready_versions(registry: Registry) -> None:
    ready(registry, 2)
    add(registry, 3)
    registry.set_warm(*WHERE, 2, True)
    assert [version.ref for version in registry.warm_set()] == ["router@2"]
    with pytest.raises(NotServable):
        registry.set_warm(*WHERE, 3, True)
    registry.retire(*WHERE, 2)
    assert registry.warm_set() == []


def test_tenants_do_not_see_each_other(registry: Registry) -> None:
    ready(registry, 1)
    add(registry, 1, tenant="acme")
    assert registry.adapters("acme") == ["router"]
    assert [version.tenant for version in registry.versions("acme", "router")] == ["acme"]
    with pytest.raises(ModelNotFound):
        registry.resolve(AdapterRef.parse("router", tenant="acme"))
    with pytest.raises(ModelNotFound):
        registry.versions("nobody", "router")
    assert registry.events("nobody") == []


def test_every_change_writes_its_event_and_a_refused_one_writes_none(registry: Registry) -> None:
    ready(registry, 2)
    registry.move_alias(*WHERE, STABLE, 2, expected_generation=1, actor="ann")
    with pytest.raises(GenerationMismatch):
        registry.move_alias(*WHERE, STABLE, 1, expected_generation=1, actor="ben")
    registry.rollback(*WHERE, actor="ann")
    registry.set_warm(*WHERE, 1, True)
    registry.retire(*WHERE, 2)
    events = registry.events(*WHERE)
    assert [event.kind for event in events] == [
        *("retired", "warmed", "rolled_back", "promoted", "status_changed", "version_added"),
        *("promoted", "status_changed", "version_added"),
    ]
    promoted = events[3]
    assert (promoted.actor, promoted.alias, promoted.number, promoted.detail) == (
        *("ann", STABLE, 2),
        {"from": 1, "generation": 2},
    )
    assert registry.events(*WHERE, before=events[-2].id) == events[-1:]


def test_an_idempotency_key_gives_the_first_answer_and_refuses_another_request(registry: Registry) -> None:
    assert registry.recall(DEFAULT_TENANT, "key", "hash") is None
    registry.remember(DEFAULT_TENANT, "key", "hash", {"status": 201})
    registry.remember(DEFAULT_TENANT, "key", "hash", {"status": 200})
    assert registry.recall(DEFAULT_TENANT, "key", "hash") == {"status": 201}
    assert registry.recall("acme", "key", "hash") is None
    with pytest.raises(IdempotencyReused):
        registry.recall(DEFAULT_TENANT, "key", "other")
    with registry.database.writing() as connection:
        connection.execute(text("UPDATE idempotency_keys SET created_at = created_at - 90000"))
    assert registry.recall(DEFAULT_TENANT, "key", "other") is None


def test_the_database_is_opened_with_the_settings_that_make_it_durable(registry: Registry) -> None:
    with registry.database.reading() as connection:
        settings = [connection.execute(text(f"PRAGMA {name}")).scalar() for name in
                    ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")]  # fmt: skip
    assert settings == ["delete", 3, 1, 4000]


def test_migrations_give_the_schema_and_opening_again_changes_nothing(tmp_path: Path) -> None:
    registry = Registry.open(tmp_path)
    with registry.database.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
        assert database.revision(connection) == database.HEAD
    registry.close()
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).with_name("migrations")))
    config.set_main_option("path_separator", "os")
    assert ScriptDirectory.from_config(config).get_current_head() == database.HEAD
    before = (tmp_path / database.FILE).read_bytes()
    Registry.open(tmp_path).close()
    assert (tmp_path / database.FILE).read_bytes() == before


def test_a_registry_of_a_newer_version_or_of_garbage_is_not_touched(tmp_path: Path) -> None:
    registry = Registry.open(tmp_path)
    with registry.database.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    registry.close()
    with pytest.raises(StateNewer, match="newer release"):
        Registry.open(tmp_path)
    (tmp_path / database.FILE).write_bytes(b"not a database at all" * 100)
    with pytest.raises(StorageDamaged, match="hotshoe doctor"):
        Registry.open(tmp_path)


def test_many_first_starts_at_once_make_one_schema(tmp_path: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        registries = list(pool.map(lambda _: Registry.open(tmp_path), range(6)))
    assert add(registries[0], 1).number == 1
    for registry in registries:
        registry.close()
