"""All metrics of one set of answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from training.metrics.labels import Labelled
from training.metrics.measure import Floats, Measure
from training.metrics.objects import exact_match, field_f1, json_valid
from training.metrics.task import LABEL_METRICS, Task, chosen, task_of
from training.metrics.texts import bleu, chrf, rouge
from training.scores import refuse_unpaired, spoken


@dataclass(frozen=True)
class Items:
    """The measures of answers, the deciding one first, and their labels where the task has them."""

    task: Task
    expected: Sequence[str]
    answers: Sequence[str]
    measures: Mapping[str, Measure]
    labelled: Labelled | None

    @property
    def primary(self) -> Measure:
        """What decides."""
        return next(iter(self.measures.values()))

    @property
    def strata(self) -> list[int] | None:
        """Of each row the number of its label, for draws that keep each label's share."""
        return self.labelled.right.tolist() if self.labelled is not None else None

    def scores(self) -> dict[str, Floats]:
        """Of each metric the scores of the rows, (rows,)."""
        return {name: measure.scores for name, measure in self.measures.items()}

    def figures(self) -> dict[str, float]:
        """Of each metric the figure of all rows."""
        return {name: measure.value for name, measure in self.measures.items()}


def items(
    expected: Sequence[str],
    answers: Sequence[str],
    label: str | None = None,
    metrics: Sequence[str] | None = None,
    known: Collection[str] = (),
) -> Items:
    """Score answers row by row against what was expected, with the metrics that mean something for them, or with these.

    `label` is the field that is the label, "" where the whole answer is; None finds it. `known` are labels that count
    as such although no row expects them. Raises InvalidRequest for no rows or other lengths, ConfigInvalid for a metric
    that these answers cannot have.
    """
    refuse_unpaired(expected, answers)
    task = task_of(expected, label)
    names = chosen(task, metrics)
    labelled = Labelled.of(expected, answers, task.label, known) if task.label is not None else None
    of_labels = {measure.name: measure for measure in labelled.measures()} if labelled is not None else {}
    texts = [spoken(text) for text in expected], [spoken(text) for text in answers]
    measures = {
        name: of_labels[name] if name in LABEL_METRICS else _measure(name, expected, answers, texts, task.label or "")
        for name in names
    }
    return Items(task, expected, answers, measures, labelled)


def _measure(
    name: str, expected: Sequence[str], answers: Sequence[str], texts: tuple[list[str], list[str]], label: str
) -> Measure:
    match name:
        case "exact_match":
            return exact_match(expected, answers)
        case "json_valid":
            return json_valid(answers)
        case "field_f1":
            return field_f1(expected, answers, label)
        case "chrf":
            return chrf(*texts)
        case "bleu":
            return bleu(*texts)
        case _:
            return rouge(*texts, name)
