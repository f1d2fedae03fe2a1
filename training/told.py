"""What a run tells the process that started it: steps, validations, checkpoints, whose adapters it keeps aside."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.kept import keep, kept_steps

NAMES = {"loss": "loss", "eval_loss": "validation_loss"}
SECONDS_BETWEEN_STEPS = 1.0  # steps that come faster are not all told


class Told(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Tells `step` (step, of, loss, seconds_left), `validation` (step, loss) and `checkpoint` (step, kept, losses).

    `kept` are the steps whose adapters lie in the folder of this name.
    """

    def __init__(self, tell: Callable[..., None], kept: Path) -> None:
        self.tell = tell
        self.kept = kept
        self.first_step = 0
        self.began = self.last_told = 0.0
        self.losses: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.first_step, self.began = state.global_step, time.monotonic()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        found = {name: float(logs[key]) for key, name in NAMES.items() if key in (logs or {})}
        self.losses |= {name: value for name, value in found.items() if math.isfinite(value)}
        if "validation_loss" in found:
            self.tell(kind="validation", step=state.global_step, loss=self.losses.get("validation_loss"))
        elif "loss" in found and self._is_due(state):
            self.last_told = time.monotonic()
            self.tell(
                kind="step",
                step=state.global_step,
                of=state.max_steps,
                loss=self.losses.get("loss"),
                seconds_left=round(self._left(state), 1),
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = int(state.global_step)
        keep(Path(args.output_dir) / f"checkpoint-{step}", self.kept, step)
        self.tell(kind="checkpoint", step=step, kept=sorted(kept_steps(self.kept)), losses=dict(self.losses))

    def _is_due(self, state: TrainerState) -> bool:
        is_end = state.global_step in (self.first_step + 1, state.max_steps)
        return is_end or time.monotonic() - self.last_told >= SECONDS_BETWEEN_STEPS

    def _left(self, state: TrainerState) -> float:
        done, left = state.global_step - self.first_step, state.max_steps - state.global_step
        return (time.monotonic() - self.began) / max(1, int(done)) * int(left)
