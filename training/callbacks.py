"""What watches a run: progress for people, the curve for the card, and the guard that stops a run gone wrong.

Trainer's own log history is the one record: a resumed run finds in it what was before.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adapters.durable import replace_file
from adapters.errors import TrainingStopped

LONGEST_CURVE = 1000  # points of a curve in the card
EXPLOSION_RATIO, EXPLOSION_NATS = 1.5, 1.0  # a loss above 1.5 times the first one and 1 nat, at every
RECENT_STEPS = 5  # of so many steps in a row, has exploded
LIVE_NAMES = {
    "loss": "loss",
    "eval_loss": "validation_loss",
    "eval_score": "validation_score",
    "learning_rate": "learning_rate",
    "grad_norm": "gradient_norm",
}


@dataclass
class Curve:
    """Training loss, validation loss and learning rate as (step, value); thinned evenly above 1,000 points."""

    training: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    learning_rate: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def of(cls, history: list[dict[str, Any]]) -> Curve:
        """The curve in Trainer's log history."""
        return cls(*(_points(history, key) for key in ("loss", "eval_loss", "learning_rate")))

    def as_dict(self) -> dict[str, Any]:
        stride = math.ceil(len(self.training) / LONGEST_CURVE) or 1
        return {
            "training": self.training[::stride],
            "validation": self.validation,
            "learning_rate": self.learning_rate[::stride],
        }


@dataclass
class Meter:
    """Tokens of the rows trained on, how many the model computed for them, and the seconds; no validation.

    `started` is on the monotonic clock, as if the run had never been cut off.
    """

    tokens: int = 0
    computed_tokens: int = 0  # fewer: a prefix that all rows of a batch share is computed once
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, float]:
        """As a checkpoint keeps it."""
        return {
            "tokens": self.tokens,
            "computed_tokens": self.computed_tokens,
            "seconds": self.seconds,
            "elapsed_seconds": time.monotonic() - self.started,
        }

    def go_on(self, counted: dict[str, float]) -> None:
        """Count on from what a checkpoint has."""
        self.tokens, self.computed_tokens = int(counted["tokens"]), int(counted["computed_tokens"])
        self.seconds = float(counted["seconds"])
        self.started -= float(counted["elapsed_seconds"])


class Guard(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Raises TrainingStopped on a loss or gradient that is no number, or that exploded."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.losses = [float(entry["loss"]) for entry in state.log_history if "loss" in entry]

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        for key in ("loss", "grad_norm", "eval_loss"):
            value = (logs or {}).get(key)
            if key == "grad_norm" and args.fp16:
                continue  # the gradient scaler meets infinite ones, skips the step and scales down
            if value is not None and not math.isfinite(float(value)):
                raise TrainingStopped(
                    f"{key} is {value} at step {state.global_step}: the run diverged and nothing was saved. "
                    "Lower --learning-rate (a quarter is a good next try), or use --dtype float32."
                )
        if logs and "loss" in logs:
            self.check(float(logs["loss"]), state.global_step)

    def check(self, loss: float, step: int) -> None:
        """Take the next step's loss in."""
        self.losses.append(loss)
        recent = self.losses[-RECENT_STEPS:]
        if len(self.losses) <= RECENT_STEPS:
            return
        lowest = min(recent)
        if lowest > EXPLOSION_RATIO * self.losses[0] + EXPLOSION_NATS:
            raise TrainingStopped(
                f"The loss exploded: {lowest:.2f} or more over the last {RECENT_STEPS} steps, {self.losses[0]:.2f} at "
                f"the start and {min(self.losses):.2f} at best (step {step}). Nothing was saved. Lower --learning-rate."
            )


class Live(TrainerCallback):  # type: ignore[misc]
    """Appends each log as a line of JSON to a file that a page can follow; each line is flushed as it is made.

    A resumed run first takes back the lines behind the step that it goes on from, and a line that was cut.
    """

    def __init__(self, file: Path, meter: Meter) -> None:
        self.file = file
        self.meter = meter

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kept = [line for line in _whole_lines(self.file) if json.loads(line)["step"] <= state.global_step]
        replace_file(self.file, "".join(kept).encode())

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        known = {name: float(logs[key]) for key, name in LIVE_NAMES.items() if key in (logs or {})}
        if not known:
            return
        line = {
            "step": state.global_step,
            "of_steps": state.max_steps,
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **{name: value if math.isfinite(value) else None for name, value in known.items()},
            "tokens_per_second": round(self.meter.tokens_per_second, 1),
        }
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class Progress(TrainerCallback):  # type: ignore[misc]
    """A bar with loss, validation loss, tokens/s and time left in a terminal; else a plain line now and then."""

    def __init__(
        self, meter: Meter, say: Callable[[str], None] | None = None, seconds_between_lines: float = 15
    ) -> None:
        self.meter = meter
        self.say = say or _say
        self.is_terminal = say is None and sys.stderr.isatty()
        self.seconds_between_lines = seconds_between_lines
        self.last_line_at = 0.0
        self.started_at = 0.0
        self.first_step = 0
        self.shown: dict[str, str] = {}
        self.bar: Any = None
        self.task: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started_at = self.last_line_at = time.monotonic()
        self.first_step = state.global_step
        if self.is_terminal:
            self.bar = _bar()
            self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, text="")
            self.bar.start()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            self.shown["loss"] = f"{float(logs['loss']):.3f}"
        if logs and "eval_loss" in logs:
            self.shown["validation"] = f"{float(logs['eval_loss']):.3f}"
        is_due = time.monotonic() - self.last_line_at >= self.seconds_between_lines
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step, text=self._text())
        elif is_due or (logs and "eval_loss" in logs) or (self._is_first(state) and "loss" in (logs or {})):
            self.last_line_at = time.monotonic()
            self.say(f"step {state.global_step}/{state.max_steps}  {self._text()}  {self._left(state)}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _text(self) -> str:
        rate = f"{self.meter.tokens_per_second:,.0f} tokens/s"
        return "  ".join([*(f"{key} {value}" for key, value in self.shown.items()), rate])

    def _is_first(self, state: TrainerState) -> bool:
        return bool(state.global_step == self.first_step + 1)

    def _left(self, state: TrainerState) -> str:
        passed = time.monotonic() - self.started_at
        left = passed / max(1, state.global_step - self.first_step) * (state.max_steps - state.global_step)
        return f"{_clock(passed)} passed, {_clock(left)} left"


def _whole_lines(file: Path) -> list[str]:
    """The lines that are whole JSON objects with a step."""
    made = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else ():
        try:
            is_whole = line.endswith("\n") and isinstance(json.loads(line)["step"], int)
        except (ValueError, KeyError, TypeError):
            continue
        if is_whole:
            made.append(line)
    return made


def _points(history: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(int(entry["step"]), float(f"{float(entry[key]):.6g}")) for entry in history if key in entry]


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    return Bar(
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
