"""The report of one evaluation, as one document: figures, rivals, distance from the training data, worst rows.

`made` is pure: answers go in, numbers come out. Sections that a model had to be asked for (forgetting, GPTScore, a
judge) are given to it finished.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from training.data.rows import Row
from training.evaluation.figures import Grouping, difference, figure, noise
from training.evaluation.similarity import Nearness, verdict_bin
from training.gate.subject import question
from training.groups import clusters_of
from training.metrics.items import Items, items
from training.metrics.measure import Floats, Measure
from training.metrics.task import METRICS
from training.statistics import FEWEST_CLUSTERS

FORMAT = 1
LONGEST_SHOWN = 4_000  # letters of a text in the report


@dataclass(frozen=True)
class Asked:
    """The rows: what was asked, what was expected, and which rows belong together."""

    questions: Sequence[str]
    expected: Sequence[str]
    places: Sequence[str]
    clusters: Sequence[str]

    @classmethod
    def of(cls, rows: Sequence[Row], expected: Sequence[str], by: str = "template") -> Self:
        """Rows with the answers expected of them; `by` says which belong together."""
        return cls([question(row) for row in rows], expected, [str(row.place) for row in rows], clusters_of(rows, by))

    def __len__(self) -> int:
        return len(self.expected)


@dataclass(frozen=True)
class Answered:
    """One model's answers in the order of the rows; `again` are those of some rows, asked in another batch order."""

    name: str
    answers: Sequence[str]
    again: Mapping[int, str] = field(default_factory=dict)
    said: Mapping[str, Any] = field(default_factory=dict)  # losses and times
    measures: Mapping[str, Measure] = field(default_factory=dict)  # of other models: similarity, GPTScore


@dataclass(frozen=True)
class Choice:
    """What is computed: the label's field, the metrics, labels known beside those expected."""

    label: str | None = None
    metrics: Sequence[str] | None = None
    known: Sequence[str] = ()


@dataclass(frozen=True)
class Report:
    """`content` is the whole document."""

    content: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return self.content

    def summary(self) -> dict[str, Any]:
        """What a run's card keeps: no texts, no rows."""
        return {key: value for key, value in self.content.items() if key not in ("rows_shown", "confusion")}


def made(
    about: Mapping[str, Any],
    asked: Asked,
    answered: Answered,
    rivals: Sequence[Answered] = (),
    choice: Choice | None = None,
    near: Nearness | None = None,
    sections: Mapping[str, Any] | None = None,
) -> Report:
    """The report of a model's answers, beside those of its rivals to the same rows."""
    choice = choice or Choice()
    own = _items(asked, answered, choice)
    others = {rival.name: _items(asked, rival, choice) for rival in rivals}
    grouping = Grouping(asked.clusters, own.strata)
    content: dict[str, Any] = {
        "format": FORMAT,
        **about,
        "task": own.task.kind,
        "label": own.task.label,
        "primary": own.primary.name,
        "less_is_better": [name for name, measure in own.measures.items() if measure.less_is_better],
        "rows": len(asked),
        "clusters": len(set(asked.clusters)),
        "fewest_clusters": FEWEST_CLUSTERS,
        "metrics": _figures(own, grouping, _noise(own, answered, asked, choice)),
        "signatures": {name: measure.signature for name, measure in own.measures.items() if measure.signature},
        "noise": _changed(answered),
        "against": [_against(own, others[rival.name], grouping, rival) for rival in rivals],
        "similarity": _similarity(own, others, grouping, near),
        **dict(sections or {}),
    }
    if own.labelled is not None:
        content |= {"labels": own.labelled.table(), "confusion": own.labelled.confusion()}
    content["rows_shown"] = _rows_shown(asked, answered, rivals, own, others, near)
    return Report(content)


def _items(asked: Asked, answered: Answered, choice: Choice) -> Items:
    """The scores of texts with those of models among them, in the order that they were asked for."""
    names = choice.metrics if choice.metrics is None else [name for name in choice.metrics if name in METRICS]
    found = items(asked.expected, answered.answers, choice.label, names, choice.known)
    measures = {**found.measures, **answered.measures}
    ordered = {name: measures[name] for name in choice.metrics or measures if name in measures}
    return Items(found.task, found.expected, found.answers, ordered, found.labelled)


