"""SIGKILL at every system call of a checkpoint that changes the disk: it is whole or unused, and one is always left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.fixtures.killing import Run, run_and_kill, why_not_here
from training.checkpoints import STATE_FILE, choose_checkpoint, last_sound, prune, seal

pytestmark = pytest.mark.skipif(bool(why_not_here()), reason=why_not_here() or "ptrace works here")
KEPT = 1


def save(checkpoints: Path, step: int) -> None:
    """What the trainer does after a step: its files one by one, the manifest, then the checkpoints before go."""
    folder = checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(bytes([step]) * 3000)
    (folder / "optimizer.pt").write_bytes(bytes([step]) * 5000)
    (folder / STATE_FILE).write_text(json.dumps({"global_step": step, "max_steps": 9, "best_global_step": step}))
    seal(folder, {"tokens": float(step)})
    prune(checkpoints, KEPT)


def killed_at(before: Path, place: Path, call: int | None) -> Run:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(before, place)
    return run_and_kill(lambda: save(place, 4), call)


def test_f5_a_checkpoint_killed_at_every_system_call_is_whole_or_the_one_before_is_gone_on_from(tmp_path: Path) -> None:
    before, place = tmp_path / "before", tmp_path / "place"
    save(before, 2)
    whole = killed_at(before, place, None)
    assert whole.acknowledged and len(whole.calls) > 15
    seen = set()
    for call in range(len(whole.calls)):
        assert killed_at(before, place, call).was_killed
        found = last_sound(place)
        assert found is not None and found.counted == {"tokens": float(found.step)}
        content = {path.name: path.read_bytes() for path in found.folder.iterdir() if path.suffix != ".json"}
        assert content["optimizer.pt"] == bytes([found.step]) * 5000
        seen.add(found.step)
        said: list[str] = []
        assert choose_checkpoint(place, said.append) == found
        assert {path.name for path in place.iterdir()} <= {"checkpoint-2", "checkpoint-4"}
        assert found.step == 4 or not (place / "checkpoint-4").exists()
    assert seen == {2, 4}
