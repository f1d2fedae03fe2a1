"""A backup is one moment of the state, taken while a server writes it; what is restored from it is whole and serves."""

from __future__ import annotations

import errno
import io
import json
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

from adapters.backup import MANIFEST, back_up, read_manifest
from adapters.bases import BaseModel
from adapters.database import FILE, HEAD
from adapters.doctor import run_doctor
from adapters.errors import (
    AlreadyRunning,
    HotshoeError,
    InvalidRequest,
    OutputExists,
    StateNewer,
    StorageDamaged,
)
from adapters.publish import PublishContext, publish, remove_files
from adapters.registry import RESTORING, Registry
from adapters.restore import restore
from adapters.store import BlobStore
from adapters.types import DEFAULT_TENANT, STABLE, VersionStatus
from server.cli.main import run
from server.lifecycle import state_lock
from server.residency import key_of
from tests.fixtures.adapters import write_adapter
from tests.fixtures.killing import Fault, run_and_fail, run_and_kill, why_not_here
from tests.fixtures.old_state import KEY, old_state
from tests.fixtures.processes import HOTSHOE, environment
from tests.fixtures.service import Server, eventually, running

needs_ptrace = pytest.mark.skipif(bool(why_not_here()), reason=why_not_here() or "ptrace works here")
SAMPLE_EVERY = 11


