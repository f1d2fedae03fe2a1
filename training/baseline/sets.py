"""Training, validation and test rows, each for its one job, and no row in two of them.

Training rows give examples and labels, validation rows choose a prompt, test rows are for the verdict alone. A row
whose question stands in an earlier set is left out and counted; a set of which many are so is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import DataInvalid
from training.data.columns import Columns
from training.data.rows import Row
from training.evaluate import Example, load_examples
from training.gate.subject import normal, question, system

MOST_SHARED = 0.2  # of a set's rows that may stand in an earlier one
NAMED = 20
SYSTEMS_VARY = 0.5  # different system prompts a row: above, they are a part of what is asked


@dataclass(frozen=True)
class Part:
    """One of the sets: the rows that are used, their digest, and the places of those left out."""

    name: str
    path: Path
    examples: list[Example]
    digest: str
    left_out: tuple[str, ...] = ()
    of: int = 0  # rows before only some were taken

    @property
    def rows(self) -> list[Row]:
        return [example.row for example in self.examples]

    @property
    def expected(self) -> list[str]:
        return [example.expected for example in self.examples]

    @property
    def questions(self) -> list[str]:
        return [asked_text(row) for row in self.rows]

    def first(self, most: int | None) -> Part:
        """At most so many of its rows, evenly spread."""
        if most is None or most >= len(self.examples):
            return self
        chosen = [self.examples[at] for at in evenly(len(self.examples), most)]
        return Part(self.name, self.path, chosen, self.digest, self.left_out, self.of)

    def as_dict(self) -> dict[str, Any]:
        return {
            "file": self.path.name,
            "digest": self.digest,
            "rows": len(self.examples),
            "of": self.of,
            "left_out": len(self.left_out),
            "left_out_places": list(self.left_out[:NAMED]),
        }


@dataclass(frozen=True)
class Sets:
    """The three sets; there is no test before there is something to judge."""

    training: Part
    validation: Part
    test: Part | None = None


def read_sets(training: Path, validation: Path, test: Path | None = None, columns: Columns | None = None) -> Sets:
    """Read the sets and keep them apart; raises DataInvalid for bad rows and for a set that is another one again."""
    trained = _part("training", training, load_examples(training, columns))
    whole = _part("validation", validation, load_examples(validation, columns))
    validated = _apart(whole, (trained,))
    if test is None:
        return Sets(trained, validated)
    return Sets(trained, validated, _apart(_part("test", test, load_examples(test, columns)), (trained, whole)))


def evenly(count: int, most: int) -> list[int]:
    """At most so many of `count` places, evenly spread."""
    return [int(at * count / most) for at in range(most)] if most < count else list(range(count))


def content_digest(rows: Iterable[Row]) -> str:
    """sha256 over what the rows say, whatever the file's form and order."""
    each = sorted(
        hashlib.sha256(json.dumps([row.messages, row.tools], sort_keys=True, default=str).encode()).hexdigest()
        for row in rows
    )
    return f"sha256:{hashlib.sha256(''.join(each).encode()).hexdigest()}"


def asked_text(row: Row) -> str:
    """What a model of words is given of a row: all that was said before the answer, less the system prompt."""
    return question(row) or system(row)


def _part(name: str, path: Path, examples: list[Example]) -> Part:
    return Part(name, path, examples, content_digest(example.row for example in examples), of=len(examples))


def _apart(part: Part, earlier: Sequence[Part]) -> Part:
    """The set without the rows that an earlier one has; raises DataInvalid where those are many, or all."""
    with_system = _systems_vary([row for one in (*earlier, part) for row in one.rows])
    seen: dict[str, str] = {}
    for one in earlier:
        seen |= {_key(row, with_system): one.name for row in one.rows}
    found = [(example, seen.get(_key(example.row, with_system))) for example in part.examples]
    shared = [(str(example.row.place), where) for example, where in found if where is not None]
    if len(shared) > MOST_SHARED * len(found):
        names = " and ".join(dict.fromkeys(where for _, where in shared))
        paths = ", ".join(str(one.path) for one in earlier if one.name in names)
        raise DataInvalid(
            f"{len(shared):,} of {len(found):,} rows of the {part.name} set {part.path} ask what stands in the {names} "
            f"set ({paths}), too; at most {MOST_SHARED:.0%} may. Give it rows of its own: `hotshoe data split` makes "
            "sets that share none.",
            param=part.name,
        )
    kept = [example for example, where in found if where is None]
    return Part(part.name, part.path, kept, part.digest, tuple(place for place, _ in shared), part.of)


def _key(row: Row, with_system: bool) -> str:
    said = normal(question(row))
    return f"{normal(system(row))}\n{said}" if with_system or not said else said


def _systems_vary(rows: Sequence[Row]) -> bool:
    return len({system(row) for row in rows}) > SYSTEMS_VARY * len(rows)
