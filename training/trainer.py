"""From a chat file to an adapter folder: read, render, choose settings, train with transformers' Trainer, save, card.

`train(config)` is the whole of it. Nothing is left behind but the finished folder: PEFT's two files, `card.json` and
the TensorBoard log. A run that fails leaves none.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import ConfigInvalid, StorageFull
from training.callbacks import Curve, Guard, Meter, Progress, Recorder
from training.card import make_card, write_card
from training.config import Settings, TrainingConfig, choose
from training.material import Material, announcement, facts, gather
from training.saving import save_adapter
from training.staging import staged

CHECKPOINTS = "checkpoints"  # inside the staging folder, gone when the run ends


@dataclass(frozen=True)
class TrainingResult:
    """A finished run: the adapter's folder and its card."""

    folder: Path
    card: dict[str, Any]

    @property
    def metrics(self) -> dict[str, Any]:
        """Losses, steps and curve, as in the card."""
        result: dict[str, Any] = self.card["result"]
        return result


@dataclass
class Run:
    """One run: what it was asked, what it uses, and what came of it so far. `started` is on the monotonic clock."""

    config: TrainingConfig
    settings: Settings
    material: Material
    started: float
    curve: Curve = field(default_factory=Curve)
    meter: Meter = field(default_factory=Meter)
    model: Any = None  # a PeftModel; after training with its best adapter
    state: Any = None  # Trainer's, after training

    def train(self, folder: Path, progress: Progress) -> None:
        """Load the model and train it; working files go into `folder`."""
        from training.run import build_trainer

        callbacks = [Recorder(self.curve), Guard(), progress]
        trainer = build_trainer(self.config, self.settings, self.material, folder, self.meter, callbacks)
        try:
            trainer.train()
        finally:
            progress.close()
        self.model, self.state = trainer.model, trainer.state


def train(config: TrainingConfig, say: Callable[[str], None] | None = None) -> TrainingResult:
    """Train an adapter into `config.output`, which then holds it whole. Lines about it go to `say`, or to stderr.

    Raises OutputExists, AlreadyRunning, ConfigInvalid, DataInvalid (with every bad row), BaseInvalid, AdapterRefused
    for an initial adapter that does not fit, TrainingStopped when the run diverged, StorageFull.
    """
    started = time.monotonic()
    _one_process()
    with _full_disk_named(), staged(config.output) as folder:
        material = gather(config)
        settings = choose(_with_initial_shape(config), facts(material))
        run = Run(config, settings, material, started)
        progress = Progress(run.meter, say)
        progress.say(announcement(config, material, settings))
        run.train(folder, progress)
        save_adapter(run.model, folder, config.base)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        card = make_card(run, folder)
        write_card(folder, card)
    return TrainingResult(config.output, card)


@contextmanager
def _full_disk_named() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
            raise StorageFull(
                f"The disk is full: {error}. Nothing was saved; make room or choose another --out."
            ) from error
        raise


def _one_process() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigInvalid("WORLD_SIZE is above 1: training runs on one GPU; start it without torchrun or accelerate.")


def _with_initial_shape(config: TrainingConfig) -> TrainingConfig:
    """The config with the rank and alpha of the adapter that it goes on from."""
    if config.initial_adapter is None:
        return config
    from training.model import with_initial_shape

    return with_initial_shape(config)