def _figures(own: Items, grouping: Grouping, noises: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {**figure(measure, grouping), **({"noise": noises[name]} if name in noises else {})}
        for name, measure in own.measures.items()
    }


def _noise(own: Items, answered: Answered, asked: Asked, choice: Choice) -> dict[str, Any]:
    """Of each metric how far it moves by batching alone."""
    if not answered.again:
        return {}
    rows = sorted(answered.again)
    expected = [asked.expected[row] for row in rows]
    names = [name for name in own.measures if name not in answered.measures]
    known = own.labelled.names if own.labelled is not None else choice.known
    label = own.task.label if own.task.label is not None else choice.label
    first, second = (
        items(expected, answers, label, names, known)
        for answers in ([answered.answers[row] for row in rows], [answered.again[row] for row in rows])
    )
    return {name: noise(first.measures[name], second.measures[name], len(asked)) for name in first.measures}


def _changed(answered: Answered) -> dict[str, Any] | None:
    """How many of the rows that were asked twice had another answer; None where none were."""
    if not answered.again:
        return None
    changed = [row for row, answer in answered.again.items() if answer != answered.answers[row]]
    return {"rows": len(answered.again), "changed": len(changed), "share": round(len(changed) / len(answered.again), 6)}


def _against(own: Items, other: Items, grouping: Grouping, rival: Answered) -> dict[str, Any]:
    return {
        "name": rival.name,
        **rival.said,
        "metrics": {
            name: difference(measure, other.measures[name], grouping)
            for name, measure in own.measures.items()
            if name in other.measures
        },
    }


def _similarity(
    own: Items, others: Mapping[str, Items], grouping: Grouping, near: Nearness | None
) -> dict[str, Any] | None:
    """The figures of near, middle and far rows, and which of them a verdict may use."""
    if near is None:
        return None
    bins: dict[str, Any] = {}
    for name, rows in near.bins().items():
        clusters = len({grouping.clusters[row] for row in rows})
        bins[name] = {"rows": len(rows), "clusters": clusters}
        if len(rows):
            bins[name]["metrics"] = {key: figure(value, grouping, rows) for key, value in own.measures.items()}
            bins[name]["against"] = {
                rival: difference(own.primary, other.measures[own.primary.name], grouping, rows)
                for rival, other in others.items()
            }
    chosen, why = verdict_bin({name: value["clusters"] for name, value in bins.items()})
    return {"mean": round(float(near.similarity.mean()), 6), "verdict_bin": chosen, "why": why, "bins": bins}


def _rows_shown(
    asked: Asked,
    answered: Answered,
    rivals: Sequence[Answered],
    own: Items,
    others: Mapping[str, Items],
    near: Nearness | None,
) -> list[dict[str, Any]]:
    """Every row with its answers and score, the worst first; of equal ones first those that a rival has better."""
    worth = _worth(own.primary)
    best = np.max([_worth(other.measures[own.primary.name]) for other in others.values()], axis=0) if others else worth
    order = sorted(range(len(asked)), key=lambda row: (worth[row], -best[row], row))
    return [
        {
            "place": asked.places[row],
            "score": _number(own.primary.scores[row]),
            "question": shortened(asked.questions[row]),
            "expected": shortened(asked.expected[row]),
            "answer": shortened(answered.answers[row]),
            "rivals": {
                rival.name: {
                    "answer": shortened(rival.answers[row]),
                    "score": _number(others[rival.name].measures[own.primary.name].scores[row]),
                }
                for rival in rivals
            },
            **({"similarity": _number(near.similarity[row]), "nearest": near.places[row]} if near else {}),
        }
        for row in order
    ]


def _worth(measure: Measure) -> Floats:
    """(rows,) the scores, more being better; what could not be measured is below all."""
    return np.nan_to_num(-measure.scores if measure.less_is_better else measure.scores, nan=-np.inf)


def shortened(text: str) -> str:
    """The text as it can be written, its middle left out where it is very long."""
    text = text.encode("utf-8", "replace").decode()  # halves of surrogate pairs, which JSON can carry
    if len(text) <= LONGEST_SHOWN:
        return text
    half = LONGEST_SHOWN // 2
    return f"{text[:half]} … {len(text) - LONGEST_SHOWN:,} letters left out … {text[-half:]}"


def _number(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None
