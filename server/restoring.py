"""What is brought back into an engine that holds nothing: which warm versions, in what order; which not, and why."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from adapters.errors import EngineBusy, HotshoeError
from adapters.types import AdapterVersion

Key = tuple[str, str, int]


@dataclass(frozen=True, slots=True)
class Plan:
    """Versions to load, in this order, and those that stay out, each with its reason. They stay wanted all the same."""

    wanted: tuple[AdapterVersion, ...]
    left_out: Mapping[Key, HotshoeError]


def plan_restore(
    warm: Sequence[AdapterVersion],
    named: Collection[Key],
    staged_limit: int,
    misfit: Callable[[AdapterVersion], HotshoeError | None],
) -> Plan:
    """Decide. Where not all have room, those that an alias names come first, and then the newest."""
    troubles = {key_of(version): misfit(version) for version in warm}
    left_out = {key: trouble for key, trouble in troubles.items() if trouble is not None}
    fitting = [version for version in warm if key_of(version) not in left_out]
    ordered = sorted(fitting, key=lambda one: (key_of(one) not in named, -one.created_at))
    for version in ordered[staged_limit:]:
        left_out[key_of(version)] = EngineBusy(
            f"{len(ordered)} versions are wanted in the engine and {staged_limit} have room: a request for "
            f"{version.ref} loads it. Raise HOTSHOE_STAGED_LIMIT to have all of them back.",
            param="staged_limit",
        )
    return Plan(tuple(ordered[:staged_limit]), left_out)


def key_of(version: AdapterVersion) -> Key:
    return (version.tenant, version.name, version.number)
