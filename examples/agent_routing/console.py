"""How the demo shows its steps and fails: a headline with the time, plain lines, one sentence when a bar is missed."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

STEPS = 8


class StepFailed(Exception):
    """A step did not reach what it must; the message is the plain sentence to print."""


@dataclass
class Console:
    """Prints the demo's progress; `seconds` keeps each step's time for the table."""

    begun: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def step(self, number: int, title: str) -> Iterator[None]:
        started = time.monotonic()
        self.say(f"\n[{number}/{STEPS}] {title}  (at {clock(started - self.begun)})")
        yield
        took = time.monotonic() - started
        self.seconds[f"{number}. {title}"] = took
        self.say(f"      done in {clock(took)}")

    def say(self, text: str = "") -> None:
        print(text, flush=True)

    def lines(self, text: str) -> None:
        """Several lines, set in under the step's headline."""
        for line in text.splitlines():
            self.say(f"      {line}")

    def progress(self, what: str, done: int, total: int) -> None:
        """One line that counts up: rewritten in place in a terminal, every quarter elsewhere."""
        if sys.stdout.isatty():
            print(f"\r      {what}: {done}/{total}", end="\n" if done == total else "", flush=True)
        elif done == total or done * 4 // total > (done - 1) * 4 // total:
            self.say(f"      {what}: {done}/{total}")


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def columns(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table as text: the first column left, the others right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
