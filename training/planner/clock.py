"""A callback that times the first steps of a run, and then ends it."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.callbacks import Meter


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Seconds and computed tokens of each of `steps` steps."""

    def __init__(self, meter: Meter, steps: int) -> None:
        self.meter = meter
        self.steps = steps
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.begun = 0.0
        self._step_began = 0.0
        self._counted = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begun = time.monotonic()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step_began, self._counted = time.monotonic(), self.meter.computed_tokens

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.seconds.append(time.monotonic() - self._step_began)
        self.tokens.append(self.meter.computed_tokens - self._counted)
        control.should_training_stop = len(self.seconds) >= self.steps
        return control
