"""A data file as work: its rows' lengths, and the passes that batches of them make."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from statistics import mean
from typing import Any

from training.data.template import Rendered
from training.gate.amount import percentile
from training.planner.work import Pass

SAMPLED_PASSES = 240  # of a long run; the shuffles are seeded


@dataclass(frozen=True)
class Workload:
    """The rendered rows of a run."""

    rows: tuple[Rendered, ...]
    seed: int = 17
    known: dict[tuple[int, bool], list[Pass]] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def lengths(self) -> list[int]:
        return sorted(len(row.input_ids) for row in self.rows)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def passes(self, pass_size: int, shares_prefix: bool = True) -> list[Pass]:
        """The passes of some shuffled epochs, as many as a sample needs."""
        key = (pass_size, shares_prefix)
        if key not in self.known:
            self.known[key] = list(self._sampled(pass_size, shares_prefix))
        return self.known[key]

    def _sampled(self, pass_size: int, shares_prefix: bool) -> Iterator[Pass]:
        chance = random.Random(self.seed)  # noqa: S311 - a sample, no secret
        order = list(range(len(self.rows)))
        wanted = min(SAMPLED_PASSES, 3 * ceil(len(order) / pass_size))
        while wanted > 0:
            chance.shuffle(order)
            for start in range(0, len(order), pass_size):
                if wanted > 0:
                    yield pass_of([self.rows[index] for index in order[start : start + pass_size]], shares_prefix)
                wanted -= 1

    def as_dict(self) -> dict[str, Any]:
        lengths = self.lengths
        return {
            "sequences": len(self.rows),
            "tokens": sum(lengths),
            "supervised_tokens": sum(row.supervised_tokens for row in self.rows),
            "length_p50": percentile(lengths, 50),
            "length_p95": percentile(lengths, 95),
            "length_p99": percentile(lengths, 99),
            "length_max": lengths[-1],
        }


def pass_of(rows: Sequence[Rendered], shares_prefix: bool = True) -> Pass:
    """The pass that these rows make when they are packed."""
    prefix = _shared_prefix(rows) if shares_prefix else 0
    lengths = [row.used_tokens for row in rows]
    return Pass(
        rows=len(rows),
        prefix=prefix,
        longest_rest=max(lengths) - prefix,
        tokens=prefix + sum(length - prefix for length in lengths),
        supervised=sum(row.supervised_tokens for row in rows),
    )


def _shared_prefix(rows: Sequence[Rendered]) -> int:
    from training.packed import shared_prefix

    return shared_prefix(rows)


def worst(passes: Sequence[Pass]) -> list[Pass]:
    """The passes among which the largest peak is: most tokens, most padded rows, most supervised."""
    by_size = (
        lambda one: one.tokens,
        lambda one: one.rows * (one.prefix + one.longest_rest),
        lambda one: one.supervised,
    )
    return list(dict.fromkeys(max(passes, key=size) for size in by_size))


def average(passes: Sequence[Pass]) -> dict[str, float]:
    """What a pass has on average."""
    return {
        "tokens": mean(one.tokens for one in passes),
        "supervised": mean(one.supervised for one in passes),
        "attended": mean(attended(one) for one in passes),
    }


def attended(one: Pass) -> float:
    """Pairs of a query and a key that attention computes, causal halves counted."""
    return one.prefix**2 / 2 + one.rows * one.longest_rest * (one.prefix + one.longest_rest / 2)
