"""A watched folder: what counts as an adapter, when it counts as written, and what a link may not reach."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from adapters.bases import BaseModel
from adapters.errors import AdapterRefused, InvalidRequest, NotFound, PayloadTooLarge, SourceChanged, SourceUnavailable
from adapters.sources.folder import WAIT_FOR_REST_SECONDS, WatchedFolder
from adapters.sources.found import Stopped, check_fetchable
from tests.fixtures.adapters import CONFIG_FILE, WEIGHTS_FILE, write_adapter

STOP = threading.Event()


@pytest.fixture
def root(tmp_path: Path, tiny: BaseModel) -> Path:
    write_adapter(tmp_path / "root" / "router", tiny)
    return tmp_path / "root"


@pytest.fixture
def taken(tmp_path: Path) -> Path:
    (tmp_path / "taken").mkdir()
    return tmp_path / "taken"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_with_both_files_is_an_adapter_and_nothing_else_is(root: Path, tiny: BaseModel, taken: Path) -> None:
    (root / "empty").mkdir()
    (root / "half").mkdir()
    (root / "half" / CONFIG_FILE).write_text("{}")
    (root / "a-file").write_text("")
    write_adapter(root / ".hidden", tiny)
    (root / "router" / "optimizer.pt").write_bytes(b"left where it lies")
    source = WatchedFolder(root)
    [found] = source.look()
    assert (found.name, found.location) == ("router", f"file://{root}/router")
    source.fetch(found, taken, STOP)
    assert names(taken) == [CONFIG_FILE, WEIGHTS_FILE]
    assert (taken / WEIGHTS_FILE).read_bytes() == (root / "router" / WEIGHTS_FILE).read_bytes()


def test_a_fingerprint_changes_with_a_file_and_only_then(root: Path, tiny: BaseModel) -> None:
    source = WatchedFolder(root)
    first = source.look()[0].fingerprint
    (root / "router" / "notes.txt").write_text("beside")
    assert source.look()[0].fingerprint == first
    write_adapter(root / "router", tiny, seed=2)
    assert source.look()[0].fingerprint != first


def test_weights_shorter_than_their_header_are_waited_for_and_refused_when_nobody_writes_any_more(
    root: Path, taken: Path
) -> None:
    weights = root / "router" / WEIGHTS_FILE
    whole = weights.read_bytes()
    source = WatchedFolder(root)
    for length in (0, 4, 100, len(whole) - 1):
        weights.write_bytes(whole[:length])
        with pytest.raises(SourceChanged, match="still being written"):
            source.fetch(source.find("router"), taken, STOP)
        for path in taken.iterdir():
            path.unlink()
    old = time.time() - WAIT_FOR_REST_SECONDS - 1
    os.utime(weights, (old, old))
    source.fetch(source.find("router"), taken, STOP)


def test_a_file_that_changes_after_it_was_found_is_not_taken(root: Path, tiny: BaseModel, taken: Path) -> None:
    source = WatchedFolder(root)
    found = source.find("router")
    write_adapter(root / "router", tiny, seed=2)
    with pytest.raises(SourceChanged):
        source.fetch(found, taken, STOP)


def test_a_link_out_of_the_root_leads_nowhere(root: Path, tiny: BaseModel, tmp_path: Path) -> None:
    outside = write_adapter(tmp_path / "outside", tiny)
    (root / "linked").symlink_to(outside)
    (root / "inside").mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (root / "inside" / name).symlink_to(outside / name)
    source = WatchedFolder(root)
    found = {one.name: one for one in source.look()}
    assert not found["linked"].files and not found["inside"].files
    for name in ("linked", "inside"):
        with pytest.raises(AdapterRefused, match="leads out of the source"):
            check_fetchable(found[name], 1 << 30, 1 << 20)


def test_a_link_inside_the_root_is_followed_as_a_hub_cache_needs_it(root: Path, tiny: BaseModel, taken: Path) -> None:
    blobs = write_adapter(root / "blobs", tiny, seed=3)
    (root / "snapshot").mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (root / "snapshot" / name).symlink_to(Path("..") / "blobs" / name)
    source = WatchedFolder(root)
    source.fetch(source.find("snapshot"), taken, STOP)
    assert (taken / WEIGHTS_FILE).read_bytes() == (blobs / WEIGHTS_FILE).read_bytes()


def test_a_link_put_there_after_the_look_is_not_followed(
    root: Path, tiny: BaseModel, tmp_path: Path, taken: Path
) -> None:
    secret = tmp_path / "secret"
    source = WatchedFolder(root)
    found = source.find("router")
    weights = root / "router" / WEIGHTS_FILE
    weights.rename(secret)
    weights.symlink_to(secret)  # the same inode, size and time: only where it lies tells
    with pytest.raises(SourceChanged):
        source.fetch(found, taken, STOP)
    assert WEIGHTS_FILE not in names(taken)


def test_a_pipe_or_a_folder_in_a_files_place_holds_nobody_up(root: Path) -> None:
    weights = root / "router" / WEIGHTS_FILE
    weights.unlink()
    os.mkfifo(weights)
    [found] = WatchedFolder(root).look()
    assert "not a regular file" in found.problem
    weights.unlink()
    weights.mkdir()
    [found] = WatchedFolder(root).look()
    assert "not a regular file" in found.problem


@pytest.mark.parametrize(
    "path", ["/etc", "relative", "{root}x/router", "{root}/../outside", "file://elsewhere{root}/router", "{root}/a\0b"]
)
def test_a_path_outside_is_nothing_of_the_source(root: Path, path: str) -> None:
    assert WatchedFolder(root).inner(path.replace("{root}", str(root))) is None


def test_a_path_inside_is_found_by_any_of_its_spellings(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    source = WatchedFolder(tmp_path / "link")
    for text in (f"{root}/router", f"{tmp_path}/link/router/", f"file://{root}/router", f"{root}//./router"):
        assert source.inner(text) == "router", text
    assert source.find("router").is_adapter
    with pytest.raises(InvalidRequest):
        source.inner(str(root))
    for inner in ("absent", "router/adapter_config.json", "a" * 3000):
        with pytest.raises(NotFound):
            source.find(inner)


def test_a_root_that_is_not_there_is_told_as_that(tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailable, match="No such file"):
        WatchedFolder(tmp_path / "unmounted").look()


def test_sizes_and_missing_files_are_refused_before_a_byte_is_copied(root: Path, tiny: BaseModel) -> None:
    source = WatchedFolder(root)
    found = source.find("router")
    size = (root / "router" / WEIGHTS_FILE).stat().st_size
    check_fetchable(found, size, 1 << 20)
    with pytest.raises(PayloadTooLarge, match=f"{size} bytes; at most {size - 1}"):
        check_fetchable(found, size - 1, 1 << 20)
    with pytest.raises(PayloadTooLarge):
        check_fetchable(found, size, 10)
    (root / "router" / WEIGHTS_FILE).rename(root / "router" / "adapter_model.bin")
    with pytest.raises(AdapterRefused) as caught:
        check_fetchable(source.find("router"), size, 1 << 20)
    assert caught.value.problems[0].code == "format_not_allowed"
    assert source.look() == []


def test_fetching_ends_when_the_server_does(root: Path, taken: Path) -> None:
    source, stop = WatchedFolder(root), threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        source.fetch(source.find("router"), taken, stop)
