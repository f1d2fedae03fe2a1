"""What to do about a verdict, in sentences with the run's own numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from training.verdict import figures
from training.verdict.evidence import Evidence
from training.verdict.rules import LEAST_ROWS

MOST_ROWS, FEWEST_ROWS = 1000, 10  # that are asked for of one label


def advice(primary: str, flags: tuple[str, ...], evidence: Evidence, shown: Mapping[str, Any]) -> Iterator[str]:
    """The sentences, the most useful first."""
    peak = max((rate for _, rate in evidence.learning_rate), default=0.0)
    if primary == "diverged":
        rises = figures.rises_at_the_end(evidence.validation)
        seen = f"the validation loss rose {rises} evaluations in a row" if rises > 1 else "the training loss rose"
        yield f"The learning rate is too high: {seen}. Try a quarter of it: --learning-rate {peak / 4:.2g}."
    elif primary == "overfit" and shown.get("rise"):
        share = evidence.best_step / max(1, evidence.planned_steps)
        yield f"Stop at step {evidence.best_step}, whose weights are the kept ones: {share:.0%} of the planned steps."
        yield "More rows, fewer epochs or a lower rank would let it learn longer."
    elif primary == "overfit":
        yield "The training rows lead away from the validation rows: check that both are the same task."
    elif primary == "underfit":
        yield (
            f"Train about twice as long ({2 * evidence.steps} steps): that should lower the loss by about "
            f"{shown['twice_the_steps']:.2f}."
        )
    elif primary == "no effect":
        yield f"Raise the learning rate (it peaked at {peak:.2g}), or train for more than {evidence.steps} steps."
    elif primary == "cannot tell":
        yield _more_validation(evidence)
    if primary in ("learned", "overfit", "underfit") and "far_gain" in shown and shown["far_gain"]["low"] <= 0:
        yield (
            "Validation rows unlike any row trained on did not surely gain: the gain is of rows that resemble the "
            "training rows. Add rows of other kinds."
        )
    if primary not in ("diverged", "no effect"):
        yield from _more_rows(evidence)
    yield from (FLAGGED[flag] for flag in flags)


FLAGGED = {
    "memorised": "Rows trained on can be told from others: train for fewer epochs, take repeated rows out, and do not "
    "publish the adapter where the rows are private.",
    "forgot": "General text got harder for it: mix general rows in (--replay FILE), or train for fewer steps.",
    "label noise": "Look through the labels: `hotshoe data check` lists the rows whose label is doubtful.",
}


def _more_validation(evidence: Evidence) -> str:
    rows = evidence.held_out
    if rows is None:
        return f"Give validation rows: --validation FILE, or --validation-share, {LEAST_ROWS} or more."
    if not rows.start:
        return "Have the base measured, too: leave --no-compare out."
    count = len(set(rows.clusters))
    return f"Give more validation rows than these {count} different ones: --validation FILE with {max(100, 4 * count)}."


def _more_rows(evidence: Evidence) -> Iterator[str]:
    """For the weakest label, as many rows as the middle label has, and at least as many again as it has."""
    for weak in figures.weak_labels(evidence)[:1]:
        usual = int(median(evidence.rows_of_label.values())) if evidence.rows_of_label else 0
        wanted = min(MOST_ROWS, max(FEWEST_ROWS, usual - weak["rows"], weak["rows"]))
        wanted = math.ceil(wanted / FEWEST_ROWS) * FEWEST_ROWS
        yield f"{wanted} more rows of label {weak['label']!r}, whose loss is {weak['loss']:.2f}: it has {weak['rows']}."
