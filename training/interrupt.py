"""Ctrl-C and SIGTERM during a run: the step is finished, a checkpoint saved, and the run ends with how to go on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adapters.errors import TrainingInterrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Stop:
    """Whether a signal asked the run to stop."""

    is_asked: bool = False


@contextmanager
def listening() -> Iterator[Stop]:
    """Within the block the first signal asks to stop, the second raises KeyboardInterrupt; in the main thread only."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_asked:
            raise KeyboardInterrupt
        stop.is_asked = True
        os.write(2, b"\nstopping after this step; once more stops at once\n")

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block SIGTERM is KeyboardInterrupt, as Ctrl-C is: what is open is closed; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class Interrupter(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Where a stop was asked for, saves after the step and raises TrainingInterrupted."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.stop.is_asked:
            control.should_save = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stop.is_asked:
            raise TrainingInterrupted(
                f"Stopped after step {state.global_step} of {state.max_steps}, which is saved. "
                "Go on with the same command and --resume."
            )
