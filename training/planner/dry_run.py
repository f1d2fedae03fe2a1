"""Three measured steps of a run, in a process of their own that leaves nothing behind, and when the run would end.

The real trainer does them, on the run's first batches, after one step that warms up. Nothing is validated or saved.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime, timedelta
from pathlib import Path
from statistics import mean
from typing import Any

from adapters.errors import TrainingStopped
from training.config import TrainingConfig

WARM_UP, MEASURED = 1, 3
FORWARD_SHARE = 0.4  # of a step's time a token, what validating a token takes: a step is forward and backward
COMPARING_SECONDS = 90  # at most: 30 for the base's answers and 60 for the adapter's


def dry_run(config: TrainingConfig) -> dict[str, Any]:
    """Measure the run's first steps and say how long all of it would take; raises what `train` would."""
    found = measured(config)
    per_token = sum(found["step_seconds"]) / sum(found["step_tokens"])
    training = found["steps"] * found["tokens_a_step"] * per_token
    validating = FORWARD_SHARE * found["validated_tokens"] * per_token
    compared = COMPARING_SECONDS if config.compare and found["validated_tokens"] else 0
    total = found["loading_seconds"] + training + validating
    return {
        **found,
        "training_seconds": training,
        "validation_seconds": validating,
        "comparing_seconds_at_most": compared,
        "seconds": total,
        "ends_at": (datetime.now().astimezone() + timedelta(seconds=total)).isoformat(timespec="seconds"),
    }


def measured(config: TrainingConfig) -> dict[str, Any]:
    """The seconds and tokens of the measured steps, the process's peak memory, and the prediction beside it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_measure, config).result()
        except BrokenProcessPool as error:
            raise TrainingStopped(
                "The measured steps were killed, most likely because memory ran out: `hotshoe plan` says what fits."
            ) from error


def lines(found: dict[str, Any]) -> list[str]:
    """What was measured, for people."""
    steps = ", ".join(f"{seconds:.2f}" for seconds in found["step_seconds"])
    predicted = found["predicted"]
    off = found["peak_bytes"] / predicted["peak_bytes"] - 1
    more = found["comparing_seconds_at_most"]
    compared = f" (and up to {more} s for the comparison with the base)" if more else ""
    return [
        f"{found['method']} on {found['base']}: three steps took {steps} s",
        f"{found['steps']} steps and the validations take about {_clock(found['seconds'])}{compared}",
        f"started now, the run ends at {found['ends_at'][11:19]} on {found['ends_at'][:10]}",
        f"peak memory {found['peak_bytes'] / 1e9:.2f} GB, {off:+.0%} from the predicted "
        f"{predicted['peak_bytes'] / 1e9:.2f} GB; nothing was saved",
    ]


def _measure(config: TrainingConfig) -> dict[str, Any]:
    """In the process of its own."""
    from training.card import peak_memory_bytes
    from training.config import choose
    from training.material import facts, gather
    from training.model import with_initial_shape
    from training.planner.run import predicted, resident_set_bytes
    from training.planner.workload import Workload
    from training.quiet import quieten

    quieten()
    started = time.monotonic()
    material = gather(config)
    settings = choose(with_initial_shape(config), facts(material))
    sequences = material.training.sequences
    said = predicted(settings, material.base, sequences, resident_bytes=resident_set_bytes())
    clock, device = _steps(config, settings, material)
    passes = Workload(tuple(sequences), settings.seed).passes(settings.pass_size, shares_prefix=not settings.dropout)
    validated = material.validation.tokens if material.validation is not None else 0
    validations = settings.steps / settings.evaluation_steps if settings.evaluation_steps else 0
    return {
        "base": material.base.id,
        "method": settings.method,
        "dtype": settings.dtype,
        "settings": settings.as_dict(),
        "steps": settings.steps,
        "step_seconds": clock.seconds[WARM_UP:],
        "step_tokens": clock.tokens[WARM_UP:],
        "tokens_a_step": settings.accumulation * mean(one.tokens for one in passes),
        "validated_tokens": validated * validations,
        "loading_seconds": clock.begun - started,
        "peak_bytes": peak_memory_bytes(device),
        "device": device,
        "predicted": said,
    }


def _steps(config: TrainingConfig, settings: Any, material: Any) -> tuple[Any, str]:
    """Run the steps; returns their clock and the device."""
    from dataclasses import replace

    from training.callbacks import Meter
    from training.planner.clock import Clock
    from training.run import build_trainer

    meter = Meter()
    clock = Clock(meter, WARM_UP + MEASURED)
    short = replace(
        settings, steps=max(settings.steps, WARM_UP + MEASURED + 1), evaluation_steps=None, checkpoint_steps=10**9
    )
    with tempfile.TemporaryDirectory(prefix="hotshoe-dry-run-") as folder:
        trainer = build_trainer(config, short, replace(material, validation=None), Path(folder), meter, [clock])
        trainer.train()
    return clock, str(next(trainer.model.parameters()).device.type)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
