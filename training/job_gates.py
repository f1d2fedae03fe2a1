"""What stands before a fine-tuning job's training, and between its run and a version: memory, baseline, score."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import ConfigInvalid, HotshoeError, MemoryLacking, ScoreTooLow

if TYPE_CHECKING:
    from training.config import Settings
    from training.jobs import Order
    from training.trainer import Run

QUICK_ROWS = 32  # of the validation rows, in a quick baseline
QUICK, FULL = "quick", "full"
BESIDE_WEIGHTS = 1.5  # what answering takes in all, of the bytes of the weights
SECONDS_BETWEEN_SIGNS = 30.0
SCORES = ("label_accuracy", "exact_match")  # of greedy answers; the first that there is counts


def check_memory(run: Run, limit_bytes: int | None) -> None:
    """Raises MemoryLacking where even the low end of what is planned is more than the run may have."""
    plan = run.plan or {}
    if limit_bytes is None or plan.get("peak_low_bytes", 0) <= limit_bytes:
        return
    ways = [f"{what} ({_gb(peak)})" for what, peak in _smaller(run) if peak <= limit_bytes]
    advice = f"give {' or '.join(ways)}" if ways else "take a smaller base or shorter rows"
    raise MemoryLacking(
        f"The run needs about {_gb(plan['peak_bytes'])} of memory ({_gb(plan['peak_low_bytes'])} at least), and a job "
        f"may have {_gb(limit_bytes)} here: {advice}, or ask the operator for more.",
        param="hyperparameters",
    )


def check_place(order: Order, device: str) -> int | None:
    """The bytes that the run may have where it computes; raises MemoryLacking on a GPU that is all serving's."""
    if device != "cuda":
        return order.memory_bytes
    if order.gpu_memory_bytes is None:
        raise MemoryLacking(
            "The GPU's memory is planned for serving and nothing is kept for training: have the operator start the "
            "server with HOTSHOE_JOB_GPU_MEMORY_BYTES."
        )
    return order.gpu_memory_bytes


def check_scorable(run: Run) -> None:
    """Raises ConfigInvalid where no score can be measured that a minimum could be held against."""
    from training.compare import comparison_of

    comparison = comparison_of(run.material, run.settings)
    if comparison is None:
        why = "there are no validation rows: give a validation_file"
    elif not comparison.asks:
        why = "the expected answers are too long for their equality to say something"
    else:
        return
    raise ConfigInvalid(f"minimum_score is set, but {why}, or leave it out.", param="minimum_score")


def check_score(card: Mapping[str, Any], minimum: float) -> None:
    """Raises ScoreTooLow where the trained adapter's answers score less."""
    scored = (card.get("evaluation") or {}).get("answers") or {}
    answers, rows = scored.get("adapter") or {}, scored.get("rows")
    name = next((one for one in SCORES if one in answers), None)
    if name is None:
        raise ScoreTooLow("minimum_score is set, and the run's answers have no score.", param="minimum_score")
    if answers[name] < minimum:
        raise ScoreTooLow(
            f"The adapter's {name.replace('_', ' ')} on {rows} validation rows is {answers[name]:.3f}, below the "
            f"minimum of {minimum:g}: nothing was published. Its checkpoints are kept for a while; more rows or epochs "
            "may help.",
            param="minimum_score",
        )


def measured_baseline(
    run: Run, report: Path, depth: str, memory_bytes: int | None, tell: Callable[..., None]
) -> Path | None:
    """The report of a baseline on the job's validation file, measured unless it is there; None where there is none.

    What keeps it from being measured is told, and keeps nothing from being trained: no validation file, no room for the
    base as it is stored, a try before that ran out of memory. A quick one has the prompts without examples on some
    rows, and no probe.
    """
    from training.baseline import report as reports
    from training.baseline.before import measure
    from training.baseline.ground import Asked, open_ground

    config = run.config
    if config.validation is None:
        tell(kind="said", message="No baseline is measured: there is no validation file")
        return None
    quick: dict[str, Any] = {"rows": QUICK_ROWS, "examples": (0,), "probe": False} if depth == QUICK else {}
    try:
        begun = reports.read(report)
        if begun is not None and begun["is_finished"]:
            return report  # before the job was cut off
        why = _no_room(run, memory_bytes)
        if why is None:
            asked = Asked(
                config.data, config.validation, base=config.base, columns=config.columns, seed=config.seed, **quick
            )
            keep = partial(reports.write, report)
            made = measure(open_ground(asked), lambda _: None, alive(tell), begun, keep)
            keep(made)
    except HotshoeError as error:
        why = error.message
    except (MemoryError, RuntimeError) as error:
        why = f"{type(error).__name__} while it was measured"
    if why is not None:
        tell(kind="said", message=f"The baseline was left out: {why}", level="warn")
        return None
    tell(kind="baseline", lines=[line for _, line in reports.lines(made)], summary=reports.summary(report))
    return report


def alive(tell: Callable[..., None]) -> Callable[[int, int], None]:
    """Progress that says now and then that something is done, so that nobody takes the process for a dead one."""
    told = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= SECONDS_BETWEEN_SIGNS:
            told = time.monotonic()
            tell(kind="alive", done=done, total=total)

    return progress


def _no_room(run: Run, memory_bytes: int | None) -> str | None:
    """Why the base as it is stored should not be loaded before the run; None where nothing speaks against it."""
    from adapters.bases import weight_files
    from training.planner.run import resident_set_bytes

    if run.config.pass_size is not None:
        return "a try before ran out of memory"
    weights = sum(path.stat().st_size for path in weight_files(run.material.base.folder))
    needed = resident_set_bytes() + BESIDE_WEIGHTS * weights
    if memory_bytes is not None and needed > memory_bytes:
        return f"it needs about {_gb(needed)} of memory, and a job may have {_gb(memory_bytes)}"
    return None


def _smaller(run: Run) -> list[tuple[str, int]]:
    """(what to ask for, the peak planned for it)."""
    settings = run.settings
    ways: list[tuple[str, Settings]] = []
    if settings.method == "lora":
        ways.append(("hotshoe.method qlora", replace(settings, method="qlora")))
    if settings.batch_size > 1:
        ways.append(("batch_size 1", replace(settings, batch_size=1, pass_size=1, accumulation=1)))
    return [(name, _peak(run, one)) for name, one in ways]


def _peak(run: Run, settings: Settings) -> int:
    from training.planner.run import predicted, resident_set_bytes

    material = run.material
    found = predicted(settings, material.base, material.training.sequences, resident_bytes=resident_set_bytes())
    return int(found["peak_bytes"])


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
