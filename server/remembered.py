"""What was read of the registry, kept until the registry changes: this process is the only one that changes it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import TypeVar

from adapters.registry import Registry

MAX_KNOWN = 10_000
T = TypeVar("T")


class Remembered:
    """Answers by key. A read that raises is not kept."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._changes = -1
        self._known: dict[Hashable, object] = {}

    async def get(self, key: Hashable, read: Callable[[], T]) -> T:
        """What `read` gave for the key, in a thread, since the last change; one key always means the same read."""
        changes = self.registry.database.changes
        if changes != self._changes or len(self._known) >= MAX_KNOWN:
            self._changes, self._known = changes, {}
        if key in self._known:
            return self._known[key]  # type: ignore[return-value]
        found = await asyncio.to_thread(read)
        if self._changes == changes:  # else it may have been read before a change
            self._known[key] = found
        return found
