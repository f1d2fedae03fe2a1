"""Which rows belong together, so that a split keeps them together and an interval counts them once.

template      one question with other names and numbers, and what is nearly it, as the data gate tells them
conversation  one opening: rows that were cut from one conversation at several turns
label         one answer, or one label where the answers are a classification
file          one file of a folder
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from adapters.errors import ConfigInvalid
from training.data.rows import Row
from training.gate import labels, twins
from training.gate.subject import Subject, normal, system


def clusters_of(rows: Sequence[Row], by: str = "template") -> list[str]:
    """Of each row the key of its cluster: equal keys belong together. Raises ConfigInvalid for another `by`."""
    if by not in WAYS:
        raise ConfigInvalid(f"Rows are grouped by one of {', '.join(WAYS)}, not by {by[:80]!r}.", param="by")
    return WAYS[by](rows) if rows else []


def _templates(rows: Sequence[Row]) -> list[str]:
    subject = Subject.of_rows(rows)
    texts = twins.texts_of(subject)
    return [_key(texts.masked[first]) for first in twins.clusters(texts)]


def _conversations(rows: Sequence[Row]) -> list[str]:
    return [_key(normal(_opening(row))) for row in rows]


def _opening(row: Row) -> str:
    """The system prompt and the first thing that the user says."""
    first = next((message["content"] for message in row.messages if message["role"] == "user"), "")
    return f"{system(row)}\n{first}"


def _labels(rows: Sequence[Row]) -> list[str]:
    subject = Subject.of_rows(rows)
    found = labels.detect(subject)
    if found is None:
        return [_key(normal(answer)) for answer in subject.answers]
    return ["" if value is None else value for value in found.values]


def _files(rows: Sequence[Row]) -> list[str]:
    return [row.place.source for row in rows]


WAYS: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "template": _templates,
    "conversation": _conversations,
    "label": _labels,
    "file": _files,
}


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