@pytest.fixture(scope="module")
def state(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound state folder with two ready versions, a key and a sent file; nobody runs on it."""
    scratch = tmp_path_factory.mktemp("state")
    with running(tiny_base, scratch) as server:
        for _ in range(2):
            server.pushed("router")
        server.http.post("/v1/files", data={"purpose": "evals"}, files={"file": ("rows.jsonl", b"{}\n")})
    return scratch / "home"


def command(*words: str) -> subprocess.CompletedProcess[str]:
    """The `hotshoe` command, in this process: a second quicker than one of its own."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with patch.object(sys, "argv", ["hotshoe", *words]), redirect_stdout(out), redirect_stderr(err):
        try:
            run()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return subprocess.CompletedProcess(list(words), code, out.getvalue(), err.getvalue())


def test_a_backup_under_a_load_of_pushes_promotes_and_retires_restores_to_a_server_that_answers(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    stop = threading.Event()
    with running(tiny_base, tmp_path) as server:
        key = server.http.post("/v1/keys", json={"scopes": ["admin"]}).json()["key"]
        server.http.headers["authorization"] = f"Bearer {key}"
        server.pushed("router")
        threads = [threading.Thread(target=churn, args=(server, key, name, stop)) for name in ("router", "other")]
        for thread in threads:
            thread.start()
        try:
            for number in range(5):
                assert back_up(tmp_path / "home", tmp_path / "copy").backup.damaged == []
                assert restore(tmp_path / "copy", tmp_path / f"restored{number}").report.is_clean
            words = [*HOTSHOE, "backup", "--home", str(tmp_path / "home"), "--out", str(tmp_path / "copy")]
            subprocess.run(words, check=True, timeout=120, env=environment())  # from a process of its own
        finally:
            stop.set()
            for thread in threads:
                thread.join(30)
    home = tmp_path / "restored"
    back = command("restore", str(tmp_path / "copy"), "--home", str(home), "--json")
    assert back.returncode == 0 and json.loads(back.stdout)["findings"] == [], back.stdout + back.stderr
    with running(tiny_base, tmp_path / "second", home=home) as second:
        assert second.http.get("/v1/models").status_code == 401
        second.http.headers["authorization"] = f"Bearer {key}"
        versions = second.http.get("/v1/adapters/router").json()["versions"]
        for one in versions:
            if one["status"] == "ready":
                assert second.say(one["id"]).json()["model"] == one["id"]
        assert second.say("router").status_code == 200
        assert second.pushed("router")["version"] == len(versions) + 1


def churn(server: Server, key: str, name: str, stop: threading.Event) -> None:
    """Push, promote, and retire what is no longer named, until told to stop: blobs come and go."""
    import httpx

    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {key}"}, timeout=60) as http:
        while not stop.is_set():
            folder = server.adapter()
            parts = {
                part: (file, (folder / file).read_bytes())
                for part, file in (("config", "adapter_config.json"), ("weights", "adapter_model.safetensors"))
            }
            answer = http.post("/v1/adapters", data={"name": name}, files=parts, params={"wait": 20})
            number = answer.json()["version"]
            http.put(f"/v1/adapters/{name}/aliases/stable", json={"version": number})
            for one in range(max(1, number - 2), number):
                http.delete(f"/v1/adapters/{name}/versions/{one}")


def test_a_version_that_is_retired_while_its_files_wait_to_be_copied_is_retired_in_the_copy_too(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    registry, store = Registry.open(tmp_path / "home"), BlobStore(tmp_path / "home" / "blobs")
    context = PublishContext(registry, store, tiny_base, max_rank=64)
    for number in range(1, 26):
        folder = write_adapter(tmp_path / f"source{number}", tiny_base, seed=number)
        publish(folder, "router", context=context)
    last = sorted(registry.versions(DEFAULT_TENANT, "router"), key=lambda version: version.digest or "", reverse=True)
    was_seen = False
    for number, version in enumerate(last[:8]):
        out = tmp_path / f"copy{number}"
        registry.set_status(*key_of(version), VersionStatus.READY)
        registry.remove_alias(*key_of(version)[:2], STABLE, actor="x")
        with ThreadPoolExecutor(1) as pool:
            copying = pool.submit(back_up, tmp_path / "home", out)
            eventually(lambda folder=out: any((folder / "blobs").glob("[0-9a-f]*")))  # type: ignore[misc]
            registry.retire(*key_of(version))
            remove_files(registry, store, version.digest or "")
            made = copying.result()
        assert made.backup.damaged == []
        assert restore(out, tmp_path / f"new{number}").report.is_clean
        was_seen |= version.digest not in made.backup.blobs
    assert was_seen
    registry.close()


def test_a_second_backup_into_the_same_folder_copies_only_what_is_new_and_drops_what_is_not_needed(
    state: Path, tmp_path: Path
) -> None:
    home, out = tmp_path / "home", tmp_path / "copy"
    shutil.copytree(state, home)
    first = back_up(home, out)
    assert (len(first.backup.blobs), len(first.backup.files), first.copied) == (2, 1, 5)
    assert back_up(home, out).copied == 0
    registry = Registry.open(home)
    registry.retire(DEFAULT_TENANT, "router", 2)
    registry.close()
    third = back_up(home, out)
    assert (len(third.backup.blobs), third.copied) == (1, 0)
    assert len(list((out / "blobs").glob("[0-9a-f]*"))) == 1
    assert len(list(out.glob("registry-*"))) == 1
    assert restore(out, tmp_path / "new").report.is_clean


def test_a_tar_holds_the_same_and_is_restored_too(state: Path, tmp_path: Path) -> None:
    made = command("backup", "--home", str(state), "--out", str(tmp_path / "state.tar"))
    assert made.returncode == 0 and "keep the backup as secret" in made.stdout, made.stderr
    assert (tmp_path / "state.tar").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["state.tar"]
    back = command("restore", str(tmp_path / "state.tar"), "--home", str(tmp_path / "new"))
    assert back.returncode == 0 and "sound; 2 versions, 2 blobs" in back.stdout, back.stderr
    assert (tmp_path / "new" / "pepper").read_bytes() == (state / "pepper").read_bytes()
    with pytest.raises(OutputExists):
        back_up(state, tmp_path / "state.tar")


def test_without_the_pepper_it_says_what_that_means_and_a_later_backup_takes_it_away(
    state: Path, tmp_path: Path
) -> None:
    back_up(state, tmp_path / "copy")
    made = command("backup", "--home", str(state), "--out", str(tmp_path / "copy"), "--without-pepper")
    assert made.returncode == 0 and "no key that was made opens anything" in made.stdout
    assert not (tmp_path / "copy" / "pepper").exists()
    back = command("restore", str(tmp_path / "copy"), "--home", str(tmp_path / "new"))
    assert back.returncode == 0 and "HOTSHOE_KEY_PEPPER" in back.stdout
    assert not (tmp_path / "new" / "pepper").exists()


def test_parts_of_an_open_upload_and_exports_are_left_out_and_nothing_in_the_copy_refers_to_them(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    with running(tiny_base, tmp_path) as server:
        body = {"purpose": "adapter", "filename": "f", "bytes": 9, "mime_type": "m"}
        upload = server.http.post("/v1/uploads", json=body).json()["id"]
        part = server.http.post(f"/v1/uploads/{upload}/parts", files={"data": ("d", b"four")})
        assert part.status_code == 200, part.text
        back_up(tmp_path / "home", tmp_path / "copy")
        assert server.http.get(f"/v1/uploads/{upload}").json()["status"] == "pending"
    assert restore(tmp_path / "copy", tmp_path / "new").report.is_clean
    with closing(sqlite3.connect(tmp_path / "new" / FILE)) as connection:
        assert connection.execute("SELECT status FROM uploads").fetchall() == [("expired",)]
        assert connection.execute("SELECT count(*) FROM upload_parts").fetchone() == (0,)


@pytest.mark.parametrize("schema", ["0001", "0003"])
def test_a_state_of_an_older_release_is_backed_up_as_it_is_and_migrated_where_it_is_restored(
    tmp_path: Path, tiny_base: BaseModel, schema: str
) -> None:
    old_state(tmp_path / "home", schema, tiny_base)
    before = (tmp_path / "home" / FILE).read_bytes()
    assert back_up(tmp_path / "home", tmp_path / "copy").backup.schema == schema
    assert (tmp_path / "home" / FILE).read_bytes() == before
    assert restore(tmp_path / "copy", tmp_path / "new").report.is_clean
    with running(tiny_base, tmp_path, home=tmp_path / "new") as server:
        if schema >= "0002":
            assert server.http.get("/v1/models").status_code == 401
            server.http.headers["authorization"] = f"Bearer {KEY}"
        assert server.say("router@2").status_code == 200


def test_a_damaged_blob_is_named_and_everything_else_is_in_the_backup(state: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(state, home)
    flip(next((home / "blobs").glob("[0-9a-f]*/adapter_model.safetensors")))
    missing = tmp_path / "missing"
    shutil.copytree(state, missing)
    shutil.rmtree(next((missing / "blobs").glob("[0-9a-f]*")))
    for number, one in enumerate((home, missing)):
        made = command("backup", "--home", str(one), "--out", str(tmp_path / f"copy{number}"))
        assert made.returncode == 3 and "DAMAGED and left out: sha256:" in made.stderr
        assert len(read_manifest(tmp_path / f"copy{number}").blobs) == 1
        back = command("restore", str(tmp_path / f"copy{number}"), "--home", str(tmp_path / f"new{number}"))
        assert back.returncode == 3 and "blob_missing" in back.stdout  # what the state lacked, the doctor says


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.mark.parametrize("victim", ["blobs/*/adapter_config.json", "files/file-*", "registry-*.sqlite3"])
@pytest.mark.parametrize("is_gone", [True, False])
def test_a_backup_whose_bytes_changed_is_refused_whole_and_leaves_the_new_folder_empty(
    state: Path, tmp_path: Path, victim: str, is_gone: bool
) -> None:
    back_up(state, tmp_path / "copy")
    path = next((tmp_path / "copy").glob(victim))
    flip(path)
    if is_gone:
        path.unlink()
    with pytest.raises(StorageDamaged, match="Nothing was restored"):
        restore(tmp_path / "copy", made(tmp_path / "new"))
    assert list((tmp_path / "new").iterdir()) == []


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("manifest", "error"),
    [
        ("", InvalidRequest),
        ("[]", InvalidRequest),
        ('{"made_by": "somebody"}', InvalidRequest),
        ({"registry": "../../etc/passwd"}, InvalidRequest),
        ({"files": {"../x": "sha256:0"}}, InvalidRequest),
        ({"files": {"mine": "sha256:0"}}, HotshoeError),
        ({"blobs": ["sha256:.."]}, HotshoeError),
        ({"format": 2}, InvalidRequest),
        ({"schema": "9999"}, StateNewer),
    ],
)
def test_what_is_no_backup_or_a_hostile_one_is_refused_and_nothing_is_written(
    state: Path, tmp_path: Path, manifest: str | dict[str, object], error: type[HotshoeError]
) -> None:
    back_up(state, tmp_path / "copy")
    path = tmp_path / "copy" / MANIFEST
    text = manifest if isinstance(manifest, str) else json.dumps(json.loads(path.read_bytes()) | manifest)
    path.write_text(text)
    with pytest.raises(error):
        restore(tmp_path / "copy", made(tmp_path / "new"))
    assert list((tmp_path / "new").iterdir()) == []


def test_a_tar_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        archive.add(tmp_path / "x", "../../outside")
    with pytest.raises(InvalidRequest):
        restore(tmp_path / "evil.tar", made(tmp_path / "new"))
    (tmp_path / "no.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(InvalidRequest):
        restore(tmp_path / "no.tar", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.tar", "new", "no.tar", "x"]


def test_restore_refuses_a_folder_in_use_or_with_anything_in_it(state: Path, tmp_path: Path) -> None:
    back_up(state, tmp_path / "copy")
    made(tmp_path / "full").joinpath("notes.txt").write_text("mine")
    refused = command("restore", str(tmp_path / "copy"), "--home", str(tmp_path / "full"))
    assert refused.returncode == 1 and "output_exists" in refused.stderr and "notes.txt" in refused.stderr
    with state_lock(tmp_path / "used"):
        refused = command("restore", str(tmp_path / "copy"), "--home", str(tmp_path / "used"))
    assert refused.returncode == 1 and "already_running" in refused.stderr
    assert command("restore", str(tmp_path / "copy"), "--home", str(state)).returncode == 1
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_backup_refuses_a_place_that_is_not_its_own(state: Path, tmp_path: Path) -> None:
    made(tmp_path / "full").joinpath("notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    for out in (tmp_path / "full", tmp_path / "link", tmp_path / "full" / "notes.txt"):
        with pytest.raises(OutputExists):
            back_up(state, out)
    for out in (state, state / "copy", state / "blobs"):
        with pytest.raises(InvalidRequest):
            back_up(state, out)
    with pytest.raises(InvalidRequest):
        back_up(tmp_path / "nothing", tmp_path / "copy")
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_two_backups_into_one_folder_do_not_meet(state: Path, tmp_path: Path) -> None:
    import fcntl
    import os

    handle = os.open(made(tmp_path / "copy"), os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(AlreadyRunning):
            back_up(state, tmp_path / "copy")
    finally:
        os.close(handle)
    back_up(state, tmp_path / "copy")


def test_the_stopped_folder_copied_as_it_is_serves_too(state: Path, tiny_base: BaseModel, tmp_path: Path) -> None:
    shutil.copytree(state, tmp_path / "home")
    assert run_doctor(tmp_path / "home").is_clean
    with running(tiny_base, tmp_path, home=tmp_path / "home") as server:
        assert server.say("router").json()["model"] == "router@1"


@pytest.fixture
def old_copy(state: Path, tmp_path: Path) -> Iterator[Path]:
    """A backup of the state as it was before its second version, to be brought up to date."""
    home = tmp_path / "before"
    shutil.copytree(state, home)
    registry = Registry.open(home)
    registry.retire(DEFAULT_TENANT, "router", 2)
    registry.close()
    back_up(home, tmp_path / "old")
    yield tmp_path / "old"


def kill_backup(state: Path, old: Path, tmp_path: Path, step: int) -> None:
    """A backup that is cut off leaves the one before it, or itself; and the next one succeeds."""

    def fresh() -> Path:
        out = tmp_path / "killed"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(old, out)
        return out

    everywhere(lambda: back_up(state, tmp_path / "killed"), fresh, lambda: holds(state, tmp_path), step)


def holds(state: Path, tmp_path: Path) -> None:
    for again in (False, True):
        if again:
            back_up(state, tmp_path / "killed")
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        restored = restore(tmp_path / "killed", made(tmp_path / "new"))
        assert restored.report.is_clean and restored.report.versions == 2


def kill_restore(state: Path, tmp_path: Path, step: int) -> None:
    """A restore that is cut off is no state, and the same restore begins again."""
    back_up(state, tmp_path / "copy")
    new = tmp_path / "new"

    def fresh() -> Path:
        shutil.rmtree(new, ignore_errors=True)
        return made(new)

    def check() -> None:
        if (new / RESTORING).exists():
            with pytest.raises(StorageDamaged, match="cut off"):
                Registry.open(new)
        if not (new / FILE).exists() or (new / RESTORING).exists():
            assert restore(tmp_path / "copy", new).report.is_clean
        assert run_doctor(new).is_clean and Registry.open(new).adapters(DEFAULT_TENANT) == ["router"]

    everywhere(lambda: restore(tmp_path / "copy", new), fresh, check, step)


def everywhere(act: Callable[[], object], fresh: Callable[[], Path], check: Callable[[], None], step: int) -> None:
    fresh()
    whole = run_and_kill(act, None)
    check()
    assert len(whole.calls) > 20
    for kill_at in sorted({*range(0, len(whole.calls), step), *range(len(whole.calls) - 4, len(whole.calls))}):
        fresh()
        assert run_and_kill(act, kill_at).was_killed
        check()


@needs_ptrace
def test_a_kill_at_sampled_calls_of_backup_and_restore_leaves_what_can_be_gone_on_with(
    state: Path, old_copy: Path, tmp_path: Path
) -> None:
    kill_backup(state, old_copy, tmp_path, SAMPLE_EVERY)
    kill_restore(state, tmp_path, SAMPLE_EVERY)


@needs_ptrace
def test_f7_a_disk_that_is_full_keeps_the_backup_before_and_leaves_nothing_half_restored(
    state: Path, old_copy: Path, tmp_path: Path
) -> None:
    def fresh() -> Path:
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        shutil.copytree(old_copy, tmp_path / "killed")
        return tmp_path / "killed"

    calls = len(run_and_kill(lambda: back_up(state, fresh()), None).calls)
    for at in range(0, calls, SAMPLE_EVERY):
        fresh()
        run = run_and_fail(lambda: back_up(state, tmp_path / "killed"), Fault(at, errno.ENOSPC, is_lasting=True))
        # SQLite tells a write's ENOSPC, but of a journal only that it could not be opened or synced; whether that is a
        # full disk the file system is asked, and this one has room.
        is_vague = bool({*run.calls[at : at + 1]} & {"open", "fsync", "fdatasync", "unlink"})
        assert run.error in ("StorageFull", "", *(("StorageDamaged",) if is_vague else ())), run
        holds(state, tmp_path)
    new = tmp_path / "full"
    calls = len(run_and_kill(lambda: restore(tmp_path / "killed", made(new)), None).calls)
    for at in range(1, calls, SAMPLE_EVERY):
        shutil.rmtree(new)
        new.mkdir()
        run = run_and_fail(lambda: restore(tmp_path / "killed", new), Fault(at, errno.ENOSPC, is_lasting=True))
        assert run.error in ("StorageFull", ""), run
        if run.error and not (new / FILE).exists():
            assert list(new.iterdir()) == []


@needs_ptrace
@pytest.mark.long
def test_a_kill_at_every_call_of_backup_and_restore_leaves_what_can_be_gone_on_with(
    state: Path, old_copy: Path, tmp_path: Path
) -> None:
    kill_backup(state, old_copy, tmp_path, 1)
    kill_restore(state, tmp_path, 1)


def test_the_schema_in_the_manifest_is_the_newest(state: Path, tmp_path: Path) -> None:
    assert back_up(state, tmp_path / "copy").backup.schema == HEAD
