"""Which adapters own the engine's slots, and until when.

An adapter that is given a slot keeps it for a quantum that pays for its load: a multiple of the measured seconds of a
load, between a floor and a ceiling. After it the adapter goes on while nobody needs the slot; when somebody has waited
for one for `patience_seconds`, the slot with the fewest running requests is closed: what runs there ends, nothing of
it is added, and then the slot is free. Where that takes longer than the patience, one more is closed. An owner without
work gives its slot up to the first who needs it.
"""

from __future__ import annotations

from dataclasses import dataclass

from server.ordered import Order

SMOOTHING = 0.2
LOAD_SECONDS_AT_START = 0.1


@dataclass(frozen=True, slots=True)
class Quantum:
    """How long a slot is its owner's, of what a load takes."""

    loads: float = 10.0  # so many times the seconds of its load
    floor_seconds: float = 0.25
    ceiling_seconds: float = 5.0

    def seconds(self, load_seconds: float) -> float:
        return min(self.ceiling_seconds, max(self.floor_seconds, self.loads * load_seconds))


@dataclass(eq=False)
class Owner:
    """An adapter in a slot."""

    adapter: str
    opened_at: float
    ends_at: float  # of its quantum
    running: int = 0
    is_closing: bool = False
    closed_at: float = 0.0


class Slots:
    """The slots of one engine. An owner is open, idle (open, with nothing to do) or closing."""

    def __init__(self, number: int, quantum: Quantum) -> None:
        self.number = number
        self.quantum = quantum
        self.load_seconds = LOAD_SECONDS_AT_START
        self.turn_seconds = quantum.seconds(LOAD_SECONDS_AT_START)
        self.switches = 0
        self.owners: dict[str, Owner] = {}
        self._open: Order[Owner] = Order()  # with work, by the end of its quantum
        self._idle: Order[Owner] = Order()  # longest idle first
        self._closing: dict[Owner, None] = {}  # in the order in which they were closed

    def is_open(self, adapter: str | None) -> bool:
        """Requests for it may start in the slot that it has; the base needs none."""
        if adapter is None:
            return True
        owner = self.owners.get(adapter)
        return owner is not None and not owner.is_closing

    @property
    def has_room(self) -> bool:
        """A slot can be given to another adapter now."""
        return len(self.owners) < self.number or len(self._idle) > 0

    @property
    def coming(self) -> int:
        """Slots that are free, or will be without more being closed."""
        return self.number - len(self._open)

    def open(self, adapter: str, now: float) -> None:
        """Give the adapter a turn, in the place of the longest idle owner where no slot is free; needs `has_room`."""
        owner = self.owners.get(adapter)
        if owner is None:
            if len(self.owners) >= self.number:
                self._take_idle(now)
            owner = self.owners[adapter] = Owner(adapter, now, 0.0)
            self.switches += 1
        self._closing.pop(owner, None)
        owner.is_closing, owner.opened_at = False, now
        owner.ends_at = now + self.quantum.seconds(self.load_seconds)

    def loaded(self, adapter: str, seconds: float, now: float) -> None:
        """A load of the adapter took so long: its quantum is paid by it, never longer than the ceiling in all."""
        self.load_seconds += SMOOTHING * (seconds - self.load_seconds)
        owner = self.owners.get(adapter)
        if owner is not None and not owner.is_closing:
            latest = owner.opened_at + self.quantum.ceiling_seconds
            owner.ends_at = min(latest, max(owner.ends_at, now + self.quantum.seconds(seconds)))
            if owner in self._open:
                self._open.put(owner, owner.ends_at)

    def show_work(self, adapter: str, has_work: bool, now: float) -> None:
        """The owner has something running or waiting, or nothing: called after each change of either."""
        owner = self.owners.get(adapter)
        if owner is None or owner.is_closing:
            return
        if has_work:
            self._idle.drop(owner)
            self._open.put(owner, owner.ends_at)
        else:
            self._open.drop(owner)
            if owner not in self._idle:
                self._idle.put(owner, now)

    def close_one(self, now: float) -> str | None:
        """Close the slot that should be empty first: of those whose quantum has ended the one with the fewest requests
        running, and of these the one whose quantum ended first. None where none has ended. Costs O(slots)."""
        ended = [owner for owner in self._open if owner.ends_at <= now]
        owner = min(ended, key=lambda one: (one.running, one.ends_at), default=None)
        if owner is None:
            return None
        self._open.drop(owner)
        owner.is_closing, owner.closed_at = True, now
        self._closing[owner] = None
        self.free_if_drained(owner.adapter, now)
        return owner.adapter

    def slow(self, seconds: float, now: float) -> int:
        """How many closing slots are not empty after so long."""
        return sum(now - owner.closed_at >= seconds for owner in self._closing)

    def reopen_one(self) -> str | None:
        """The one that was closed last goes on, since nobody needs its slot any more."""
        if not self._closing:
            return None
        owner, _ = self._closing.popitem()
        owner.is_closing = False
        self._open.put(owner, owner.ends_at)
        return owner.adapter

    def free_if_drained(self, adapter: str, now: float) -> bool:
        """Free the slot of a closing owner whose last request has ended; whether it was one."""
        owner = self.owners.get(adapter)
        if owner is None or not owner.is_closing or owner.running:
            return False
        del self._closing[owner]
        self._free(owner, now)
        return True

    def _take_idle(self, now: float) -> None:
        owner = self._idle.first()
        if owner is None:
            raise RuntimeError("no slot has room: this is asked before")
        self._idle.drop(owner)
        self._free(owner, now)

    def _free(self, owner: Owner, now: float) -> None:
        del self.owners[owner.adapter]
        self.turn_seconds += SMOOTHING * (now - owner.opened_at - self.turn_seconds)
