"""Reads data, assigns its rows to splits without leaks, writes the folder whole or not at all, and reads that again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters.errors import ConfigInvalid, DataInvalid
from adapters.store import disk_errors
from training.data.columns import Columns
from training.data.formats import DataFile, read_data
from training.data.records import as_line, kept_records
from training.gate import labels, twins
from training.gate.subject import Subject
from training.split.assign import assign
from training.split.units import units_of
from training.staging import staged

SPLITS = ("train", "validation", "test")
REPORT = "split.json"
FORMAT = 1
TWINS = ("together", "apart")
LARGEST_SHARE = 0.8  # of the rows: a unit that holds more leaves nothing to split


@dataclass(frozen=True)
class SplitAsked:
    """What is split and how. With twins `apart` only groups stay together, and rows may be nearly the same."""

    data: Path
    out: Path
    by: str = "template"
    test_share: float = 0.1
    validation_share: float = 0.1
    seed: int = 0
    columns: tuple[str, ...] = ()
    twins: str = "together"

    @property
    def shares(self) -> dict[str, float]:
        held = {"validation": self.validation_share, "test": self.test_share}
        return {"train": 1 - sum(held.values()), **held}


def split(asked: SplitAsked) -> dict[str, Any]:
    """Write the split's folder and return its report; raises ConfigInvalid, DataInvalid, OutputExists, StorageFull."""
    _check(asked)
    columns = Columns(asked.columns)
    file = read_data(asked.data, columns)
    units = units_of(file, asked.by, columns, twins_together=asked.twins == "together")
    _check_units(file, units, asked)
    values = _labels(file)
    splits = assign(units, values, asked.shares, asked.seed)
    if asked.twins == "together":
        splits, moved = settled(file, units, splits)
    else:
        moved = 0
    _check_filled(splits, units, asked)
    report = _report(asked, file, units, splits, values) | {"moved_rows": moved}
    with disk_errors(asked.out), staged(asked.out) as staging:
        paths = _write(columns, file, splits, staging.result)
        report["leaks"] = _leaks({name: read_data(path) for name, path in paths.items()}, splits)
        text = json.dumps(report, ensure_ascii=False, indent=2) + "\n"
        (staging.result / REPORT).write_text(text, "utf-8")
    return report


def settled(file: DataFile, units: Sequence[str], splits: Sequence[str]) -> tuple[list[str], int]:
    """The splits without leaks, and how many rows it took: units of which a row still stands in an earlier split, as
    a long text in pieces of several rows does, go to training, until there is none."""
    places, moved = list(splits), 0
    while True:
        found = {units[index] for name in SPLITS[1:] for index in _leaking(file, places, name)}
        if not found:
            return places, moved
        for index, unit in enumerate(units):
            if unit in found:
                moved += places[index] != SPLITS[0]
                places[index] = SPLITS[0]


def _leaking(file: DataFile, splits: Sequence[str], name: str) -> list[int]:
    """Rows of the split that stand, nearly or quite, in one before it."""
    before = SPLITS[: SPLITS.index(name)]
    earlier = [row for row, split in zip(file.rows, splits, strict=True) if split in before]
    held = [index for index, split in enumerate(splits) if split == name]
    if not held:
        return []
    rows = [file.rows[index] for index in held]
    kinds = twins.leaks(Subject(replace(file, rows=earlier)), Subject(replace(file, rows=rows)))
    return [held[at] for found in kinds.values() for at in found]


def _check(asked: SplitAsked) -> None:
    for name, share in (("test-share", asked.test_share), ("validation-share", asked.validation_share)):
        if not 0 <= share < 1:
            raise ConfigInvalid(f"--{name} is {share:g}; it must be from 0 to below 1.", param=name)
    if not 0 < asked.test_share + asked.validation_share < 1:
        total = asked.test_share + asked.validation_share
        raise ConfigInvalid(f"Test and validation get {total:.0%} of the rows; leave some on each side.", param="out")
    if asked.twins not in TWINS:
        raise ConfigInvalid(f"--twins is {asked.twins[:80]!r}; it must be together or apart.", param="twins")
    if asked.data.is_dir() and asked.out.resolve().is_relative_to(asked.data.resolve()):
        raise ConfigInvalid(f"--out {asked.out} lies inside of the data; choose a folder beside it.", param="out")


