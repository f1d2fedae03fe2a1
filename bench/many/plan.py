"""What is asked of every side: loads as seeded plans. The same seed gives the same plan, down to each token id.

Arrivals are a Poisson process. Popularity is Zipf's: the adapter of rank k is asked for k^-alpha times as often as the
first. Lengths are lognormal, most of them short and a few long, cut off at what a small machine answers within a
measurement.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

BASE = -1  # as a model: no adapter
VOCABULARY = range(100, 40_000)  # plain tokens of the embedded base
TENANTS = 4


@dataclass(frozen=True)
class Shot:
    """One request: when it is meant to be sent, to whom, how long, and the seed of its token ids."""

    at_seconds: float
    model: int  # BASE, or the adapter's number from 0
    prompt_tokens: int
    output_tokens: int
    seed: int

    @property
    def tenant(self) -> int:
        """Adapters are shared out over the tenants in turn, so that each has popular and rare ones."""
        return self.model % TENANTS

    def prompt(self) -> list[int]:
        """Its token ids; no two prompts begin alike, so that no prefix cache answers for an engine."""
        drawn = random.Random(self.seed)
        return [drawn.choice(VOCABULARY) for _ in range(self.prompt_tokens)]


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt or an answer: lognormal with this median and sigma, cut off at both ends; sigma 0 is fixed."""

    median: int
    sigma: float = 0.0
    least: int = 1
    most: int = 1 << 20

    def draw(self, chance: random.Random) -> int:
        drawn = self.median * math.exp(chance.gauss(0.0, self.sigma)) if self.sigma else float(self.median)
        return max(self.least, min(self.most, round(drawn)))

    @property
    def said(self) -> str:
        return f"lognormal, median {self.median}, sigma {self.sigma:g}, {self.least} to {self.most}"


@dataclass(frozen=True)
class Popularity:
    """Whom requests are for: `adapters` of 0 is the base only. alpha None is one after the other."""

    adapters: int
    alpha: float | None = None
    base_share: float = 0.0  # of requests that are for the base

    def draw(self, chance: random.Random, turn: int) -> int:
        if not self.adapters or (self.base_share and chance.random() < self.base_share):
            return BASE
        if self.alpha is None:
            return turn % self.adapters
        return chance.choices(range(self.adapters), zipf(self.adapters, self.alpha))[0]


@dataclass(frozen=True)
class Load:
    """One load. Open: `rate` requests a second whatever happens. Closed: `clients` that ask one after the other."""

    name: str
    popularity: Popularity
    prompt: Lengths
    output: Lengths
    rate: float | None = None
    clients: int = 0
    key: dict[str, float | str] = field(default_factory=dict, compare=False)  # columns that tell it in a table

    def shots(self, seed: int) -> Iterator[Shot]:
        """Requests without end, in order; those of an open load have their time, the others 0."""
        chance = random.Random(f"{self.name} {seed}")
        at = 0.0
        turn = 0
        while True:
            if self.rate is not None:
                at += chance.expovariate(self.rate)
            model = self.popularity.draw(chance, turn)
            prompt, output = self.prompt.draw(chance), self.output.draw(chance)
            yield Shot(at, model, prompt, output, chance.getrandbits(48))
            turn += 1

    def arrivals(self, seed: int, seconds: float) -> list[Shot]:
        """The requests of an open load that are meant to be sent within so many seconds."""
        if self.rate is None:
            raise ValueError(f"{self.name} is a closed load: its requests have no times.")
        found: list[Shot] = []
        for shot in self.shots(seed):
            if shot.at_seconds >= seconds:
                return found
            found.append(shot)
        raise AssertionError("shots have no end")


@cache
def zipf(count: int, alpha: float) -> tuple[float, ...]:
    """The share of each of `count` ranks, the most popular first; they add up to 1."""
    weights = [(rank + 1) ** -alpha for rank in range(count)]
    return tuple(weight / sum(weights) for weight in weights)


@dataclass(frozen=True)
class Classes:
    """Who counts as base, hot, warm or cold, by popularity: what is in a slot at an arrival no peer tells.

    Hot are so many of the most popular; warm, three times as many after them; cold, all others.
    """

    hot: int

    def of(self, model: int) -> str:
        if model == BASE:
            return "base"
        if model < self.hot:
            return "hot"
        return "warm" if model < 4 * self.hot else "cold"


CLASS_NAMES: Sequence[str] = ("base", "hot", "warm", "cold")
