"""A data file as sequences to train on: rendered, measured against the longest length, and counted."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapters.errors import DataInvalid, Problem
from training.data.formats import DataFile, bad_rows
from training.data.jsontext import RowInvalid
from training.data.rows import Row
from training.data.template import IGNORED, ChatTemplate, Rendered

NAMED_ROWS = 20  # of cut and dropped rows, that many are named; all are counted
LONGER = "--over-long cut or drop, or a larger --max-length where the base's context allows one"


@dataclass
class Prepared:
    """The sequences of one file or share of it, and what became of its rows."""

    sequences: list[Rendered]
    rows: int
    cut: list[str] = field(default_factory=list)  # file:line of rows whose end was cut
    dropped: list[str] = field(default_factory=list)  # file:line of rows left out for their length
    owners: list[Row] = field(default_factory=list)  # the row that each sequence was made of
    lengths: dict[int, tuple[int, int]] = field(default_factory=dict)  # by a row's identity, before anything is cut

    @property
    def tokens(self) -> int:
        return sum(len(sequence.input_ids) for sequence in self.sequences)

    @property
    def supervised_tokens(self) -> int:
        return sum(sequence.supervised_tokens for sequence in self.sequences)

    @property
    def longest(self) -> int:
        return max((len(sequence.input_ids) for sequence in self.sequences), default=0)

    def as_dict(self) -> dict[str, Any]:
        """Its counts, for the card."""
        return {
            "rows": self.rows,
            "sequences": len(self.sequences),
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "longest_tokens": self.longest,
            "cut_rows": len(self.cut),
            "dropped_rows": len(self.dropped),
            "cut": self.cut[:NAMED_ROWS],
            "dropped": self.dropped[:NAMED_ROWS],
        }


def prepare(
    file: DataFile,
    rows: list[Row],
    template: ChatTemplate,
    *,
    max_length: int,
    over_long: str,
    supervise: str = "all",
    title: str | None = None,
    where: Callable[[Row], str] | None = None,
) -> Prepared:
    """Render the rows; raises DataInvalid with every row that the template or the longest length refuses.

    Where not all rows are the file's, `title` names the whole of them, and `where` gives a row's path and line.
    """
    title, where = title or str(file.path), where or file.where
    made = Prepared([], len(rows))
    problems: list[Problem] = []
    for row, sequences in zip(rows, template.render_all(rows, supervise), strict=True):
        if isinstance(sequences, RowInvalid):
            problems.append(sequences.problem(where(row)))
            continue
        made.lengths[id(row)] = lengths_of(sequences)
        refusal = _fit(made, row, sequences, max_length, over_long)
        if refusal is not None:
            problems.append(refusal.problem(where(row)))
        made.owners += [row] * (len(made.sequences) - len(made.owners))
    if problems:
        raise bad_rows(title, problems, len(rows))
    if not made.supervised_tokens:
        raise _nothing_left(title, made, max_length)
    return made


def lengths_of(sequences: Sequence[Rendered]) -> tuple[int, int]:
    """Of one row the tokens of its longest sequence, and those learned in all of them."""
    longest = max(len(sequence.input_ids) for sequence in sequences)
    return longest, sum(sequence.supervised_tokens for sequence in sequences)


def hold_out(rows: list[Row], wanted: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows): about so many by a seeded choice, equal conversations all on one side."""
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(repr((row.messages[:-1], row.tools)), []).append(index)
    order = sorted(groups)
    random.Random(seed).shuffle(order)  # noqa: S311 - a reproducible choice, no secret
    held: set[int] = set()
    for key in order:
        if len(held) >= wanted or len(held) + len(groups[key]) >= len(rows):
            break
        held.update(groups[key])
    kept = [row for index, row in enumerate(rows) if index not in held]
    return kept, [rows[index] for index in sorted(held)]


def duplicate_count(prepared: Prepared) -> int:
    """How many sequences repeat another one exactly."""
    counts = Counter(sequence.input_ids for sequence in prepared.sequences)
    return sum(count - 1 for count in counts.values())


def _fit(made: Prepared, row: Row, sequences: list[Rendered], max_length: int, over_long: str) -> RowInvalid | None:
    """Take the row's sequences, shortened where that is wanted; the problem of a row that is too long otherwise."""
    longest = max(len(sequence.input_ids) for sequence in sequences)
    if longest <= max_length:
        made.sequences += sequences
        return None
    if over_long == "error":
        message = f"{longest:,} tokens; at most {max_length:,} are allowed."
        return RowInvalid("row_too_long", message, LONGER)
    shortened = [_cut(sequence, max_length) for sequence in sequences] if over_long == "cut" else []
    kept = [sequence for sequence in shortened if sequence.supervised_tokens]
    made.sequences += kept
    (made.cut if kept else made.dropped).append(str(row.place))
    return None


def _nothing_left(title: str, made: Prepared, max_length: int) -> DataInvalid:
    """The error for rows that are all too long, each named."""
    message = f"none of its learned tokens is among the first {max_length:,}."
    problems = tuple(Problem("row_too_long", place, message) for place in made.dropped)
    return DataInvalid(
        f"{title} has no supervised token left: nothing would be learned. All {len(made.dropped):,} rows are "
        f"longer than {max_length:,} tokens; shorten what comes before the answers, or raise --max-length where the "
        "base's context allows it.",
        param="data",
        problems=problems,
    )


def _cut(sequence: Rendered, length: int) -> Rendered:
    labels = sequence.labels[:length]
    return Rendered(sequence.input_ids[:length], labels, sequence.turns) if any_label(labels) else _EMPTY


def any_label(labels: tuple[int, ...]) -> bool:
    return any(label != IGNORED for label in labels)


_EMPTY = Rendered((), (), ())
