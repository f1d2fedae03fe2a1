"""What kind of answers the data expects, and so which metrics mean something for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adapters.errors import ConfigInvalid
from training.metrics.objects import has_fields
from training.scores import label_of, parse_answer, spoken

LONGEST_LABEL = 64
ROWS_A_LABEL = 4  # on average at least, or short answers are free text
LABEL_METRICS = ("accuracy", "macro_f1", "micro_f1", "weighted_f1", "invalid")
OBJECT_METRICS = ("json_valid", "field_f1")
TEXT_METRICS = ("chrf", "bleu", "rouge1", "rouge2", "rougeL")
METRICS = ("exact_match", *LABEL_METRICS, *OBJECT_METRICS, *TEXT_METRICS)


@dataclass(frozen=True)
class Task:
    """`kind` is labels, objects or text. `label` is the field of a label, "" the whole answer; None: there is none."""

    kind: str
    label: str | None
    metrics: tuple[str, ...]  # that mean something, the one that decides first


def task_of(expected: Sequence[str], label: str | None = None) -> Task:
    """The task that the expected answers are; `label` names the field of the label, "" says that answers are labels."""
    are_objects = all(parse_answer(text) is not None for text in expected)
    if not are_objects:
        if label or (label is None and not _are_labels(expected)):
            return Task("text", None, (*TEXT_METRICS, "exact_match"))
        return Task("labels", "", (*LABEL_METRICS, "exact_match"))
    field = (label or None) if label is not None else label_of(expected)
    beside = has_fields(expected, field or "")
    of_label = LABEL_METRICS if field else ()
    of_fields = OBJECT_METRICS if beside else OBJECT_METRICS[:1]
    first = ("exact_match",) if beside or not field else ()
    return Task("objects", field, tuple(dict.fromkeys((*first, *of_label, *of_fields, "exact_match"))))


def chosen(task: Task, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The metrics to compute: those that were asked for, else those of the task; raises ConfigInvalid."""
    if wanted is None:
        return task.metrics
    for name in wanted:
        if name not in METRICS:
            raise ConfigInvalid(f"There is no metric {name[:80]!r}; there are {', '.join(METRICS)}.", param="metrics")
        if name in LABEL_METRICS and task.label is None:
            raise ConfigInvalid(f"{name} is for labels, and no label was found in these answers: name it with --label.")
        if name in OBJECT_METRICS and task.kind != "objects":
            raise ConfigInvalid(f"{name} is for answers that are JSON objects, and not all expected ones are.")
    return tuple(dict.fromkeys(wanted))


def _are_labels(expected: Sequence[str]) -> bool:
    """Few different short lines, each of several rows."""
    distinct = {spoken(text) for text in expected}
    return 2 <= len(distinct) <= len(expected) // ROWS_A_LABEL and all(
        0 < len(text) <= LONGEST_LABEL and "\n" not in text for text in distinct
    )
