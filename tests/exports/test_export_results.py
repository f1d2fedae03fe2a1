"""Results of exports on the disk: what nobody needs goes, and what somebody reads goes after him."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adapters.errors import NotFound
from server.export_results import Results

A, B, C = (f"export-{letter * 24}" for letter in "abc")


@pytest.fixture
def results(tmp_path: Path) -> Results:
    one = Results(tmp_path / "exports")
    one.open()
    return one


def made(results: Results, *names: str) -> None:
    for name in names:
        place = results.place(name)
        for folder in (place.out, place.work):
            folder.mkdir()
            (folder / "manifest.json").write_text("{}")
        place.spec.write_text("{}")
        place.log.write_text("")


def names(results: Results) -> set[str]:
    return {path.name for path in results.root.iterdir()}


def sweep(results: Results, waited: set[str], kept: set[str]) -> None:
    with results.lock:
        assert results.set_aside(waited, kept) == kept - names(results)
    results.clear()


def test_results_stay_for_orders_that_have_them_and_work_for_orders_that_wait(results: Results) -> None:
    made(results, A, B, C)
    (results.root / "mine").mkdir()
    (results.root / ".mine.work").mkdir()
    sweep(results, {A}, {B})
    assert names(results) == {A, f".{A}.work", f".{A}.json", f".{A}.log", B, "mine", ".mine.work"}
    sweep(results, set(), {C})
    assert names(results) == {"mine", ".mine.work"}


def test_what_is_read_can_be_read_to_its_end_after_it_went_and_its_name_is_free_at_once(results: Results) -> None:
    made(results, A)
    with results.reading(A) as folder:
        sweep(results, set(), set())
        with pytest.raises(NotFound), results.reading(A):
            pass
        made(results, A)
        sweep(results, set(), {A})
        assert len(names(results)) == 2, "the new one, and the old one that is read"
        assert os.stat("manifest.json", dir_fd=folder).st_size == 2
    sweep(results, set(), {A})
    assert names(results) == {A}


def test_a_start_removes_what_a_killed_server_left_of_work_that_nobody_waits_for(results: Results) -> None:
    made(results, A, B)
    (results.root / f".{C}.0123456789ab.gone").mkdir()
    (results.root / f".{C}.spec.json").write_text("{}")
    (results.root / f".{A}.0123456789ab.hotshoe-partial").mkdir()
    started = Results(results.root)
    started.open()
    sweep(started, {A}, set())
    assert names(results) == {A, f".{A}.work", f".{A}.json", f".{A}.log"}


def test_a_result_is_whole_with_its_manifest_and_every_file_in_its_size(results: Results) -> None:
    made(results, A)
    assert results.is_whole(A, {}) and not results.is_whole(B, {})
    (results.place(A).out / "config.json").write_bytes(b"12345")
    assert results.is_whole(A, {"config.json": {"size_bytes": 5}})
    assert not results.is_whole(A, {"config.json": {"size_bytes": 6}})
    assert not results.is_whole(A, {"other.json": {"size_bytes": 5}})
