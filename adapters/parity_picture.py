"""The picture of a parity report: each measured difference beside rounding floor and limit, on a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, ROW_HEIGHT, LEFT, RIGHT = 720, 58, 34, 12
MOST_DECADES = 14


@dataclass(frozen=True)
class Bar:
    """One row. A value of 0 stands at the left end; `limit` is None where there is none to draw."""

    label: str
    measured: float
    floor: float
    limit: float | None = None


def picture_svg(bars: Sequence[Bar]) -> str:
    """SVG text of the rows; empty where nothing finite is above 0. Labels must need no escaping."""
    values = [value for bar in bars for value in (bar.measured, bar.floor, bar.limit or 0.0)]
    positive = [value for value in values if 0 < value < math.inf]
    if not positive:
        return ""
    high = math.ceil(math.log10(max(positive)) + 1e-9)
    low = max(high - MOST_DECADES, min(high - 1, math.floor(math.log10(min(positive)) - 1e-9)))
    scale = _Scale(low, high)
    height = ROW_HEIGHT * len(bars) + 26
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Measured differences beside rounding">']
    parts += _axis(scale, height - 26)
    for row, bar in enumerate(bars):
        parts += _row(bar, scale, ROW_HEIGHT * row)
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class _Scale:
    low: int
    high: int

    def at(self, value: float) -> float:
        """The x of a value; the left end for 0, the right one for what is not finite."""
        if value <= 0:
            return LEFT
        exponent = math.log10(value) if math.isfinite(value) else self.high
        share = (exponent - self.low) / (self.high - self.low)
        return round(LEFT + min(1.0, max(0.0, share)) * (WIDTH - LEFT - RIGHT), 1)


def _axis(scale: _Scale, bottom: int) -> list[str]:
    decades = range(scale.low, scale.high + 1)
    step = 1 if len(decades) <= 8 else 2
    return [
        f'<text class="soft" text-anchor="middle" x="{scale.at(10.0**d):g}" y="{bottom + 19}">{_power(d)}</text>'
        for d in list(decades)[1 if len(decades) > 3 else 0 :: step]
        if d != scale.high
    ]


def _power(exponent: int) -> str:
    return f"{10.0**exponent:g}" if -3 <= exponent <= 3 else f"1e{exponent}"


def _row(bar: Bar, scale: _Scale, top: int) -> list[str]:
    line, measured, floor = top + 36, scale.at(bar.measured), scale.at(bar.floor)
    is_beyond = bar.limit is not None and not bar.measured <= bar.limit
    decades = (f"{scale.at(10.0**d):g}" for d in range(scale.low, scale.high + 1))
    parts = [
        *(f'<line x1="{x}" x2="{x}" y1="{line - 11}" y2="{line + 11}"/>' for x in decades),
        f'<text x="0" y="{top + 15}">{bar.label}</text>',
        f'<text class="soft" text-anchor="end" x="{WIDTH}" y="{top + 15}">{figure(bar.measured)}, '
        f"rounding {figure(bar.floor)}</text>",
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{line}" y2="{line}"/>',
        f'<rect class="floor" x="{floor - 8:g}" y="{line - 8}" width="16" height="16" rx="2"/>',
    ]
    if bar.limit is not None:
        at = scale.at(bar.limit)
        parts.append(f'<rect class="beyond" x="{at - 1.5:g}" y="{line - 11}" width="3" height="22"/>')
    return [*parts, f'<circle class="{"beyond" if is_beyond else "measured"}" cx="{measured:g}" cy="{line}" r="5"/>']


def figure(value: float | None) -> str:
    """A figure as people read it: three digits; `not finite` for what is none."""
    if value is None or not math.isfinite(value):
        return "not finite"
    return "0" if value == 0 else f"{value:.3g}"
