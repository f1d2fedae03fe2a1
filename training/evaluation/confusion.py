"""What was taken for what: as a table of counts, and as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from training.printable import printable

MOST_LABELS = 30  # of the picture; the rest is one row and one column
REST = "(other labels)"
CELL, LETTERS, LETTER = 26, 20, 6.0  # a letter is so wide; names above stand at 50 degrees
SLANT, RISE = 0.64, 0.77


def matrix(
    pairs: Sequence[Mapping[str, Any]], most: int = MOST_LABELS
) -> tuple[list[str], list[str | None], list[list[int]]]:
    """(wanted labels, given labels with None for no label last, counts of each pair), the most wanted labels first."""
    wanted, given = Counter[str](), Counter[str]()
    for pair in pairs:
        wanted[pair["expected"]] += pair["rows"]
        if pair["given"] is not None:
            given[pair["given"]] += pair["rows"]
    names = sorted(set(wanted) | set(given), key=lambda name: (-wanted[name], -given[name], name))
    kept = set(names[:most])
    rows = [name for name in names[:most] if wanted[name]] + ([REST] if set(wanted) - kept else [])
    columns: list[str | None] = [*names[:most], *([REST] if set(given) - kept else []), None]
    counts = Counter[tuple[str, str | None]]()
    for pair in pairs:
        right = pair["expected"] if pair["expected"] in kept else REST
        answer = pair["given"] if pair["given"] is None or pair["given"] in kept else REST
        counts[right, answer] += pair["rows"]
    if not any(counts[row, None] for row in rows):
        columns.pop()
    return rows, columns, [[counts[row, column] for column in columns] for row in rows]


def confusion_svg(pairs: Sequence[Mapping[str, Any]]) -> str:
    """A heat map, each row shaded by the share of its label; every name is escaped."""
    rows, columns, counts = matrix(pairs)
    left, top = round(12 + LETTER * _longest(rows)), round(14 + RISE * LETTER * _longest(columns))
    margin = max(8, round(SLANT * LETTER * _longest(columns)))  # the last name leans out
    width, height = left + CELL * len(columns) + margin, top + CELL * len(rows) + 8
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="What was taken for what" '
        f'style="max-width:{min(width * 1.4, 900):.0f}px">'
    ]
    for at, column in enumerate(columns):
        x = left + CELL * at + CELL / 2
        parts.append(f'<text class="name" transform="translate({x:.1f} {top - 6}) rotate(-50)">{_name(column)}</text>')
    for line, (row, numbers) in enumerate(zip(rows, counts, strict=True)):
        y, total = top + CELL * line, max(1, sum(numbers))
        parts.append(
            f'<text class="name" text-anchor="end" x="{left - 6}" y="{y + CELL * 0.65:.1f}">{_name(row)}</text>'
        )
        for at, (column, number) in enumerate(zip(columns, numbers, strict=True)):
            kind = "right" if column == row else "wrong"
            parts.append(_cell(left + CELL * at, y, number, number / total, kind, f"{_name(row)} → {_name(column)}"))
    return "".join([*parts, "</svg>"])


def _cell(x: int, y: int, number: int, share: float, kind: str, title: str) -> str:
    opacity = 0.06 + 0.94 * share if number else 0.03
    box = f'<rect class="{kind}" x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill-opacity="{opacity:.2f}"/>'
    text = (
        f'<text class="{"on" if share > 0.5 else "off"}" text-anchor="middle" x="{x + CELL / 2:.1f}" '
        f'y="{y + CELL * 0.65:.1f}">{number}</text>'
    )
    return f"<g><title>{title}: {number}</title>{box}{text if number else ''}</g>"


def label_name(label: str | None) -> str:
    """A label on one line without control characters; what is no label is called so."""
    return "(no label)" if label is None else printable(label)


def _longest(labels: Sequence[str | None]) -> int:
    return max(len(label_name(label)[:LETTERS]) for label in labels)


def _name(label: str | None) -> str:
    shown = label_name(label)
    return escape(shown if len(shown) <= LETTERS else f"{shown[: LETTERS - 1]}…")
