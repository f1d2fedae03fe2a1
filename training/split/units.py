"""What must not be torn apart: rows of one group and, unless that is not wanted, rows that are nearly the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from adapters.errors import ConfigInvalid, DataInvalid, Problem
from training.data.columns import Columns
from training.data.formats import DataFile
from training.data.records import kept_records
from training.gate.labels import json_object
from training.gate.subject import answer
from training.groups import WAYS, clusters_of

GROUP = "group:"


def units_of(file: DataFile, by: str, columns: Columns, *, twins_together: bool) -> list[str]:
    """Of each row the key of what it must stay with; raises ConfigInvalid, and DataInvalid where a group is missing."""
    keys = groups_of(file, by, columns)
    return joined(keys, clusters_of(file.rows)) if twins_together and by != "template" else keys


def groups_of(file: DataFile, by: str, columns: Columns) -> list[str]:
    """Of each row its group: one of the ways of `clusters_of`, or `group:NAME` for a column or a field of answers."""
    if not by.startswith(GROUP):
        if by not in WAYS:
            ways = ", ".join(WAYS)
            raise ConfigInvalid(f"--by is one of {ways} or group:COLUMN, not {by[:80]!r}.", param="by")
        return clusters_of(file.rows, by)
    name = columns.name(by.removeprefix(GROUP))
    values = _column(file, name, columns)
    if values is None:
        values = [(json_object(answer(row)) or {}).get(name) for row in file.rows]
    missing = [row for row, value in zip(file.rows, values, strict=True) if value in (None, "")]
    if missing:
        advice = "give each row a value, or split by something else"
        problems = tuple(
            Problem("group_missing", file.where(row), f"it has no {name}", advice) for row in missing[:1000]
        )
        raise DataInvalid(
            f"{len(missing):,} of {len(file.rows):,} rows of {file.path} have no {name!r}, neither as a column nor as "
            "a field of a JSON answer: they belong to no group.",
            param="by",
            problems=problems,
        )
    return [json.dumps(value, ensure_ascii=False, sort_keys=True, default=str) for value in values]


def _column(file: DataFile, name: str, columns: Columns) -> list[Any] | None:
    """The column's value in each row; None where no row has it."""
    found = [value for index, value in kept_records(file, columns) if index is not None]
    return [value.get(name) for value in found] if any(name in value for value in found) else None


def joined(keys: Sequence[str], others: Sequence[str]) -> list[str]:
    """Keys so that rows equal in either belong together, through others if need be."""
    root: dict[str, str] = {}

    def find(key: str) -> str:
        root.setdefault(key, key)
        while root[key] != key:
            root[key] = root[root[key]]
            key = root[key]
        return key

    for key, other in zip(keys, others, strict=True):
        root[find(f"2{other}")] = find(f"1{key}")
    return [find(f"1{key}") for key in keys]
