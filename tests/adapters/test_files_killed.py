"""SIGKILL, a full disk and a broken disk at every system call of a file's life: rows and bytes never disagree."""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from adapters.doctor import run_doctor
from adapters.errors import NotFound, StorageDamaged, StorageFull
from adapters.file_rows import ADAPTER, FileQuery, Owner, UploadStatus
from adapters.file_store import FileStore
from adapters.files import Content, Files, NewFile, NewUpload
from adapters.registry import Registry
from adapters.store import disk_errors
from adapters.types import DEFAULT_TENANT
from tests.adapters.test_killed import needs_ptrace
from tests.fixtures.killing import Fault, Run, run_and_fail, run_and_kill

pytestmark = needs_ptrace
OWNER = Owner(DEFAULT_TENANT, "test")
NEW = NewFile(ADAPTER, "adapter_model.safetensors")
PIECES = (b"first " * 1000, b"second " * 1000, b"third " * 1000)
WHOLE = b"".join(PIECES)
KEPT = b"a file that is there already"
SAMPLE_EVERY = 13
FAULTS = [(number, is_lasting) for number in (errno.ENOSPC, errno.EIO) for is_lasting in (False, True)]


@dataclass(frozen=True)
class Place:
    """A state folder with one file, and an upload that has the first two of its three parts."""

    home: Path
    file_id: str = ""
    upload_id: str = ""

    def open(self) -> Files:
        return Files(Registry.open(self.home), FileStore(self.home / "files"))

    def copy(self, to: Path) -> Place:
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(self.home, to)
        return Place(to, self.file_id, self.upload_id)


@dataclass(frozen=True)
class Scenario:
    """What the child does, and what must hold afterwards, however far it came."""

    act: Callable[[Place], object]
    holds: Callable[[Place, Run], None]


