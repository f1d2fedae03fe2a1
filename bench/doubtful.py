"""How many wrong labels the data check finds among planted ones, on sentences of Home Assistant's intents.

Labels are flipped to the one that a model finds likeliest for the row beside its own, which is what people mistake a
label for; a random other one would be found more easily.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from bench.report import Report
from examples.agent_routing.data import ENGLISH, VIETNAMESE, Recipe, make
from training.data.rows import Place, Row
from training.gate.labels import Labels, doubtful, out_of_fold
from training.gate.subject import Subject

RATES = (0.02, 0.05, 0.10)
NAMES = {"en": "English", "vi": "Vietnamese"}


def run(rounds: int) -> Iterator[Report]:
    """Precision and recall over `rounds` draws of the flips."""
    report = Report("Doubtful labels: planted confusable flips")
    for recipe in (ENGLISH, VIETNAMESE):
        subject, values = rows(recipe)
        confusable = second_choice(subject, values)
        alarms = found_in(subject, values)
        report.notes.append(
            f"{NAMES[recipe.language]}, nothing flipped: {len(alarms)} of {len(values):,} rows are found."
        )
        for rate in RATES:
            report.rows.append(measured(recipe.language, subject, values, confusable, rate, rounds))
    yield report


def rows(recipe: Recipe) -> tuple[Subject, list[str]]:
    """All sentences of a language, each with its intent as the label."""
    made = [row for split in make(recipe).splits.values() for row in split]
    listed = []
    for number, one in enumerate(made, start=1):
        said = ({"role": "user", "content": one.sentence}, {"role": "assistant", "content": one.intent})
        listed.append(Row(said, None, (0, 1), Place("rows", number, number), "chat"))
    return Subject.of_rows(listed), [one.intent for one in made]


def second_choice(subject: Subject, values: Sequence[str]) -> list[str]:
    """Of each row the label that a model, fitted without the row, finds likeliest beside its own."""
    names = sorted(set(values))
    given = [names.index(value) for value in values]
    probabilities = out_of_fold(subject.questions, given, 0)
    probabilities[range(len(given)), given] = -1
    return [names[at] for at in probabilities.argmax(axis=1)]


def found_in(subject: Subject, values: Sequence[str]) -> set[int]:
    _, findings = doubtful(subject, Labels(values, ""), 0)
    return {index for finding in findings for index in finding.rows}


def measured(
    language: str, subject: Subject, values: Sequence[str], confusable: Sequence[str], rate: float, rounds: int
) -> dict[str, Any]:
    hits = planted = shown = 0
    for seed in range(rounds):
        flipped = set(random.Random(seed).sample(range(len(values)), round(rate * len(values))))
        found = found_in(subject, [confusable[at] if at in flipped else value for at, value in enumerate(values)])
        hits, planted, shown = hits + len(found & flipped), planted + len(flipped), shown + len(found)
    return {
        "language": NAMES[language],
        "rows": len(values),
        "labels": len(set(values)),
        "flipped": f"{rate:.0%}",
        "draws": rounds,
        "precision": hits / shown if shown else float("nan"),
        "recall": hits / planted,
    }
