"""Checkpoints that may go: never one that `--resume` needs, never of a run that goes on, never what we did not make."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from adapters.errors import ConfigInvalid
from adapters.prune import remove
from training.checkpoints import choose_checkpoint, seal
from training.staging import Staging, lock_run, staging_folder
from training.tidy import find_checkpoints

LATER = time.time() + 90 * 86400


def run_of(out: Path, *steps: int, best: int | None = None) -> Staging:
    """What a run into `out` that was cut off left, with a whole checkpoint after each of the steps."""
    staging = Staging(staging_folder(out))
    staging.checkpoints.mkdir(parents=True)
    staging.identity.write_text("{}")
    for step in steps:
        folder = staging.checkpoints / f"checkpoint-{step}"
        folder.mkdir()
        state = {"global_step": step, "max_steps": 100, "best_global_step": best}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        (folder / "weights.bin").write_bytes(bytes(1000))
        seal(folder, {})
    return staging


def prunable(runs: Path, now: float = LATER, days: int = 30) -> dict[str, str]:
    return {str(item.path.relative_to(runs)): item.kind for item in find_checkpoints(runs, now, days * 86400)}


def test_of_a_run_that_was_cut_off_the_last_checkpoint_and_the_best_it_counts_on_stay(tmp_path: Path) -> None:
    staging = run_of(tmp_path / "router", 10, 20, 30, 40, best=20)
    (staging.checkpoints / "checkpoint-50").mkdir()  # a kill while it was written
    found = prunable(tmp_path)
    assert found == {f".router.partial/checkpoints/checkpoint-{step}": "checkpoint" for step in (10, 30, 50)}
    for item in find_checkpoints(tmp_path, LATER, 0):
        assert item.size_bytes == 0 or item.size_bytes > 1000
        assert remove(item) == ""
    chosen = choose_checkpoint(staging.checkpoints, lambda line: None)
    assert chosen is not None and chosen.step == 40
    assert prunable(tmp_path) == {}


def test_a_damaged_newest_checkpoint_is_not_the_one_that_is_kept(tmp_path: Path) -> None:
    staging = run_of(tmp_path / "router", 10, 20)
    (staging.checkpoints / "checkpoint-20" / "weights.bin").write_bytes(bytes(999) + b"x")
    assert prunable(tmp_path) == {".router.partial/checkpoints/checkpoint-20": "checkpoint"}


def test_of_a_finished_run_and_of_one_without_a_whole_checkpoint_all_goes(tmp_path: Path) -> None:
    run_of(tmp_path / "done", 10)
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "adapter_config.json").write_text("{}")
    run_of(tmp_path / "deep" / "early")
    assert prunable(tmp_path) == {".done.partial": "run", "deep/.early.partial": "run"}
    for item in find_checkpoints(tmp_path, LATER, 0):
        assert remove(item) == ""
    assert (tmp_path / "done" / "adapter_config.json").exists()
    assert not (tmp_path / ".done.partial").exists()


def test_a_run_that_goes_on_and_a_young_one_are_left_alone(tmp_path: Path) -> None:
    run_of(tmp_path / "router", 10, 20)
    with lock_run(tmp_path / "router"):
        assert prunable(tmp_path) == {}
    assert prunable(tmp_path, now=time.time()) == {}
    assert prunable(tmp_path, now=time.time() - 3600) == {}  # a clock that went back
    assert len(prunable(tmp_path)) == 1


def test_what_we_did_not_make_and_what_is_a_link_is_left_alone(tmp_path: Path) -> None:
    trl = tmp_path / "trl" / "checkpoint-10"
    trl.mkdir(parents=True)
    (trl / "trainer_state.json").write_text("{}")
    (tmp_path / ".mine.partial" / "checkpoints" / "checkpoint-1").mkdir(parents=True)  # no run.json
    outside = tmp_path / "outside"
    shutil.copytree(run_of(outside / "x", 10, 20).root, outside / "copy")
    runs = tmp_path / "runs"
    linked = run_of(runs / "linked", 10, 20)
    shutil.rmtree(linked.checkpoints)
    linked.checkpoints.symlink_to(outside / "copy" / "checkpoints")
    planted = run_of(runs / "planted", 10, 20)
    (planted.checkpoints / "checkpoint-99").symlink_to(outside / "copy" / "checkpoints" / "checkpoint-20")
    (runs / ".z.partial").symlink_to(outside / ".x.partial")
    assert prunable(runs) == {}
    shutil.rmtree(outside / ".x.partial")
    assert prunable(tmp_path) == {}


def test_a_folder_that_is_swapped_for_a_link_before_it_goes_stays(tmp_path: Path) -> None:
    staging = run_of(tmp_path / "runs" / "router", 10, 20)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    for item in find_checkpoints(tmp_path / "runs", LATER, 0):
        shutil.rmtree(item.path)
        item.path.symlink_to(precious)
        assert remove(item) == "is a link now"
    assert (precious / "file").read_text() == "mine" and staging.root.exists()
    assert (staging.checkpoints / "checkpoint-10").readlink() == precious


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid):
        list(find_checkpoints(tmp_path / "nothing", LATER, 0))