def staged(files: Files, data: bytes) -> Content:
    folder = files.store.stage()
    with disk_errors(folder):
        (folder / "content").write_bytes(data)
    return Content(folder / "content", len(data), f"sha256:{hashlib.sha256(data).hexdigest()}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    home = tmp_path_factory.mktemp("files-killed") / "home"
    files = Place(home).open()
    file = files.add(OWNER, NEW, staged(files, KEPT))
    digest = f"sha256:{hashlib.sha256(WHOLE).hexdigest()}"
    upload = files.begin(OWNER, NewUpload(NEW, "x/y", len(WHOLE), digest))
    for piece in PIECES[:2]:
        files.add_part(OWNER, upload.id, staged(files, piece))
    files.registry.close()
    files.sweep()
    return Place(home, file.id, upload.id)


def contents(files: Files) -> list[bytes]:
    return [files.store.path(file.id).read_bytes() for file in files.registry.files(OWNER, FileQuery())]


def act_add(place: Place) -> None:
    files = place.open()
    files.add(OWNER, NEW, staged(files, WHOLE))


def added_or_not(place: Place, run: Run) -> None:
    files = place.open()
    found = contents(files)
    assert found in ([WHOLE, KEPT], [KEPT])
    assert len(found) == 2 or not run.acknowledged
    files.add(OWNER, NEW, staged(files, WHOLE))  # a retry always succeeds
    files.registry.close()


def act_remove(place: Place) -> None:
    place.open().remove(OWNER, place.file_id)


def removed_or_not(place: Place, run: Run) -> None:
    files = place.open()
    found = contents(files)
    assert found in ([KEPT], [])
    assert not found or not run.acknowledged
    files.registry.close()


def act_part(place: Place) -> None:
    files = place.open()
    files.add_part(OWNER, place.upload_id, staged(files, PIECES[2]))


def part_is_there_or_not(place: Place, run: Run) -> None:
    files = place.open()
    parts = files.registry.parts(place.upload_id)
    assert len(parts) in (2, 3)
    assert len(parts) == 3 or not run.acknowledged
    sent = {files.add_part(OWNER, place.upload_id, staged(files, piece)).id for piece in PIECES}
    assert sent >= {part.id for part in parts} and len(sent) == 3, "who goes on sends no part twice"
    files.registry.close()


def act_complete(place: Place) -> None:
    files = place.open()
    third = files.add_part(OWNER, place.upload_id, staged(files, PIECES[2]))
    files.complete(OWNER, place.upload_id, [*ids_of(files, place)[:2], third.id])


def completed_or_open(place: Place, run: Run) -> None:
    files = place.open()
    upload = files.registry.get_upload(OWNER, place.upload_id)
    found = contents(files)
    if upload.status is UploadStatus.COMPLETED:
        assert found == [WHOLE, KEPT]
        assert files.open(OWNER, upload.file_id or "")[1].read_bytes() == WHOLE
    else:
        assert upload.status is UploadStatus.PENDING and found == [KEPT] and not run.acknowledged
        ids = [files.add_part(OWNER, place.upload_id, staged(files, piece)).id for piece in PIECES]
        files.complete(OWNER, place.upload_id, ids)  # nothing that was sent is lost
    assert contents(files) == [WHOLE, KEPT]
    files.registry.close()


def act_cancel(place: Place) -> None:
    place.open().cancel(OWNER, place.upload_id)


def cancelled_or_open(place: Place, run: Run) -> None:
    files = place.open()
    upload = files.registry.get_upload(OWNER, place.upload_id)
    assert upload.status in (UploadStatus.PENDING, UploadStatus.CANCELLED)
    assert len(files.registry.parts(place.upload_id)) == (2 if upload.status is UploadStatus.PENDING else 0)
    assert upload.status is UploadStatus.CANCELLED or not run.acknowledged
    files.registry.close()


def ids_of(files: Files, place: Place) -> list[str]:
    """The parts that are there, in the order of the pieces."""
    digests = [f"sha256:{hashlib.sha256(piece).hexdigest()}" for piece in PIECES]
    parts = sorted(files.registry.parts(place.upload_id), key=lambda part: digests.index(part.digest))
    return [part.id for part in parts]


SCENARIOS = {
    "add a file": Scenario(act_add, added_or_not),
    "delete a file": Scenario(act_remove, removed_or_not),
    "add a part": Scenario(act_part, part_is_there_or_not),
    "complete an upload": Scenario(act_complete, completed_or_open),
    "cancel an upload": Scenario(act_cancel, cancelled_or_open),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_f1_a_kill_at_sampled_calls_leaves_rows_and_files_in_agreement(place: Place, tmp_path: Path, name: str) -> None:
    assert kill_everywhere(place, name, tmp_path, SAMPLE_EVERY) >= 15


@pytest.mark.long
@pytest.mark.parametrize("name", SCENARIOS)
def test_f1_a_kill_at_every_call_leaves_rows_and_files_in_agreement(place: Place, tmp_path: Path, name: str) -> None:
    calls = kill_everywhere(place, name, tmp_path, 1)
    print(f"{name}: killed at each of {calls} calls")


@pytest.mark.parametrize("name", SCENARIOS)
def test_f7_f8_a_disk_that_fails_at_sampled_calls_is_said_and_leaves_nothing_half(
    place: Place, tmp_path: Path, name: str
) -> None:
    fail_everywhere(place, name, tmp_path, FAULTS[1:3], 2 * SAMPLE_EVERY)


@pytest.mark.long
@pytest.mark.parametrize("name", SCENARIOS)
def test_f7_f8_a_disk_that_fails_at_every_call_is_said_and_leaves_nothing_half(
    place: Place, tmp_path: Path, name: str
) -> None:
    fail_everywhere(place, name, tmp_path, FAULTS, 1)


def kill_everywhere(place: Place, name: str, folder: Path, step: int) -> int:
    whole = run(place, name, folder, None)
    assert whole.acknowledged
    for kill_at in sorted({*range(0, len(whole.calls), step), len(whole.calls) - 1}):
        assert run(place, name, folder, Fault(kill_at)).was_killed
    return len(whole.calls)


def fail_everywhere(place: Place, name: str, folder: Path, faults: list[tuple[int, bool]], step: int) -> None:
    calls = len(run(place, name, folder, None).calls)
    for number, is_lasting in faults:
        for at in range(0, calls, step):
            failed = run(place, name, folder, Fault(at, number, is_lasting))
            told = (StorageFull.__name__, StorageDamaged.__name__)  # SQLite does not always say which
            assert failed.acknowledged or failed.error in told, failed


def run(place: Place, name: str, folder: Path, fault: Fault | None) -> Run:
    """One run on a copy of the state, what must hold after it, and after the sweep of the next start."""
    copy, scenario = place.copy(folder / "home"), SCENARIOS[name]
    if fault is None or fault.number is None:
        outcome = run_and_kill(lambda: scenario.act(copy), None if fault is None else fault.at)
    else:
        outcome = run_and_fail(lambda: scenario.act(copy), fault)
    report = run_doctor(copy.home)
    assert report.is_sound, (fault, outcome, report.lines())
    scenario.holds(copy, outcome)
    swept = copy.open()
    swept.sweep()
    swept.registry.close()
    report = run_doctor(copy.home)
    assert report.is_clean, (fault, outcome, report.lines())
    return outcome


def test_what_a_sweep_keeps_is_what_has_a_row(place: Place, tmp_path: Path) -> None:
    copy = place.copy(tmp_path / "home")
    files = copy.open()
    (files.store.root / ("file-" + "0" * 24)).write_bytes(b"x")
    (files.store.root / ".parts" / copy.upload_id / ("part_" + "0" * 24)).write_bytes(b"x")
    (files.store.root / ".parts" / ("upload_" + "0" * 24)).mkdir()
    files.store.stage()
    assert len(files.sweep()) == 4 and files.sweep() == []
    assert contents(files) == [KEPT] and len(ids_of(files, copy)) == 2
    with pytest.raises(NotFound):
        files.store.path("../registry.sqlite3")
