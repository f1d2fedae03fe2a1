"""One picture for a table, as SVG: what it says at a glance. The figures themselves stand in the table.

Two kinds: bars for one number (with a line from the least to the greatest round), and ranges for p50, p95 and p99 on a
logarithmic scale. Ours is dark, peers are light; every mark is labelled where it stands, so that there is no legend.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

from bench.report import Report

WIDTH, LEFT, RIGHT, TOP, ROW, GROUP = 860, 190, 90, 64, 20, 26
OURS = "hotshoe"
DARK, LIGHT, INK, SOFT = "#0b5d8f", "#b4bcc4", "#1c2329", "#69747d"
STYLE = (
    f"text{{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;font-size:13px;fill:{INK}}}"
    f".title{{font-size:16px;font-weight:600}}.soft{{fill:{SOFT};font-size:12px}}.group{{font-weight:600}}"
)


@dataclass(frozen=True)
class Mark:
    """One row of a picture: a value with its least and greatest, or p50, p95 and p99 as `low`, `value` and `high`."""

    group: str
    side: str
    value: float
    low: float
    high: float
    said: str  # what is written beside it


def pictures(name: str, report: Report) -> Iterator[tuple[str, str]]:
    """File names without an ending, and their SVG."""
    if name in ("mix", "closed"):
        yield f"many-{name}", bars(report.title, marks(report, "load", "tokens/s", "min..max"))
    elif name == "first":
        yield "many-first", bars(report.title, marks(report, "load", "ms", "min..max"))
    elif name == "starts":
        yield "many-starts", bars(report.title, marks(report, "setup", "seconds", "min..max"))
    elif name == "open":
        title = "Goodput, requests/s that kept the bounds, of those offered"
        yield (
            "many-open",
            bars(title, marks(report, "load", "goodput/s", "min..max of goodput", of="offered requests/s")),
        )
    elif name == "classes":
        yield "many-classes", ranges("Time to the first token by class of adapter: p50, p95, p99", spans(report))
    elif name == "stalls":
        title = "Longest gap between tokens of a live stream, ms, medians"
        yield "many-stalls", bars(title, gaps(report))


def marks(report: Report, group: str, value: str, span: str, of: str = "") -> list[Mark]:
    """A mark a row; `of` is a column that is written behind the value."""
    found = []
    for row in report.rows:
        low, high = (float(one) for one in str(row[span]).split(".."))
        said = f"{row[value]:.3g}" + (f" of {row[of]:.3g}" if of else "")
        found.append(Mark(str(row[group]), str(row["side"]), row[value], low, high, said))
    return found


def gaps(report: Report) -> list[Mark]:
    kinds = ("normal gap, p50", "normal gap, p99", "gap, resident adapter asked", "gap, absent adapter asked")
    return [
        Mark(kind, row["side"], row[kind], row[kind], row[kind], f"{row[kind]:.3g}")
        for kind in kinds
        for row in report.rows
    ]


def spans(report: Report) -> list[Mark]:
    """The load that most sides had, of those the first: one message a picture."""
    loads = Counter(row["load"] for row in report.rows)
    shown = max(loads, key=loads.__getitem__, default="")
    found = []
    for kind in dict.fromkeys(row["class"] for row in report.rows):
        for row in report.rows:
            if row["class"] == kind and row["load"] == shown:
                low, value, high = (_number(row[f"TTFT p{share}"]) for share in (50, 95, 99))
                found.append(Mark(f"{kind} ({shown})", row["side"], value, low, high, _seconds(high)))
    return found


def bars(title: str, rows: Sequence[Mark]) -> str:
    """Horizontal bars from 0."""
    most = max((row.high for row in rows), default=0.0) or 1.0
    room = WIDTH - LEFT - RIGHT

    def draw(row: Mark, y: float) -> Iterator[str]:
        end = LEFT + room * row.value / most
        colour = DARK if row.side == OURS else LIGHT
        yield f'<rect x="{LEFT}" y="{y - 7:g}" width="{end - LEFT:.1f}" height="14" fill="{colour}"/>'
        low, high = (LEFT + room * one / most for one in (row.low, row.high))
        if high - low > 1:
            yield f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y:g}" y2="{y:g}" stroke="{INK}" stroke-width="1.2"/>'
        yield _text(max(end, high) + 6, y + 4, row.said)

    return _picture(title, rows, draw, "")


def ranges(title: str, rows: Sequence[Mark]) -> str:
    """A line from p50 to p99 with a dot at p95, on a logarithmic scale of milliseconds."""
    finite = [one for row in rows for one in (row.low, row.value, row.high) if 0 < one < math.inf]
    low = math.floor(math.log10(min(finite, default=1.0)))
    high = max(low + 1, math.ceil(math.log10(max(finite, default=10.0))))
    room = WIDTH - LEFT - RIGHT

    def x(value: float) -> float:
        exponent = high if not math.isfinite(value) else math.log10(max(value, 10.0**low))
        return LEFT + room * (exponent - low) / (high - low)

    def draw(row: Mark, y: float) -> Iterator[str]:
        colour = DARK if row.side == OURS else "#8b959d"
        yield (
            f'<line x1="{x(row.low):.1f}" x2="{x(row.high):.1f}" y1="{y:g}" y2="{y:g}" stroke="{colour}" '
            'stroke-width="5" stroke-linecap="round"/>'
        )
        yield f'<circle cx="{x(row.value):.1f}" cy="{y:g}" r="5.5" fill="{colour}" stroke="#fff"/>'
        yield _text(x(row.high) + 10, y + 4, row.said)

    ticks = "".join(
        f'<line x1="{x(10.0**d):.1f}" x2="{x(10.0**d):.1f}" y1="{TOP - 12}" y2="%BOTTOM%" stroke="#e4e8eb"/>'
        + _text(x(10.0**d), TOP - 18, _seconds(10.0**d), "soft", "middle")
        for d in range(low, high + 1)
    )
    return _picture(title, rows, draw, ticks)


def _picture(title: str, rows: Sequence[Mark], draw: Any, behind: str) -> str:
    parts, y = [], float(TOP)
    for group, members in groupby(rows, key=lambda row: row.group):
        parts.append(_text(8, y + 4, group, "group"))
        y += ROW if len(group) > 12 else 0  # a long name has a line of its own
        for row in members:
            parts.append(_text(LEFT - 10, y + 4, row.side, "" if row.side == OURS else "soft", "end"))
            parts += draw(row, y)
            y += ROW
        y += GROUP - ROW + 4
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:g}" role="img" aria-label="{escape(title)}">'
        f'<style>{STYLE}</style><rect width="{WIDTH}" height="{y:g}" fill="#fff"/>'
    )
    return "".join([head, _text(8, 24, title, "title"), behind.replace("%BOTTOM%", f"{y - 10:g}"), *parts, "</svg>\n"])


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "") -> str:
    more = (f' class="{kind}"' if kind else "") + (f' text-anchor="{anchor}"' if anchor else "")
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{escape(words)}</text>'


def _number(value: Any) -> float:
    return float(value) if isinstance(value, float) else math.inf


def _seconds(milliseconds: float) -> str:
    if not math.isfinite(milliseconds):
        return "never"
    return f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.3g} s"
