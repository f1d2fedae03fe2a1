"""Whose turn it is in a queue that tenants share: a flood of one costs another the wait for one piece of work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar


class Waiting(Protocol):
    """Something in a queue."""

    @property
    def id(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def created_at(self) -> float: ...


T = TypeVar("T", bound=Waiting)


@dataclass(frozen=True, slots=True)
class Turn:
    """What decides whether it is a tenant's turn: what runs, how many may, and when its last one was begun."""

    running: int = 0
    most: int | None = None
    last_begun: float = 0.0


def choose(waiting: Sequence[T], turns: Mapping[str, Turn]) -> T | None:
    """The one whose turn it is, of those whose tenant may have one more running.

    First come tenants with the fewest running, of these the one that has waited longest since one of its was begun;
    of a tenant's own the oldest.
    """
    may = [one for one in waiting if (turn := turns[one.tenant]).most is None or turn.running < turn.most]

    def order(one: T) -> tuple[int, float, float, str]:
        turn = turns[one.tenant]
        return (turn.running, turn.last_begun, one.created_at, one.id)

    return min(may, key=order, default=None)
