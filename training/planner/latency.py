"""How fast a base answers one user: decoding reads every weight once a token, so bytes over bandwidth is its floor.

TPOT >= (weights + adapter) / bandwidth           (arXiv 2211.05102, memory-bound decoding at a batch of one)
"""

from __future__ import annotations

from typing import Any

from training.planner.sizes import Architecture
from training.planner.target import Target

SERVED_ITEMSIZE = {"cuda": 2}  # the server computes in 16 bits on a GPU, the embedded base in float32 on a CPU
REACHED_BANDWIDTH = 0.7  # of the data sheet's: judged
THOUGHT_TOKENS = 800  # that a reasoning answer spends before it answers: judged; count your own
ROOM_FOR_CACHE = 0.85  # of the memory for weights, the rest for keys and values


def served_bytes(of: Architecture, target: Target, rank: int) -> int:
    """Weights that a decoded token reads; an embedding that is not tied is looked up, not read."""
    itemsize = SERVED_ITEMSIZE.get(target.device, 4 if of.dtype == "float32" or not target.has_bfloat16 else 2)
    read = of.linear_parameters + of.vocabulary * of.hidden + of.small_parameters
    return itemsize * (read + of.lora_parameters(rank))


def milliseconds_a_token(of: Architecture, target: Target, rank: int) -> float:
    """The floor of the time per output token, one request at a time."""
    reached = 1.0 if target.device == "cpu" else REACHED_BANDWIDTH
    bandwidth = next(iter(target.rates.values())).bandwidth_bytes
    return 1000 * served_bytes(of, target, rank) / (reached * bandwidth)


def latency(of: Architecture, target: Target, rank: int, wanted: float | None) -> dict[str, Any]:
    """The floor, whether it is within the wanted one, and what reasoning adds."""
    each = milliseconds_a_token(of, target, rank)
    return {
        "ms_per_token": each,
        "is_within": None if wanted is None else each <= wanted,
        "fits_to_serve": served_bytes(of, target, rank) <= ROOM_FOR_CACHE * target.memory_bytes,
        "reasoning_seconds": THOUGHT_TOKENS * each / 1000 if of.thinks else None,
        "evidence": "weights over bandwidth, one request at a time; a floor, not measured",
    }
