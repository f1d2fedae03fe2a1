"""What of the comparison of logits and answers is rounding, and what is a bug: the limits, in one place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

TIMES_ROUNDING = 2  # merged may be as far from PEFT as PEFT's own rounded merge, so many times over
FLOAT32_SHARE = 1e-4  # of the largest logit: what the order of float32 sums leaves


def largest_explained(figures: Mapping[str, Any], figure: str = "max_abs") -> float:
    """The largest difference of logits that rounding and float32 sums explain, from the rounding floor of a set."""
    tolerance = FLOAT32_SHARE * max(1.0, float(figures["merged_against_peft"]["largest_logit"]))
    return TIMES_ROUNDING * float(figures["rounding_floor"][figure]) + tolerance


def largest_gap(figures: Mapping[str, Any]) -> float:
    """The gap between two tokens that differences of logits within the limit can close: each token moves by one."""
    return 2 * largest_explained(figures)


def logits_problems(logits: Mapping[str, Any]) -> list[str]:
    """What fails a comparison, for the probe and the evaluation each: empty when all is rounding."""
    return [problem for name, figures in sets_of(logits) for problem in _problems(name, figures)]


def sets_of(logits: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and figures of each set that was compared."""
    yield "probe", logits
    evaluation = logits.get("evaluation") or {}
    if "merged_against_peft" in evaluation:  # absent where no row of it could be used
        yield "evaluation", evaluation


def _problems(name: str, figures: Mapping[str, Any]) -> Iterator[str]:
    merged = figures["merged_against_peft"]
    for figure in ("max_abs", "mean_abs"):
        limit = largest_explained(figures, figure)
        if not merged[figure] <= limit:  # written so that NaN fails, too
            yield f"logits of the {name}: {figure} difference to PEFT is {merged[figure]:g}, the limit is {limit:g}"
    answers: Mapping[str, Any] | None = figures.get("answers")
    for difference in answers["merged_against_peft"]["first_differences"] if answers else ():
        if not difference["is_rounding"]:
            gap = "an end" if difference["gap"] is None else f"{difference['gap']:g} nats"
            yield (
                f"answers of the {name}: that to prompt {difference['prompt']} parts from PEFT's at token "
                f"{difference['token']} over {gap}; rounding closes at most {largest_gap(figures):g}"
            )
