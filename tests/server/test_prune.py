"""`hotshoe prune`: what can be made again or is over goes; versions, files, and whatever is not ours never do."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adapters.bases import BaseModel, load_base
from adapters.database import FILE
from adapters.doctor import run_doctor
from adapters.embedded import EMBEDDED_ID, MADE_BY, MAKER
from adapters.prune import Scope, find, remove
from server.cli.main import build_app
from server.lifecycle import state_lock
from tests.fixtures.old_state import old_state
from tests.fixtures.service import running

DAY = 86400
OLD = time.time() - 90 * DAY


def aged(path: Path, content: bytes | None = b"x", at: float = OLD) -> Path:
    """A file, or a folder with one file where the content is None, of that time."""
    if content is None:
        path.mkdir(parents=True)
        (path / "file").write_bytes(bytes(100))
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    os.utime(path, (at, at))
    return path


def made_base(cache: Path, name: str, marker: dict[str, Any] | None, at: float = OLD, hidden: int = 16) -> Path:
    """A base in the cache, with our provenance or another."""
    folder = cache / "bases" / name
    folder.mkdir(parents=True)
    config = {"architectures": ["Qwen2ForCausalLM"], "hidden_size": hidden, "intermediate_size": 24}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    if marker is not None:
        (folder / MADE_BY).write_text(json.dumps(marker))
        os.utime(folder / MADE_BY, (at, at))
    return folder


@pytest.fixture
def home(tmp_path: Path, tiny_base: BaseModel) -> Path:
    """A sound state with something of every kind that may go, and of every kind that may not."""
    home = tmp_path / "home"
    old_state(home, "0003", tiny_base)
    run_doctor(home)  # migrated, with a copy
    (copy,) = (home / "backups").iterdir()
    aged(home / "backups" / "0002-20250101T000000Z.db")
    os.utime(copy, (OLD + DAY, OLD + DAY))
    ids = {"old": "1" * 24, "young": "2" * 24, "running": "3" * 24}
    with closing(sqlite3.connect(home / FILE)) as connection:
        ends = (("old", "succeeded", OLD), ("young", "succeeded", time.time()), ("running", "running", None))
        for name, status, ended in ends:
            values = (f"export-{ids[name]}", "default", "router@1", "hf", "{}", status, 1.0, OLD, ended)
            query = "INSERT INTO exports (id, tenant, ref, format, options, status, progress, created_at, finished_at)"
            connection.execute(f"{query} VALUES (?,?,?,?,?,?,?,?,?)", values)
        connection.commit()
    for one in (*ids.values(), "4" * 24):
        aged(home / "exports" / f"export-{one}", None)
    aged(home / "exports" / "mine", None)
    aged(home / "exports" / f".export-{'5' * 24}.abc.hotshoe-partial", None)
    aged(home / "blobs" / ".staging" / ("a" * 32), None)
    aged(home / "engine.log")
    aged(home / "engine.log.1")
    aged(home / "engine.log-20250101.gz")
    aged(home / "notes.txt")
    return home


EXPECTED = {
    "backups/0002-20250101T000000Z.db",
    f"exports/export-{'1' * 24}",
    f"exports/export-{'4' * 24}",
    f"exports/.export-{'5' * 24}.abc.hotshoe-partial",
    "engine.log.1",
    "engine.log-20250101.gz",
}


def prune(monkeypatch: pytest.MonkeyPatch, home: Path, *words: str, exit_code: int = 0) -> dict[str, Any]:
    monkeypatch.setenv("HOTSHOE_CACHE", str(home.parent / "cache"))
    result = CliRunner().invoke(build_app(), ["prune", "--home", str(home), "--json", *words])
    assert result.exit_code == exit_code, (result.output, result.exception)
    found: dict[str, Any] = json.loads(result.output)
    return found


def below(found: dict[str, Any], home: Path) -> set[str]:
    return {str(Path(item["path"]).relative_to(home)) for item in found["items"]}


def test_a_dry_run_says_what_would_go_and_removes_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(home.rglob("*"))
    found = prune(monkeypatch, home, "--dry-run")
    assert below(found, home) == EXPECTED | {f"blobs/.staging/{'a' * 32}"}
    assert found["dry_run"] and found["size_bytes"] == sum(item["size_bytes"] for item in found["items"])
    assert all(item["reason"] and item["error"] is None for item in found["items"])
    assert sorted(path for path in home.rglob("*") if path.name != "lock") == [p for p in before if p.name != "lock"]


def test_what_is_over_goes_and_the_state_is_as_sound_and_serves_as_before(
    home: Path, tiny_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(monkeypatch, home)
    assert prune(monkeypatch, home)["items"] == []
    for name in ("notes.txt", "engine.log", "exports/mine", f"exports/export-{'2' * 24}", f"exports/export-{'3' * 24}"):
        assert (home / name).exists(), name
    assert len(list((home / "backups").iterdir())) == 1
    assert run_doctor(home).is_clean
    with closing(sqlite3.connect(home / FILE)) as connection:
        connection.execute("DELETE FROM api_keys")
        connection.execute("UPDATE exports SET status = 'failed' WHERE status = 'running'")
        connection.commit()
    with running(tiny_base, tmp_path, home=home) as server:
        assert server.say("router@2").status_code == 200
        gone = server.http.get(f"/v1/exports/export-{'1' * 24}/content")
        assert gone.status_code == 404 and "export router@1 again" in gone.json()["error"]["message"]


def test_while_a_server_runs_uploads_are_left_alone_and_the_rest_goes(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with state_lock(home):
        found = prune(monkeypatch, home)
    assert below(found, home) == EXPECTED and "A server runs" in found["notes"][0]
    assert (home / "blobs" / ".staging" / ("a" * 32)).exists()


def test_what_is_younger_stays_also_under_a_clock_that_went_back(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prune(monkeypatch, home, "--older-than", "365d")["items"] == []
    assert find(Scope(home, home, OLD - DAY, 30 * DAY, is_alone=True)) == []
    refused = CliRunner().invoke(build_app(), ["prune", "--older-than", "soon"])
    assert "is not an age" in str(refused.exception)


def test_links_are_neither_followed_nor_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, outside = tmp_path / "home", tmp_path / "outside"
    for name in ("exports", "backups", ".staging"):
        aged(outside / name / f"export-{'1' * 24}", None)
        aged(outside / name / "0001-20250101T000000Z.db")
        aged(outside / name / "0002-20250101T000000Z.db")
    home.mkdir()
    (home / "exports").symlink_to(outside / "exports")
    (home / "backups").symlink_to(outside / "backups")
    (home / "engine.log.1").symlink_to(outside / "exports")
    (home / "blobs").mkdir()
    (home / "blobs" / ".staging").symlink_to(outside / ".staging")
    cache = tmp_path / "cache"
    real = made_base(tmp_path / "elsewhere", "old", {"made_by": MAKER})
    (cache / "bases").mkdir(parents=True)
    (cache / "bases" / "old").symlink_to(real)
    before = sorted(outside.rglob("*"))
    assert find(Scope(home, cache, time.time(), 0, is_alone=True)) == []
    (home / "exports").unlink()
    (home / "exports").mkdir()
    (home / "exports" / f"export-{'1' * 24}").symlink_to(outside / "exports")
    inner = aged(home / "exports" / f"export-{'2' * 24}", None)
    (inner / "link").symlink_to(outside)
    os.utime(inner, (OLD, OLD))
    (item,) = find(Scope(home, cache, time.time(), 30 * DAY, is_alone=True))
    assert item.path == inner and remove(item) == ""
    assert sorted(outside.rglob("*")) == before and real.exists()


def test_a_base_goes_only_when_we_made_it_and_nothing_here_needs_or_used_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, home, ours = tmp_path / "cache", tmp_path / "home", {"made_by": MAKER}
    unused = made_base(cache, "unused", ours)
    embedded = made_base(cache, EMBEDDED_ID, ours, hidden=32)
    used = made_base(cache, "used", ours, at=time.time())
    needed = made_base(cache, "needed", ours, hidden=48)
    foreign = made_base(cache, "foreign", {"made_by": "somebody"})
    bare = made_base(cache, "bare", None)
    (cache / "bases" / "broken").mkdir()
    (cache / "bases" / "broken" / MADE_BY).write_text("{")
    left = aged(cache / "bases" / f".{EMBEDDED_ID}-abc", None)
    old_state(home, "0004", load_base(needed))
    scope = Scope(home, cache, time.time(), 30 * DAY)
    assert {item.path for item in find(scope)} == {unused, left}
    elsewhere = Scope(home, cache, time.time(), 30 * DAY, bases=(str(foreign),))
    assert {item.path for item in find(elsewhere)} == {unused, left, embedded}
    monkeypatch.setenv("HOTSHOE_BASE", str(unused))
    assert {item["path"] for item in prune(monkeypatch, home, "--dry-run")["items"]} == {str(left), str(embedded)}
    assert used.exists() and bare.exists()


def test_a_merged_base_goes_when_it_is_old_and_no_server_runs_on_it(tmp_path: Path) -> None:
    names = ("1" * 32, "2" * 32, "3" * 32, f".{'4' * 32}.abc.hotshoe-partial", "somebody-elses")
    unused, held, young, cut_off, foreign = (aged(tmp_path / "merged" / name, None) for name in names)
    os.utime(young)
    handle = os.open(held, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        items = find(Scope(tmp_path / "home", tmp_path, time.time(), 30 * DAY))
    finally:
        os.close(handle)
    assert {item.path: item.kind for item in items} == {unused: "merged base", cut_off: "left-over"}
    assert foreign.exists()


def test_using_the_embedded_base_makes_it_young(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapters import embedded

    folder = made_base(tmp_path, EMBEDDED_ID, embedded._provenance())
    assert embedded.prepare(tmp_path) == folder
    assert (folder / MADE_BY).stat().st_mtime > time.time() - 3600
    assert find(Scope(tmp_path / "home", tmp_path, time.time(), 30 * DAY, bases=("/other",))) == []


def test_an_older_or_newer_or_damaged_registry_is_read_and_not_changed(
    tmp_path: Path, tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    old_state(home, "0001", tiny_base)
    before = (home / FILE).read_bytes()
    aged(home / "exports" / f"export-{'0' * 24}", None)
    with closing(sqlite3.connect(home / FILE)) as connection:
        assert connection.execute("SELECT status FROM exports").fetchall() == [("failed",)]
    assert prune(monkeypatch, home, "--dry-run", "--older-than", "1s")["items"]
    assert (home / FILE).read_bytes() == before
    (home / FILE).write_bytes(b"garbage" * 500)
    result = CliRunner().invoke(build_app(), ["prune", "--home", str(home)])
    assert type(result.exception).__name__ == "StorageDamaged"
    assert (home / "exports" / f"export-{'0' * 24}").exists()


def test_without_any_state_or_cache_there_is_nothing_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prune(monkeypatch, tmp_path / "none") == {"dry_run": False, "size_bytes": 0, "items": [], "notes": []}
    assert not (tmp_path / "none").exists()
    monkeypatch.setenv("HOTSHOE_CACHE", str(tmp_path / "cache"))
    result = CliRunner().invoke(build_app(), ["prune", "--home", str(tmp_path / "none")])
    assert result.output == "0 bytes in 0 things removed\n"


def test_what_would_not_go_is_said_and_the_exit_code_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.rmtree

    def stubborn(path: Any, *rest: Any, **more: Any) -> None:
        if "export-1" in str(path):
            raise OSError(16, "Device or resource busy")
        real(path, *rest, **more)

    monkeypatch.setattr(shutil, "rmtree", stubborn)
    found = prune(monkeypatch, home, exit_code=1)
    (failed,) = [item for item in found["items"] if item["error"]]
    assert failed["error"] == "Device or resource busy" and Path(failed["path"]).exists()
