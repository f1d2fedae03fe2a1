"""From a data file to an adapter folder: read, render, choose settings, train with transformers' Trainer, save, card.

`train(config)` is the whole of it. Nothing is left behind but the finished folder: PEFT's two files (or a base of its
own from full fine-tuning), `card.json`, the TensorBoard log and `metrics.jsonl`. A run that fails leaves none; one that
was cut off leaves its checkpoints, for `resume`.
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

from adapters.errors import ConfigInvalid, StorageFull, TrainingInterrupted
from training.callbacks import Curve, Guard, Live, Meter, Progress
from training.card import make_card, write_card
from training.card_sections import baseline_of_report, plan_of
from training.checkpoints import Checkpoint, choose_checkpoint, last_complete
from training.compare import Baseline, Comparison, comparison_of
from training.config import Settings, TrainingConfig, choose
from training.gate.check import passed
from training.gate.report import Report
from training.identity import check_identity, identity, write_identity
from training.material import Material, announcement, facts, gather
from training.memory import memory
from training.reporting import check_reporters, reporters
from training.saving import save_result
from training.staging import Staging, staged, staging_folder

RUNS, LIVE = "runs", "metrics.jsonl"  # the TensorBoard log in the result, and the one that a page can follow
FULL_DISK_MARKS = (  # how torch and safetensors say it, which have no errno
    "No space left on device",
    "File too large",
    "PytorchStreamWriter failed writing",
    "iostream error",
    "inline_container",
)


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
    """One run: what it was asked, what it uses, and what came of it so far."""

    config: TrainingConfig
    settings: Settings
    material: Material
    gate: Report | None = None  # None where the data was not to be checked
    curve: Curve = field(default_factory=Curve)
    meter: Meter = field(default_factory=Meter)
    model: Any = None  # a PeftModel; after training with its best adapter
    state: Any = None  # Trainer's, after training
    baseline: Baseline | None = None  # where base and adapter are compared
    plan: dict[str, Any] | None = None  # what was expected of it
    watchers: list[Any] = field(default_factory=list)  # Trainer callbacks of whoever asked for the run
    baseline_report: Path | None = None  # of `hotshoe baseline` on this data, for the card
    answers_all: bool = False  # base and adapter answer all asked validation rows, whatever time it takes

    def train(self, staging: Staging, progress: Progress, last: Checkpoint | None = None) -> None:
        """Load the model and train it, from `last` on where it is given; working files go into `staging`."""
        from training.interrupt import Interrupter, listening
        from training.run import build_trainer

        if last is not None:
            self.meter.go_on(last.counted)
        comparison = comparison_of(self.material, self.settings)
        if comparison is not None and self.answers_all:
            comparison.most_seconds = None
        score = _score(comparison, self.settings)
        if self.config.compare and comparison is not None:
            goes_on = self.config.initial_adapter is not None
            self.baseline = Baseline(comparison, staging.checkpoints, progress.say, goes_on=goes_on)
        measured = [self.baseline] if self.baseline is not None else []
        step = last.step if last is not None else 0
        with reporters(self.config, self.settings, staging.result, step) as reporting, listening() as stop:
            live = Live(staging.result / LIVE, self.meter)
            callbacks = [live, Guard(), *measured, progress, *reporting, *self.watchers, Interrupter(stop)]
            trainer = build_trainer(
                self.config, self.settings, self.material, staging.checkpoints, self.meter, callbacks, score
            )
            try:
                if last is not None and last.is_final:
                    trainer.restore(last.folder)
                else:
                    trainer.train(resume_from_checkpoint=str(last.folder) if last is not None else None)
            finally:
                progress.close()
        self.model, self.state = trainer.model, trainer.state
        self.curve = Curve.of(trainer.state.log_history)


def train(
    config: TrainingConfig,
    say: Callable[[str], None] | None = None,
    *,
    resume: bool = False,
    watch: Callable[[Run], list[Any]] = lambda _: [],
) -> TrainingResult:
    """Train into `config.output`, which then holds the result whole. Lines about it go to `say`, or to stderr.

    `watch` is called once the settings are known; what it gives are callbacks of transformers' Trainer.

    A run that was cut off leaves its checkpoints beside the output; with `resume` it goes on from the last whole one
    and ends in the weights that it would have had.

    Raises OutputExists, AlreadyRunning, ConfigInvalid (with `resume`, too, where there is nothing to resume or it was
    another run), DataInvalid (with every bad row, or what the data gate blocks), BaseInvalid, AdapterRefused for an
    initial adapter that does not fit, TrainingStopped when the run diverged, TrainingInterrupted by SIGINT or SIGTERM,
    StorageFull.
    """
    from training.interrupt import terminable

    started = time.monotonic()
    _one_process()
    check_reporters(config)
    baseline_of_report(config.baseline)
    with _cut_off_named(config.output), terminable(), staged(config.output, resume=resume) as staging:
        material = gather(config)
        gate = passed(config, material)
        settings = choose(_with_initial_shape(config), facts(material))
        run = Run(config, settings, material, gate, meter=Meter(started=started), baseline_report=config.baseline)
        progress = Progress(run.meter, say)
        last = _last(staging, identity(config, settings, material), progress.say) if resume else None
        if last is None:
            write_identity(staging.identity, identity(config, settings, material))
        lines = [announcement(config, material, settings), memory(settings, material.base).line()]
        progress.say("\n".join([*lines, *([gate.line()] if gate is not None else [])]))
        run.plan = plan_of(run)
        run.watchers = watch(run)
        run.train(staging, progress, last)
        save_result(run.model, staging.result, material.base, config.base)
        card = make_card(run, staging)
        write_card(staging.result, card)
    return TrainingResult(config.output, card)


def _score(comparison: Comparison | None, settings: Settings) -> Callable[[Any], float] | None:
    """What chooses the weights by their answers; raises ConfigInvalid where there are none that can be scored."""
    if settings.best_by != "score":
        return None
    if comparison is None or not comparison.asks:
        why = "there are no validation rows" if comparison is None else "the expected answers are too long to be equal"
        raise ConfigInvalid(f"best_by is score, but {why}: take best_by loss.", param="best_by")
    return comparison.score


def _last(staging: Staging, found: dict[str, Any], say: Callable[[str], None]) -> Checkpoint:
    """The checkpoint to go on from; raises ConfigInvalid where it is another run's, or none is whole."""
    check_identity(staging.identity, found)
    last = choose_checkpoint(staging.checkpoints, say)
    if last is None:
        raise ConfigInvalid(
            "There is nothing to resume: every checkpoint is damaged. Start the run again without --resume.",
            param="resume",
        )
    for left in staging.result.iterdir():
        if left.name not in (RUNS, LIVE):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    say(f"going on after step {last.step}")
    return last


@contextmanager
def _cut_off_named(out: Path) -> Iterator[None]:
    """A full disk and a second Ctrl-C in our words, and whether the run can go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise TrainingInterrupted(f"Stopped at once. {_way_on(out)}") from error
    except Exception as error:
        if not _is_full_disk(error):
            raise
        raise StorageFull(f"The disk is full: {error}. Make room, or choose another --out. {_way_on(out)}") from error


def _way_on(out: Path) -> str:
    last = last_complete(Staging(staging_folder(out.absolute())).checkpoints)
    if last is None:
        return "Nothing was saved."
    return f"Step {last.step} is saved: go on with the same command and --resume."


def _is_full_disk(error: BaseException) -> bool:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return any(mark in str(error) for mark in FULL_DISK_MARKS)


def _one_process() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigInvalid("WORLD_SIZE is above 1: training runs on one GPU; start it without torchrun or accelerate.")


def _with_initial_shape(config: TrainingConfig) -> TrainingConfig:
    """The config with the rank and alpha of the adapter that it goes on from."""
    if config.initial_adapter is None:
        return config
    from training.model import with_initial_shape

    return with_initial_shape(config)
