"""How often test data was read, by whom, and what came of it: each look is one more chance to be fooled.

One JSON object a line, appended under a lock and fsynced: a `read` before anything is asked, a `found` after it. A read
without its find (a run that was cut off) counts as a comparison that showed nothing. A last line that a power cut tore
is passed over and said.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from adapters.durable import sync
from adapters.errors import ConfigInvalid

LEDGER_FILE = "test-readings.jsonl"


@dataclass(frozen=True)
class Look:
    """One comparison on test data: of what, by which measure, and the p of its lying on the margin."""

    subject: str
    measure: str
    p: float  # 1 where it was cut off


@dataclass(frozen=True)
class Reading:
    """This reading's number for its test data, from 1, and the other comparisons that the data was read for."""

    id: str
    number: int
    others: tuple[Look, ...]
    torn_lines: int = 0


class Ledger:
    """The readings of all test data on this machine, in one file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, test: str, subject: str, measure: str) -> Reading:
        """Count a reading of the test data with this digest; raises ConfigInvalid where it cannot be written down."""
        id = uuid4().hex
        entry = {"event": "read", "id": id, "test": test, "subject": subject, "measure": measure, "at": now()}
        with self._open() as file:
            entries, torn = _entries(file)
            _append(file, entry)
        mine = [one for one in entries if one.get("test") == test]
        reads = sum(one["event"] == "read" for one in mine)
        looks = tuple(look for look in _looks(mine) if (look.subject, look.measure) != (subject, measure))
        return Reading(id, reads + 1, looks, torn)

    def end(self, reading: Reading, test: str, p: float) -> None:
        """Write down what a reading found."""
        with self._open() as file:
            _append(file, {"event": "found", "id": reading.id, "test": test, "p": p, "at": now()})

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not self.path.exists()
            with self.path.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
            if is_new:
                sync(self.path.parent)
        except OSError as error:
            raise ConfigInvalid(
                f"The reading of test data cannot be written down in {self.path} ({error}): every one is counted. Name "
                "another file with --ledger.",
                param="ledger",
            ) from error


def _append(file: IO[bytes], entry: dict[str, Any]) -> None:
    """Add a line; after one that was torn, on a new one."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    start = b"\n" if size and file.read(1) != b"\n" else b""
    file.write(start + json.dumps(entry).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _entries(file: IO[bytes]) -> tuple[list[dict[str, Any]], int]:
    """All entries, and how many lines are none."""
    file.seek(0)
    entries, torn = [], 0
    for line in file.read().split(b"\n"):
        if not line:
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or entry.get("event") not in ("read", "found"):
                raise ValueError
        except ValueError:
            torn += 1
            continue
        entries.append(entry)
    return entries, torn


def _looks(entries: list[dict[str, Any]]) -> list[Look]:
    """The comparisons, the last of each subject by each measure."""
    found = {str(one["id"]): float(one["p"]) for one in entries if one["event"] == "found"}
    looks: dict[tuple[str, str], Look] = {}
    for one in entries:
        if one["event"] == "read":
            subject, measure = str(one["subject"]), str(one["measure"])
            before = looks.get((subject, measure))
            p = found.get(str(one["id"]), before.p if before is not None else 1.0)
            looks[subject, measure] = Look(subject, measure, p)
    return list(looks.values())


def now() -> str:
    """The time in UTC, as reports write it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
