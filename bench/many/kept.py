"""What was measured, as JSON lines that a later run goes on from, and which of it is still to be done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from bench.many.cases import Case
from bench.many.stats import Seen

SEED = 1000  # of the first round; the next ones count up


@dataclass
class Kept:
    """The measurements of one file. A line holds its case's digest, so that no two settings are mixed."""

    path: Path
    lines: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, cases: Sequence[Case]) -> Kept:
        """What the file has of these cases; raises ValueError where it was measured with other settings."""
        lines = [json.loads(text) for text in path.read_text("utf-8").splitlines()] if path.exists() else []
        wanted = {(case.table, case.name): digest(case) for case in cases}
        known = [line for line in lines if "start" in line or (line["table"], line["case"]) in wanted]
        others = [
            line["case"] for line in known if "case" in line and line["settings"] != wanted[line["table"], line["case"]]
        ]
        if others:
            raise ValueError(
                f"{path} holds {len(others)} measurements with other settings, the first of {others[0]!r}: give "
                "another folder with --out, or remove it."
            )
        return cls(path, known)

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def pending(self, cases: Sequence[Case], rounds: int) -> Iterator[tuple[int, Case, str]]:
        """What is still to be measured, rounds outermost; the order of the sides turns with each round."""
        done = {(line["round"], line["table"], line["case"], line["side"]) for line in self.lines if "round" in line}
        for turn in range(rounds):
            for case in cases:
                for side in case.sides if turn % 2 == 0 else reversed(case.sides):
                    if (turn, case.table, case.name, side) not in done:
                        yield turn, case, side

    def taken(self) -> str:
        """When and on which commits the sides ran."""
        starts = [line for line in self.lines if "start" in line]
        days, commits = ({line[key]: None for line in starts} for key in ("date", "commit"))
        return f"{', '.join(days)}, commit {', '.join(one[:10] + one[40:] for one in commits)}"

    def of(self, table: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("table") == table]


def line_of(turn: int, case: Case, side: str, seen: Sequence[Seen]) -> dict[str, Any]:
    """A measurement as a line; requests as rows of their fields, times to the tenth of a millisecond."""
    rows = [[round(value, 4) if isinstance(value, float) else value for value in astuple(one)] for one in seen]
    return {**head(turn, case, side), "seen": rows}


def head(turn: int, case: Case, side: str) -> dict[str, Any]:
    where = {"settings": digest(case), "table": case.table, "case": case.name, "side": side}
    return {**where, "round": turn, "seed": SEED + turn}


def seen_of(line: dict[str, Any]) -> list[Seen]:
    return [Seen(*row) for row in line["seen"]]


def digest(case: Case) -> str:
    """Of everything that decides what is measured; which sides are is not of it."""
    return hashlib.sha256(repr((case.table, case.name, case.load, case.window, case.setup)).encode()).hexdigest()[:12]
