"""Rules on rate, schedule, batch and the length of the run."""

from __future__ import annotations

from collections.abc import Iterator

from training.review.findings import Finding
from training.review.view import View

LOW, HIGH, HIGH_SMALL = 5e-5, 1e-3, 5e-3  # of LoRA
LOW_FULL, HIGH_FULL, HIGH_FULL_SMALL = 1e-6, 1e-4, 5e-4
LONGEST_WARMUP, FEWEST_STEPS_TO_WARM_UP = 0.2, 20
LARGEST_BATCH, SMALLEST_BATCH = 32, 4
WANTED_STEPS = 100
MOST_EPOCHS, MOST_EPOCHS_OF_MANY_ROWS, MANY_ROWS = 5, 3, 10_000
GPU_OPTIMIZERS = ("8bit", "paged", "4bit", "bnb")


def findings(view: View) -> Iterator[Finding]:
    yield from rate(view)
    yield from schedule(view)
    yield from optimizer(view)
    yield from batch(view)
    yield from length_of_run(view)


def rate(view: View) -> Iterator[Finding]:
    value = view.value("learning_rate")
    if value is None:
        return
    size = "below 0.3 billion parameters" if view.is_small else ""
    if view.is_lora:
        best = "1e-3" if view.is_small else "2e-4"
        if value < LOW:
            yield view.finding("lr_low_lora", "learning_rate", best, size)
        if value > (HIGH_SMALL if view.is_small else HIGH):
            yield view.finding("lr_high_lora", "learning_rate", best, size)
    elif view.is_full:
        best = "1e-4" if view.is_small else "1e-5"
        if value < LOW_FULL:
            yield view.finding("lr_low_full", "learning_rate", best, size)
        if value > (HIGH_FULL_SMALL if view.is_small else HIGH_FULL):
            yield view.finding("lr_high_full", "learning_rate", best, size)


def schedule(view: View) -> Iterator[Finding]:
    if str(view.value("scheduler", "")).startswith("constant"):
        yield view.finding("rate_never_falls", "scheduler")
    share, steps = view.warmup_share, view.steps
    if share is None:
        return
    if share > LONGEST_WARMUP:
        detail = f"{share:.0%} of {steps:,} steps" if steps else f"{share:.0%} of the steps"
        suggestion = f"{max(1, round(0.05 * steps))} of {steps:,} steps" if steps else ""
        yield view.finding("warmup_long", view.warmup_name, suggestion, detail)
    if share == 0 and (steps is None or steps >= FEWEST_STEPS_TO_WARM_UP):
        yield view.finding("warmup_none", view.warmup_name)


def optimizer(view: View) -> Iterator[Finding]:
    decay, rate_value, steps = view.value("weight_decay"), view.value("learning_rate"), view.steps
    if decay and view.is_lora:
        kept = (1 - rate_value * decay) ** steps if rate_value and steps and rate_value * decay < 1 else None
        detail = f"a weight without a gradient keeps {kept:.1%} over {steps:,} steps" if kept is not None else ""
        yield view.finding("weight_decay", "weight_decay", "", detail, "warn" if decay >= 0.1 else None)
    norm = view.value("max_gradient_norm")
    if norm is not None and (norm <= 0 or norm > 10):
        yield view.finding("clipping_off", "max_gradient_norm")
    named = str(view.value("optimizer", ""))
    is_cpu = view.known.is_cpu or view.value("on_cpu")
    if is_cpu and any(word in named for word in GPU_OPTIMIZERS):
        yield view.finding("optimizer_on_cpu", "optimizer")


def batch(view: View) -> Iterator[Finding]:
    rows = view.batch
    if rows is None:
        return
    parts = f"{view.value('batch')} rows * {view.value('accumulation', 1)} passes"
    if rows > LARGEST_BATCH and view.is_lora and not view.value("packing"):
        yield view.finding("batch_large", "batch", "", f"{rows} rows a step: {parts}")
    enough = view.steps is None or view.steps > WANTED_STEPS
    if rows < SMALLEST_BATCH and enough and not view.value("packing"):
        yield view.finding("batch_small", "batch", "", f"{rows} rows a step: {parts}")


def length_of_run(view: View) -> Iterator[Finding]:
    passes, rows, steps = view.passes, view.rows, view.steps
    most = MOST_EPOCHS_OF_MANY_ROWS if rows is not None and rows > MANY_ROWS else MOST_EPOCHS
    name = "max_steps" if (view.value("max_steps") or 0) > 0 else "epochs"
    if passes is not None and passes > most:
        counted = f" over {rows:,} rows" if rows else ""
        yield view.finding("epochs_many", name, "", f"{passes:.1f} passes{counted}")
    if steps is not None and steps < WANTED_STEPS and view.known.data is not None:
        sequences = view.sequences or 0
        packed = f", packed into {sequences:,} sequences" if rows and sequences < rows else ""
        smaller = next((size for size in (8, 4) if rows and rows * (passes or 1) / size >= WANTED_STEPS), 4)
        suggestion = f"{smaller} rows a step" if view.batch and view.batch > smaller else "more rows, or more epochs"
        yield view.finding(
            "steps_few", "batch", suggestion, f"{steps} steps: {rows:,} rows{packed}, {view.batch} a step"
        )
    if name == "max_steps" and view.is_written("epochs"):
        detail = f"{passes:.2g} passes over the data" if passes is not None else ""
        yield view.finding("max_steps_win", "max_steps", "", detail)
    limit, data = view.value("row_limit"), view.known.data
    if limit and (data is None or limit < data.rows):
        detail = f"{limit:,} of {data.rows:,} rows" if data is not None else ""
        yield view.finding("rows_limited", "row_limit", "", detail)