def _check_units(file: DataFile, units: Sequence[str], asked: SplitAsked) -> None:
    largest, rows = Counter(units).most_common(1)[0]
    if rows <= LARGEST_SHARE * len(units):
        return
    first = file.where(file.rows[list(units).index(largest)])
    raise DataInvalid(
        f"{rows:,} of {len(units):,} rows belong together (by {asked.by}, twins {asked.twins}; the first is {first}): "
        "no split can keep them apart. Collect other rows, or choose another --by, or --twins apart and see the leaks.",
        param="by",
    )


def _check_filled(splits: Sequence[str], units: Sequence[str], asked: SplitAsked) -> None:
    empty = [name for name, share in asked.shares.items() if share > 0 and name not in splits]
    if empty:
        raise DataInvalid(
            f"Nothing is left for {' and '.join(empty)}: {len(units):,} rows make {len(set(units)):,} groups that stay "
            f"whole (by {asked.by}, twins {asked.twins}). Collect more, or give it a larger share.",
            param="by",
        )


def _labels(file: DataFile) -> list[str | None]:
    found = labels.detect(Subject(file))
    return list(found.values) if found else [None] * len(file.rows)


def _write(columns: Columns, file: DataFile, splits: Sequence[str], folder: Path) -> dict[str, Path]:
    """One JSONL file for each split, rows as they were found and in their order."""
    paths = {name: folder / f"{name}.jsonl" for name in SPLITS if name in splits}
    with ExitStack() as stack:
        files = {name: stack.enter_context(path.open("x", encoding="utf-8")) for name, path in paths.items()}
        for index, value in kept_records(file, columns):
            if index is not None:
                files[splits[index]].write(as_line(value))
    return paths


def _leaks(written: Mapping[str, DataFile], splits: Sequence[str]) -> dict[str, dict[str, int]]:
    """What was written is read: each split has its rows, and so many of a later one stand in an earlier one."""
    expected = Counter(splits)
    if any(len(file.rows) != expected[name] for name, file in written.items()):
        raise DataInvalid("What was written has another number of rows than the split; begin again.", param="out")
    found: dict[str, dict[str, int]] = {}
    for name, file in written.items():
        before = [
            row for earlier in SPLITS[: SPLITS.index(name)] if earlier in written for row in written[earlier].rows
        ]
        if before:
            kinds = twins.leaks(Subject(replace(file, rows=before)), Subject(file))
            found[name] = {kind: len(rows) for kind, rows in kinds.items()}
    return found


def _report(
    asked: SplitAsked, file: DataFile, units: Sequence[str], splits: Sequence[str], values: Sequence[str | None]
) -> dict[str, Any]:
    sizes = Counter(units)
    counts = {name: splits.count(name) for name in SPLITS if name in splits}
    report: dict[str, Any] = {
        "format": FORMAT,
        "data": file.path.name,
        "digest": file.digest,
        "by": asked.by,
        "twins": asked.twins,
        "seed": asked.seed,
        "shares": asked.shares,
        "rows": counts,
        "groups": {name: len({u for u, s in zip(units, splits, strict=True) if s == name}) for name in counts},
        "largest_group_rows": max(sizes.values()),
    }
    if any(value is not None for value in values):
        table = Counter(zip(values, splits, strict=True))
        names = sorted({value for value in values if value is not None})
        report["labels"] = {label: {name: table[label, name] for name in counts} for label in names}
        report["labels_missing"] = {
            name: missing for name in counts if (missing := [label for label in names if not table[label, name]])
        }
    return report
