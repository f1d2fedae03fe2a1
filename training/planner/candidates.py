"""For one base, method and machine: the trainer's own settings, made to fit, with their memory, time and money."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from training.config import METHODS, SHARE_HELD_OUT, Facts, Settings, TrainingConfig, choose, held_out
from training.planner.peak import Peak, peak
from training.planner.seconds import Time, seconds
from training.planner.sizes import Architecture
from training.planner.target import ADAPTER_RUN_BYTES, Target
from training.planner.weights import fixed_bytes
from training.planner.work import ITEMSIZES, Method, Pass, method_of
from training.planner.workload import Workload, worst

PASS_TOKENS = (8192, 4096, 2048)


@dataclass(frozen=True)
class Candidate:
    """One way to train one base on one machine. `money` has an entry for each price."""

    base: Architecture
    settings: Settings
    method: Method
    target: Target
    peak: Peak
    time: Time
    money: tuple[dict[str, Any], ...]
    is_floor: bool = False  # its memory is a lower bound: not even the fixed bytes fit

    @property
    def fits(self) -> bool:
        """With the upper end of the error bar."""
        return self.peak.total * (1 + self.target.error[1]) <= self.target.memory_bytes

    @property
    def fits_barely(self) -> bool:
        """By the figure itself, not by its error bar."""
        return not self.fits and self.peak.total <= self.target.memory_bytes

    @property
    def dollars(self) -> float | None:
        return min((float(price["dollars"]) for price in self.money), default=None)

    def as_dict(self) -> dict[str, Any]:
        low, high = self.target.error
        total = self.peak.total
        return {
            "base": self.base.name,
            "parameters": self.base.parameters,
            "method": self.settings.method,
            "dtype": self.settings.dtype,
            "gradient_checkpointing": self.settings.gradient_checkpointing,
            "pass_size": self.settings.pass_size,
            "accumulation": self.settings.accumulation,
            "steps": self.settings.steps,
            "fits": self.fits,
            "fits_barely": self.fits_barely,
            "is_lower_bound": self.is_floor,
            "memory": {**self.peak.as_dict(), "low": total * (1 - low), "high": total * (1 + high)},
            "time": self.time.as_dict(),
            "money": list(self.money),
            "licence": self.base.licence,
            "thinks": self.base.thinks,
        }


@dataclass(frozen=True)
class Wishes:
    """What holds for all candidates: the largest rank that is served, the longest row, and the prices an hour."""

    max_rank: int
    max_length: int | None
    prices: tuple[dict[str, Any], ...]
    epochs: float | None = None


def candidates(of: Architecture, work: Workload, target: Target, wishes: Wishes) -> list[Candidate]:
    """One candidate for each method."""
    return [candidate(of, method, work, target, wishes) for method in METHODS]


def candidate(of: Architecture, method: str, work: Workload, target: Target, wishes: Wishes) -> Candidate:
    """The first settings that fit; where none do, the smallest ones."""
    tries = list(_tries(of, method, work, target, wishes))
    possible = [settings for settings in tries if _floor(of, settings, target) <= target.memory_bytes]
    if not possible:
        return _made(of, tries[0], work, target, wishes, is_floor=True)
    for settings in possible:
        tried = _made(of, settings, work, target, wishes)
        if tried.fits:
            break
    return tried


def _tries(of: Architecture, method: str, work: Workload, target: Target, wishes: Wishes) -> Iterator[Settings]:
    """From the fastest settings to those that need least."""
    dtypes: list[str | None] = [None]
    if target.device == "cuda" and not target.has_bfloat16 and method != "full":
        dtypes.append("float16")
    longest = work.lengths[-1]
    for dtype in dtypes:
        for checkpoints in (False, True):
            for tokens in (*PASS_TOKENS, 1):
                if tokens == 1 or tokens >= longest:
                    yield _chosen(of, method, work, target, wishes, dtype, checkpoints, tokens)


def _chosen(
    of: Architecture,
    method: str,
    work: Workload,
    target: Target,
    wishes: Wishes,
    dtype: str | None,
    checkpoints: bool,
    tokens: int,
) -> Settings:
    config = TrainingConfig(
        data=Path("data"),
        name="plan",
        method=method,  # type: ignore[arg-type]
        dtype=dtype,
        gradient_checkpointing=checkpoints,
        tokens_per_pass=tokens,
        max_length=wishes.max_length,
        epochs=wishes.epochs,
    )
    settings = choose(config, facts_of(of, work, target))
    rank = min(settings.rank, wishes.max_rank)
    return replace(settings, rank=rank, alpha=2.0 * rank)


def facts_of(of: Architecture, work: Workload, target: Target) -> Facts:
    """What `choose` asks about."""
    held = held_out(len(work.rows))
    return Facts(
        rows=len(work.rows) - held,
        longest_row_tokens=work.lengths[-1],
        has_validation=held > 0,
        parameters=of.linear_parameters + of.embedding_parameters,
        context_length_tokens=of.context_tokens,
        base_dtype=of.dtype,
        device=target.device,
        device_memory_bytes=target.memory_bytes,
        has_bfloat16=target.has_bfloat16,
    )


def _floor(of: Architecture, settings: Settings, target: Target) -> int:
    method = method_of(settings)
    return fixed_bytes(of, method, settings.optimizer).total + beside(of, method, target)


def beside(of: Architecture, method: Method, target: Target) -> int:
    """What the process or the GPU's context holds. On a CPU the pages of a base's file that was quantised stay mapped,
    because its embedding is used from there."""
    held = target.workspace_bytes
    if target.device == "cpu" and not method.trains_all:
        held += ADAPTER_RUN_BYTES
    if target.device == "cpu" and method.is_quantised:
        held += of.linear_parameters * ITEMSIZES.get(of.dtype, 2)
    return held


def _made(
    of: Architecture, settings: Settings, work: Workload, target: Target, wishes: Wishes, is_floor: bool = False
) -> Candidate:
    method = method_of(settings)
    passes = work.passes(settings.pass_size)
    if is_floor:
        fixed = fixed_bytes(of, method, settings.optimizer)
        found = Peak(fixed.weights, fixed.adapter, fixed.gradients, fixed.optimizer, 0, 0)
    else:
        found = peak_of(of, method, passes, settings)
    found = replace(found, workspace=beside(of, method, target))
    spent = time_of(of, method, passes, settings, work, target)
    hours = spent.total / 3600
    money = tuple({**price, "dollars": float(price["dollars_per_hour"]) * hours} for price in wishes.prices)
    return Candidate(of, settings, method, target, found, spent, money, is_floor)


def peak_of(of: Architecture, method: Method, passes: list[Pass], settings: Settings) -> Peak:
    """The largest peak among the passes that may have it."""
    accumulation = settings.accumulation
    moments = (peak(of, method, one, settings.optimizer, accumulation) for one in worst(passes))
    return max(moments, key=lambda moment: moment.total)


def time_of(
    of: Architecture, method: Method, passes: list[Pass], settings: Settings, work: Workload, target: Target
) -> Time:
    """Training and validations; without what a comparison with the base takes, a minute and a half at most."""
    rate = target.rates.get(method.itemsize) or target.rates[4]
    validated = 0.0
    if settings.evaluation_steps:
        held = held_out(len(work.rows), SHARE_HELD_OUT)
        validated = settings.steps / settings.evaluation_steps * held * work.tokens / len(work.rows)
    return seconds(of, method, passes, rate, settings.accumulation, settings.steps, validated)
