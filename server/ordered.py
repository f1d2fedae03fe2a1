"""Items in the order of keys that change: a heap whose outdated entries are skipped when they come to the top."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heappush, nsmallest
from itertools import count
from typing import Any, Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)
SLACK = 64  # outdated entries that are borne before the heap is made anew


class Order(Generic[Item]):
    """The least item first, each under one key. Every change costs O(log n), seen over many."""

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, Item]] = []
        self._entries: dict[Item, tuple[Any, int, Item]] = {}
        self._numbers = count()  # equal keys keep the order in which they came, and items need no order

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: object) -> bool:
        return item in self._entries

    def __iter__(self) -> Iterator[Item]:
        """In no order."""
        return iter(self._entries)

    def put(self, item: Item, key: Any) -> None:
        """Add the item, or move it to another key."""
        entry = self._entries.get(item)
        if entry is not None and entry[0] == key:
            return
        entry = (key, next(self._numbers), item)
        self._entries[item] = entry
        heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + SLACK:
            self._heap = list(self._entries.values())
            heapify(self._heap)

    def drop(self, item: Item) -> None:
        """Take the item out, if it is there."""
        self._entries.pop(item, None)

    def first(self) -> Item | None:
        """The item with the least key."""
        heap, entries = self._heap, self._entries
        while heap and entries.get(heap[0][2]) is not heap[0]:
            heappop(heap)
        return heap[0][2] if heap else None

    def key(self, item: Item) -> Any:
        """The key that the item is under."""
        return self._entries[item][0]

    def least(self, number: int) -> list[Item]:
        """So many items with the least keys, in order; costs O(n)."""
        return [item for _, _, item in nsmallest(number, self._entries.values())]
