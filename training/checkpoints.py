"""Checkpoints of a run: each is whole or not used, and the last whole ones are kept.

transformers writes a checkpoint's files one by one. A manifest with every file's size and digest, written last and
after the files are on the disk, makes it a complete one; a folder without a manifest is what a killed run left.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.durable import replace_file, sync
from adapters.staging import sha256

MANIFEST = "complete.json"
STATE_FILE = "trainer_state.json"
FOLDER = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: where, after which step, and what the run had counted until then."""

    folder: Path
    step: int
    counted: dict[str, float]
    files: dict[str, dict[str, Any]]

    @property
    def state(self) -> dict[str, Any]:
        """Trainer's state: log history, best validation, callbacks."""
        state: dict[str, Any] = json.loads((self.folder / STATE_FILE).read_bytes())
        return state

    @property
    def is_final(self) -> bool:
        """No step is left: the last one was made, or early stopping ended the run."""
        state = self.state
        control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
        return bool(state["global_step"] >= state["max_steps"] or control.get("should_training_stop"))


def seal(folder: Path, counted: dict[str, float]) -> None:
    """Make the checkpoint in `folder` a complete one; from here on it survives a kill and a power cut."""
    files = {path.name: _described(path) for path in sorted(folder.iterdir()) if path.is_file()}
    body = json.dumps({"counted": counted, "files": files}, indent=2)
    replace_file(folder / MANIFEST, body.encode())
    sync(folder.parent)


def complete(checkpoints: Path) -> list[Checkpoint]:
    """The checkpoints with a manifest whose files have their sizes, newest first."""
    found = [_read(folder) for folder in _folders(checkpoints)]
    return sorted((one for one in found if one is not None), key=lambda one: -one.step)


def last_complete(checkpoints: Path) -> Checkpoint | None:
    """The newest complete checkpoint."""
    return next(iter(complete(checkpoints)), None)


def choose_checkpoint(checkpoints: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose bytes, and those of the best one it counts on, are what was written.

    What is passed over is said, and removed with everything newer than the choice.
    """
    chosen = last_sound(checkpoints)
    by_step = {one.step: one for one in complete(checkpoints)}
    for folder in _folders(checkpoints):
        if chosen is None or _step(folder) > chosen.step:
            if chosen is not None:
                what = "is damaged" if _step(folder) in by_step else "was cut off while it was written"
                say(f"{folder.name} {what}: going on from {chosen.folder.name}, the last whole one")
            _remove(folder)
    return chosen


def last_sound(checkpoints: Path) -> Checkpoint | None:
    """The one that `choose_checkpoint` would choose; nothing is said or removed."""
    candidates = complete(checkpoints)
    by_step = {one.step: one for one in candidates}
    return next((one for one in candidates if _is_sound(one, by_step)), None)


def checkpoint_folders(checkpoints: Path) -> list[tuple[int, Path]]:
    """Every checkpoint that is here, whole or not, with its step, oldest first."""
    return sorted((_step(folder), folder) for folder in _folders(checkpoints))


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all complete checkpoints but the newest `keep`, and those that were the best to each of them."""
    found = complete(checkpoints)
    needed = {step for one in found[:keep] for step in (one.step, one.state.get("best_global_step"))}
    for one in found:
        if one.step not in needed:
            _remove(one.folder)


def is_complete(folder: Path) -> bool:
    return _read(folder) is not None


def _is_sound(one: Checkpoint, by_step: dict[int, Checkpoint]) -> bool:
    if not _has_its_bytes(one):
        return False
    best = one.state.get("best_global_step")
    return best is None or best == one.step or (best in by_step and _has_its_bytes(by_step[best]))


def _has_its_bytes(one: Checkpoint) -> bool:
    return all(sha256(one.folder / name) == file["sha256"] for name, file in one.files.items())


def _read(folder: Path) -> Checkpoint | None:
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        body = json.loads((folder / MANIFEST).read_bytes())
        files, counted = dict(body["files"]), dict(body["counted"])
        if STATE_FILE in files and all((folder / name).stat().st_size == file["bytes"] for name, file in files.items()):
            return Checkpoint(folder, _step(folder), counted, files)
    return None


def _folders(checkpoints: Path) -> list[Path]:
    return [path for path in checkpoints.glob("checkpoint-*") if FOLDER.fullmatch(path.name) and path.is_dir()]


def _step(folder: Path) -> int:
    match = FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else 0


def _remove(folder: Path) -> None:
    """The manifest goes first, so that a half removed folder is no complete one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _described(path: Path) -> dict[str, Any]:
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
