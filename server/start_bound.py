"""Within which time every admitted request starts, as a function of its queue and of the time that a slot takes.

With S the longest time that a request runs (loads included, and at least SERVICE_SECONDS_AT_START), M places, N with
the spare ones, F flows that have requests, W the sum of their weights, w the flow's own and v the least weight, P the
patience, Q the ceiling of a quantum, and b the waiting requests of the own flow that came before or within P after it:

    place(b, w) = S * (W / w * (N + 1 + b) / M + F / M + 3)     a request that only waits for a place
    turn        = P + Q + 2 * S + place(0, v)                   one slot changes its owner
    start       = (b + 1) * ((F + W / w) * turn + place(b, w))  a request whose adapter has no slot

`place`: while it waits all places are taken, so the others use M seconds of them each second; a flow is preferred only
while it was charged less, and what is charged more than the flows began with is at most (N + 1 + b) * S / w. `turn`:
an adapter that has just lost its slot is out of it in S; from its patience's end on another slot is closed once that
one's quantum is over, and is empty S later; then the flow whose turn it is waits for a place as if nothing of it were
older. Between two turns of one flow each other has at most 1 + w_i / w, and each of its turns starts the request or one
that came before it. No other tenant's number of waiting requests is in the bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from server.admission import Limits
from server.shares import SERVICE_SECONDS_AT_START


@dataclass(frozen=True, slots=True)
class Load:
    """What the bound depends on beside the limits."""

    service_seconds: float  # the longest that a request runs
    flows: int
    weights: float  # their sum
    least_weight: float


def place_bound_seconds(limits: Limits, load: Load, weight: float, before: int) -> float:
    """The longest wait of a request that needs no slot, or whose adapter's slot is open."""
    longest, places = max(load.service_seconds, SERVICE_SECONDS_AT_START), limits.max_running
    charged = places + limits.spare + 1 + before
    return longest * (load.weights / weight * charged / places + load.flows / places + 3)


def start_bound_seconds(limits: Limits, load: Load, weight: float, before: int) -> float:
    """The longest wait of a request whose adapter has no slot."""
    longest = max(load.service_seconds, SERVICE_SECONDS_AT_START)
    turn = limits.patience_seconds + limits.quantum.ceiling_seconds + 2 * longest
    turn += place_bound_seconds(limits, load, load.least_weight, 0)
    turns = load.flows + load.weights / weight
    return (before + 1) * (turns * turn + place_bound_seconds(limits, load, weight, before))
