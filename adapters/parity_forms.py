"""Another form of a merge (a GGUF file in llama.cpp, say) against base + adapter and against the merged folder.

Whoever runs the form gives answers as parity_answers has them. Two answers are compared token by token for as long as
both models have read the same: up to and with the first token that differs. There, over the tokens that both name,

    |d|  = |log p - log q|
    KL   = sum p log(p / q) over those tokens and one more for all others, which is at most the whole vocabulary's

A form in 32 or 16 bits is judged; a quantised one is reported, and fails where it is so far off that something other
than quantising must be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adapters.parity_answers import Answer, compare_answers, first_difference

# (mean |d| and gap of a first difference, in nats). llama.cpp rounds what it multiplies 16-bit weights with to 16 bits,
# and its cache too: a relative 2^-9 (bfloat16) or 2^-12 (float16) in each of some 400 products, which as a random walk
# is 0.04 and 0.005 of a logit's spread of a few nats. The limits are some times that; a lost update is far beyond them.
FLOAT_LIMITS = {"F32": (0.02, 0.2), "F16": (0.05, 0.5), "BF16": (0.25, 2.0)}
# Mean KL, in nats. llama.cpp's own table for an 8B model (examples/perplexity/README.md, its "LLaMA 3 8b Scoreboard")
# has 0.0014 for q8_0, 0.005 to 0.072 for q6_K to q4_0, 0.1 to 0.45 for q3_K and q2_K. Small models lose more, so the
# limits are some times that: beyond them it is a swapped head, a lost update or a wrong vocabulary: whole nats.
QUANTISED_LIMITS = (("Q8", 0.1), ("Q6", 0.5), ("Q5", 0.5), ("Q4", 0.5), ("IQ4", 0.5))
COARSEST_LIMIT = 1.5
LEAST = 1e-12  # of a probability that is left over: never log 0


def compare_form(
    name: str, dtype: str, peft: Sequence[Answer], merged: Sequence[Answer], other: Sequence[Answer]
) -> dict[str, Any]:
    """The form's `other` answers against those of base + adapter and of the merged folder, and its `problems`.

    Raises ValueError where the form did not answer the same prompts.
    """
    gap = FLOAT_LIMITS[dtype][1] if dtype in FLOAT_LIMITS else math.inf
    against_peft = _against(peft, other, gap)
    return {
        "name": name,
        "dtype": dtype,
        "is_judged": dtype in FLOAT_LIMITS,
        "against_peft": against_peft,
        "against_merged": _against(merged, other, gap),
        "problems": list(_problems(name, dtype, against_peft)),
    }


def quantised_limit(dtype: str) -> float:
    """The mean KL, in nats, beyond which a quantised form is not just quantised."""
    return next((limit for prefix, limit in QUANTISED_LIMITS if dtype.upper().startswith(prefix)), COARSEST_LIMIT)


def _against(reference: Sequence[Answer], other: Sequence[Answer], gap: float) -> dict[str, Any]:
    ended = [_with_its_end(*pair) for pair in zip(reference, other, strict=True)]
    answers = compare_answers(reference, ended, gap)
    steps = [step for pair in zip(reference, ended, strict=True) for step in _steps(*pair)]
    differences = [difference for step in steps for difference in step[0]]
    divergences = [step[1] for step in steps]
    return {
        **answers,
        "positions": len(steps),
        "log_probabilities": len(differences),
        "max_abs": _figure(max(differences, default=0.0)),
        "mean_abs": _figure(sum(differences) / max(1, len(differences))),
        "max_kl": _figure(max(divergences, default=0.0)),
        "mean_kl": _figure(sum(divergences) / max(1, len(divergences))),
        "top1_agreement": _figure(sum(step[2] for step in steps) / max(1, len(steps))),
    }


def _with_its_end(reference: Answer, other: Answer) -> Answer:
    """A runner may leave out the stop token of its answer; where the reference ended just there, it is put back."""
    index, length = first_difference(reference, other), len(other["greedy"])
    if index is None or index < length or len(reference["greedy"]) != length + 1:
        return other
    return {**other, "greedy": list(reference["greedy"])}


def _steps(reference: Answer, other: Answer) -> list[tuple[list[float], float, bool]]:
    """(differences, KL, same token) of every step at which both had read the same."""
    index = first_difference(reference, other)
    last = len(reference["greedy"]) if index is None else index + 1
    made = []
    for step, (one, two) in enumerate(zip(reference["top"][:last], other["top"][:last], strict=False)):
        p, q = ({int(token): float(value) for token, value in side.items()} for side in (one, two))
        both = p.keys() & q.keys()
        pairs = [(p[token], q[token]) for token in sorted(both)]
        made.append(([abs(a - b) for a, b in pairs], _divergence(pairs), step != index))
    return made


def _divergence(pairs: Sequence[tuple[float, float]]) -> float:
    rest_p, rest_q = (max(LEAST, 1 - sum(math.exp(pair[side]) for pair in pairs)) for side in (0, 1))
    named = sum(math.exp(p) * (p - q) for p, q in pairs)
    return max(0.0, named + rest_p * math.log(rest_p / rest_q))


def _problems(name: str, dtype: str, found: Mapping[str, Any]) -> Iterator[str]:
    if dtype not in FLOAT_LIMITS:
        limit = quantised_limit(dtype)
        if not found["mean_kl"] <= limit:
            yield f"{name}: mean KL to base + adapter is {found['mean_kl']:g} nats; quantising alone is below {limit:g}"
        return
    limit, gap = FLOAT_LIMITS[dtype]
    if not found["mean_abs"] <= limit:
        yield f"{name}: log-probabilities are {found['mean_abs']:g} nats off in the mean, the limit is {limit:g}"
    if count := found["beyond_rounding"]:
        yield f"{name}: {count} of {found['prompts']} answers part from PEFT's over more than {gap:g} nats"


def _figure(value: float) -> float:
    return float(f"{value:.6g}")
