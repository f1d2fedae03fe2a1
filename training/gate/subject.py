"""What the gate looks at: the rows that could be read, the places of those that could not, and the rows beside them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from adapters.errors import Problem
from training.data.formats import DataFile
from training.data.rows import Row
from training.gate.findings import KEPT_EXAMPLES, Example, Finding

SHOWN_LETTERS = 60


@dataclass(frozen=True)
class Subject:
    """One set of rows to check. `bad` has the first of its unreadable rows, `bad_count` says how many there are."""

    file: DataFile
    bad: Sequence[Problem] = ()
    bad_count: int = 0

    @classmethod
    def of_rows(cls, rows: Sequence[Row]) -> Self:
        """Rows of no file in particular, to be compared with one another."""
        return cls(DataFile(Path("rows"), list(rows), ""))

    @property
    def rows(self) -> list[Row]:
        return self.file.rows

    @property
    def of(self) -> int:
        """All rows, unreadable ones too."""
        return len(self.rows) + self.bad_count

    @cached_property
    def questions(self) -> list[str]:
        """Of each row what comes before its last learned turn, without the system prompt."""
        return [question(row) for row in self.rows]

    @cached_property
    def answers(self) -> list[str]:
        """Of each row its last learned turn."""
        return [answer(row) for row in self.rows]

    def finding(self, code: str, found: Sequence[int], detail: str = "", texts: Sequence[str] = ()) -> Finding:
        """A finding on the rows of these indices; `texts` are shown behind their places."""
        kept = zip(found[:KEPT_EXAMPLES], texts or [""] * len(found), strict=False)
        examples = tuple(Example(str(self.rows[index].place), shown(text)) for index, text in kept)
        return Finding(code, len(found), self.of, detail, examples, rows=tuple(found))


def question(row: Row) -> str:
    """What is asked: the turns before the last learned one, less system prompts, one below the other."""
    last = row.learned_turns()[-1]
    return "\n".join(said(message) for message in row.messages[:last] if message["role"] != "system")


def system(row: Row) -> str:
    """The system prompts, one below the other; "" where there is none."""
    return "\n".join(message["content"] for message in row.messages if message["role"] == "system")


def answer(row: Row) -> str:
    """What is learned last: its content, and its tool calls as JSON."""
    return said(row.messages[row.learned_turns()[-1]])


def said(message: Mapping[str, Any]) -> str:
    """A message's text, its reasoning left out, its tool calls as one line of JSON each."""
    calls = (json.dumps(call["function"], ensure_ascii=False, sort_keys=True) for call in message.get("tool_calls", ()))
    content = message["content"].rpartition("</think>")[2] if message["role"] == "assistant" else message["content"]
    return "\n".join(part for part in (content.strip(), *calls) if part)


def normal(text: str) -> str:
    """The text as two rows are compared: NFKC, letter case and white space of no account, less the final stop."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .!?。！？")


def shown(text: str) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_LETTERS else f"{line[: SHOWN_LETTERS - 1]}…"


def texts(row: Row) -> Iterator[str]:
    """Everything that is written in the row: contents, reasoning and the arguments of calls."""
    for message in row.messages:
        yield message["content"]
        if reasoning := message.get("reasoning_content"):
            yield reasoning
        for call in message.get("tool_calls", ()):
            yield json.dumps(call["function"]["arguments"], ensure_ascii=False)
