"""The curve of a run as one SVG picture: both losses over the steps, with axes; the learning rate as a faint line.

It is drawn from a card's numbers alone, which may be anybody's: whatever is no finite number is left out, and no text
from the card goes into the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Points = list[tuple[float, float]]

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 40
MOST_POINTS = 1200
LARGEST = 1e12  # numbers above it are no losses and no steps
SMOOTHING = 0.8


def curve_svg(curve: Any, base_loss: float | None = None, best_step: float | None = None) -> str:
    """The picture; empty where there are fewer than two training points. `base_loss` is a dashed level."""
    if not isinstance(curve, dict):
        return ""
    training, validation, rate = (points(curve.get(key)) for key in ("training", "validation", "learning_rate"))
    if len(training) < 2:
        return ""
    frame = _Frame(
        max(step for step, _ in training + validation),
        max(value for _, value in [*training, *validation, *([(0.0, base_loss)] if base_loss is not None else [])]),
    )
    parts = [*_axes(frame), *_rate(frame, rate), _line(frame, training, "raw"), _line(frame, smooth(training), "loss")]
    if base_loss is not None:
        y = frame.y(base_loss)
        parts.append(f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    if validation:
        parts.append(_line(frame, validation, "validation"))
        parts += [_dot(frame, point, is_best=point[0] == best_step) for point in validation]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Training and validation loss over the steps" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def points(value: Any) -> Points:
    """The finite (step, value) pairs of a list, in order of steps; evenly thinned above 1,200."""
    if not isinstance(value, list):
        return []
    found = sorted(
        (float(pair[0]), float(pair[1]))
        for pair in value
        if isinstance(pair, list | tuple) and len(pair) == 2 and all(is_number(part) and part >= 0 for part in pair)
    )
    stride = math.ceil(len(found) / MOST_POINTS) or 1
    return found[::stride]


def is_number(value: Any) -> bool:
    """A finite number of a size that can be drawn; True is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def smooth(values: Points) -> Points:
    """An exponential moving average whose beginning is not pulled to zero."""
    made, mean, weight = [], 0.0, 0.0
    for step, value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        made.append((step, mean / weight))
    return made


def ticks(most: float, about: int = 5) -> list[float]:
    """Round values from 0 to at most `most`, about so many."""
    if most <= 0:
        return [0.0]
    rough = most / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * index for index in range(int(most / step + 1e-9) + 1)]


class _Frame:
    """From steps and losses to places in the picture."""

    def __init__(self, last_step: float, largest: float) -> None:
        self.last_step = max(1.0, last_step)
        self.largest = max(1e-9, largest) * 1.04

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / self.last_step

    def y(self, loss: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * loss / self.largest


def _axes(frame: _Frame) -> list[str]:
    parts = []
    for loss in ticks(frame.largest):
        y = frame.y(loss)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{loss:g}</text>')
    for step in ticks(frame.last_step, 8):
        x = frame.x(step)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step:g}</text>')
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts.append(f'<text class="tick" x="{WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    parts.append(
        f'<text class="tick" x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">loss</text>'
    )
    return parts


def _rate(frame: _Frame, rate: Points) -> list[str]:
    """The learning rate, its highest at four fifths of the height."""
    highest = max((value for _, value in rate), default=0.0)
    if not highest:
        return []
    return [_line(frame, [(step, value / highest * frame.largest * 0.8) for step, value in rate], "rate")]


def _line(frame: _Frame, values: Sequence[tuple[float, float]], kind: str) -> str:
    places = " ".join(f"{frame.x(step):.1f},{frame.y(value):.1f}" for step, value in values)
    return f'<polyline class="{kind}" points="{places}"/>'


def _dot(frame: _Frame, point: tuple[float, float], is_best: bool) -> str:
    kind, radius = ("best", 5) if is_best else ("dot", 3)
    return f'<circle class="{kind}" cx="{frame.x(point[0]):.1f}" cy="{frame.y(point[1]):.1f}" r="{radius}"/>'
