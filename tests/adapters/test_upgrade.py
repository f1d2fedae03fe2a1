"""An older state folder is copied, then migrated, and loses nothing; a newer one is left alone; kills leave either."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text

from adapters import database
from adapters.bases import BaseModel
from adapters.doctor import run_doctor
from adapters.errors import StateNewer, StorageFull
from adapters.registry import Registry
from adapters.types import DEFAULT_TENANT, AdapterRef
from adapters.upgrade import FOLDER, KEPT, copies_in, put_aside
from tests.fixtures.killing import Fault, Run, run_and_fail, run_and_kill, why_not_here
from tests.fixtures.old_state import OLD, at_schema, old_state, rows_of

needs_ptrace = pytest.mark.skipif(bool(why_not_here()), reason=why_not_here() or "ptrace works here")


def schema_of(path: Path) -> str:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        return str(connection.execute("SELECT version_num FROM alembic_version").fetchone()[0])


def rows(path: Path) -> dict[str, list[tuple[object, ...]]]:
    with closing(sqlite3.connect(path)) as connection:
        return rows_of(connection)


def digests(home: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in home.rglob("*") if path.is_file()}


@pytest.mark.parametrize("schema", OLD)
def test_a_state_of_every_older_schema_is_copied_and_migrated_with_every_row(
    tmp_path: Path, tiny: BaseModel, schema: str
) -> None:
    home = tmp_path / "home"
    before = old_state(home, schema, tiny)
    assert set(before) >= {"versions", "aliases", "events", "exports"} and all(before[name] for name in ("versions",))
    registry = Registry.open(home)
    assert registry.upgrade is not None
    assert (registry.upgrade.from_schema, registry.upgrade.to_schema) == (schema, database.HEAD)
    assert registry.resolve(AdapterRef.parse("router")).ref == "router@1"
    split = registry.split(AdapterRef.parse("router"))
    assert [alias.previous for alias in registry.aliases(DEFAULT_TENANT)] == [(2,)]
    assert (split.candidate is not None) == (schema >= "0003")
    assert registry.get(DEFAULT_TENANT, "router", 2).engine_deaths == (1 if schema >= "0003" else 0)
    registry.close()
    after = rows(home / database.FILE)
    for table, old in before.items():  # later columns are new ones at the end of a row, or null
        assert [row[: len(old[0])] for row in after[table]] == old if old else after[table] == [], table
    (copy,) = copies_in(home / FOLDER)
    assert copy == registry.upgrade.backup and copy.stat().st_mode & 0o777 == 0o600
    assert (schema_of(copy), rows(copy)) == (schema, before)
    assert run_doctor(home).is_clean
    again = Registry.open(home)
    assert again.upgrade is None and copies_in(home / FOLDER) == [copy]
    again.close()


def test_the_copy_put_back_is_the_older_state_again(tmp_path: Path, tiny: BaseModel) -> None:
    home = tmp_path / "home"
    before = old_state(home, "0003", tiny)
    Registry.open(home).close()
    (copy,) = copies_in(home / FOLDER)
    shutil.copyfile(copy, home / database.FILE)
    assert (schema_of(home / database.FILE), rows(home / database.FILE)) == ("0003", before)
    Registry.open(home).close()
    assert len(copies_in(home / FOLDER)) == 2


def test_a_few_copies_are_kept_and_the_new_one_always_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_schema(tmp_path / database.FILE, "0001")
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "0001-20360101T000000Z.db").write_bytes(b"of a clock ten years ahead")
    (tmp_path / FOLDER / "mine.db").write_bytes(b"not ours")
    (tmp_path / FOLDER / ".0001-20200101T000000Z.db.partial").write_bytes(b"half")
    for _ in range(KEPT + 2):
        assert put_aside(tmp_path / database.FILE, "0001").exists()
    names = [path.name for path in copies_in(tmp_path / FOLDER)]
    assert len(names) == KEPT and names[-1] == "0001-20360101T000000Z.db"
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == [*names, "mine.db"]


@pytest.mark.parametrize("schema", ["9999", "0006-dev", "abcdef012345"])
def test_a_state_of_a_newer_release_is_refused_with_both_schemas_and_nothing_is_touched(
    tmp_path: Path, tiny: BaseModel, schema: str
) -> None:
    home = tmp_path / "home"
    old_state(home, "0004", tiny)
    Registry.open(home).close()
    with closing(sqlite3.connect(home / database.FILE)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (schema,))
        connection.commit()
    before = digests(home)
    with pytest.raises(StateNewer) as caught:
        Registry.open(home)
    assert schema in caught.value.message and database.HEAD in caught.value.message
    assert "newer" in caught.value.message and "hotshoe restore" in caught.value.message
    report = run_doctor(home, repair=True)
    assert [finding.code for finding in report.findings] == ["registry_newer"] and not report.is_sound
    assert digests(home) == before


def test_without_room_for_the_copy_nothing_is_migrated(tmp_path: Path, tiny: BaseModel) -> None:
    home = tmp_path / "home"
    before = old_state(home, "0002", tiny)
    if why_not_here():
        pytest.skip(why_not_here())
    run = run_and_fail(lambda: Registry.open(home), Fault(at=3, number=28, is_lasting=True))
    assert run.error == StorageFull.__name__
    assert (schema_of(home / database.FILE), rows(home / database.FILE)) == ("0002", before)
    Registry.open(home).close()
    assert schema_of(home / database.FILE) == database.HEAD


@needs_ptrace
def test_a_kill_at_sampled_system_calls_of_copy_and_migration_leaves_the_old_or_the_new(
    tmp_path: Path, tiny: BaseModel
) -> None:
    assert kill_everywhere(tmp_path, tiny, "0003", step=7) > 20


@needs_ptrace
@pytest.mark.long
@pytest.mark.parametrize("schema", OLD)
def test_a_kill_at_every_system_call_of_copy_and_migration_leaves_the_old_or_the_new(
    tmp_path: Path, tiny: BaseModel, schema: str
) -> None:
    assert kill_everywhere(tmp_path, tiny, schema, step=1) > 20


def kill_everywhere(tmp_path: Path, base: BaseModel, schema: str, step: int) -> int:
    source = tmp_path / "source"
    before = old_state(source, schema, base)
    whole = killed(tmp_path, source, schema, before, None)
    assert whole.acknowledged
    for kill_at in sorted({*range(0, len(whole.calls), step), len(whole.calls) - 1}):
        assert killed(tmp_path, source, schema, before, kill_at).was_killed
    return len(whole.calls)


def killed(tmp_path: Path, source: Path, schema: str, before: object, kill_at: int | None) -> Run:
    """One migration of a copy of the state, cut off; then all that must hold."""
    home = tmp_path / "killed"
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(source, home)
    run = run_and_kill(lambda: Registry.open(home), kill_at)
    found = schema_of(home / database.FILE)
    assert found == database.HEAD if run.acknowledged else found in (schema, database.HEAD)
    if found == schema:
        assert rows(home / database.FILE) == before
    else:
        (copy,) = copies_in(home / FOLDER)
        assert (schema_of(copy), rows(copy)) == (schema, before)
    for copy in copies_in(home / FOLDER):
        assert rows(copy) == before  # what has its name is whole
    registry = Registry.open(home)
    assert registry.resolve(AdapterRef.parse("router")).ref == "router@1"
    with registry.database.reading() as connection:
        assert connection.execute(text("PRAGMA foreign_key_check")).all() == []
    registry.close()
    assert run_doctor(home).is_clean
    return run
