"""SIGKILL at every system call of a checkpoint that changes the disk: it is whole or unused, and one is always left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from tests.fixtures.killing import Run, run_and_kill, why_not_here
from training.baseline import report
from training.callbacks import Live, Meter
from training.checkpoints import STATE_FILE, choose_checkpoint, last_sound, prune, seal
from training.verdict.rows import RowFiles

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


def keep_losses(folder: Path, step: int) -> Path:
    RowFiles(folder).write(0, [float(step)] * 900)
    return folder / "rows-0.json"


def keep_report(folder: Path, step: int) -> Path:
    report.write(folder / "report.json", {"kind": report.KIND, "format": report.FORMAT, "rows": [step] * 900})
    return folder / "report.json"


def take_back_lines(folder: Path, step: int) -> Path:
    live = Live(folder / "metrics.jsonl", Meter())
    if step == 0:
        live.file.write_text("".join(json.dumps({"step": made}) + "\n" for made in range(9)))
    else:
        live.on_train_begin(TrainingArguments(), TrainerState(global_step=step), TrainerControl())
    return live.file


@pytest.mark.parametrize("write", [keep_losses, keep_report, take_back_lines])
def test_a_file_of_a_run_that_is_killed_while_it_is_replaced_is_the_old_one_or_the_new(
    write: Callable[[Path, int], Path], tmp_path: Path
) -> None:
    old = write(tmp_path, 0).read_bytes()
    new = write(tmp_path, 3).read_bytes()
    write(tmp_path, 0)
    calls = run_and_kill(lambda: write(tmp_path, 3), None).calls
    renamed = next(place for place, name in enumerate(calls) if name.startswith("rename"))
    assert "fsync" in calls[:renamed] and "fsync" in calls[renamed:]
    seen = set()
    for call in range(len(calls)):
        file = write(tmp_path, 0)
        assert run_and_kill(lambda: write(tmp_path, 3), call).was_killed
        seen.add(file.read_bytes())
    assert seen == {old, new} and old != new
