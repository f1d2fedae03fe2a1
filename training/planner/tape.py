"""A program's memory without its numbers: which buffers are alive while it runs forward and backward.

A `Value` is a tensor that has a size and no content. Its `Storage` counts from its making until nothing holds it any
more: a local name, a node that saved it, or a gradient under way. So a model's program, written with these, has
the lifetimes that the real one has in Python and autograd, and its peak is found by running it, in milliseconds.

Backward follows torch's engine: of the nodes whose gradient is whole the youngest goes first, leaves before all; what a
node saved goes when it has run; two gradients of one value are added into a third buffer.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Backward = Callable[["Storage"], Sequence["Storage | None"]]
LEAF_FIRST = 1 << 60


ACTIVATIONS, LOGITS, GRADIENTS, WEIGHTS = range(4)  # what a buffer is, for the parts of the peak


class Arena:
    """Counts the bytes that are alive by what they are, and keeps the counts of the moment when there were most."""

    def __init__(self) -> None:
        self.live = [0, 0, 0, 0]
        self.live_bytes = 0
        self.peak_bytes = 0
        self.peak = (0, 0, 0, 0)
        self.nodes = 0

    def new(self, size: int, kind: int = ACTIVATIONS) -> Storage:
        """A buffer of `size` bytes that is alive until nothing refers to it."""
        return Storage(self, size, kind)

    def count(self, size: int, kind: int) -> None:
        """Bytes that came (or went, below 0)."""
        self.live[kind] += size
        self.live_bytes += size
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            self.peak = (self.live[0], self.live[1], self.live[2], self.live[3])


class Storage:
    """Bytes that count while this object is referred to."""

    __slots__ = ("arena", "kind", "size")

    def __init__(self, arena: Arena, size: int, kind: int = ACTIVATIONS) -> None:
        self.arena, self.size, self.kind = arena, size, kind
        arena.count(size, kind)

    def __del__(self) -> None:
        self.arena.count(-self.size, self.kind)

    def becomes(self, kind: int) -> None:
        """The same bytes are something else from now on."""
        self.arena.live[self.kind] -= self.size
        self.arena.live[kind] += self.size
        self.kind = kind


@dataclass(eq=False)
class Node:
    """How a value was made: `parents` in the order of `backward`'s gradients; None where none is wanted."""

    order: int
    parents: tuple[Node | None, ...]
    backward: Backward | None  # None for a leaf
    saved: tuple[Storage, ...] = ()
    gradient: Storage | None = None  # of a leaf, after backward


@dataclass(eq=False)
class Value:
    """`count` numbers of `itemsize` bytes in `storage`; it has a node where its gradient is wanted."""

    arena: Arena
    count: int
    itemsize: int
    storage: Storage
    node: Node | None = None

    @property
    def size(self) -> int:
        return self.count * self.itemsize


def constant(arena: Arena, count: int, itemsize: int, kind: int = ACTIVATIONS) -> Value:
    """A value whose gradient nobody wants."""
    return Value(arena, count, itemsize, arena.new(count * itemsize, kind))


def leaf(arena: Arena, count: int, itemsize: int) -> Value:
    """A trained weight: the graph begins there, and its gradient stays."""
    value = constant(arena, count, itemsize, WEIGHTS)
    value.node = new_node(arena, (), None, (), LEAF_FIRST)
    return value


def made(
    arena: Arena,
    count: int,
    itemsize: int,
    parents: Sequence[Value],
    saved: Sequence[Storage] = (),
    backward: Backward | None = None,
) -> Value:
    """A new value from `parents`. Without `backward` each wanted gradient is one buffer of its parent's size."""
    value = constant(arena, count, itemsize)
    nodes = tuple(parent.node for parent in parents)
    if any(node is not None for node in nodes):
        value.node = new_node(arena, nodes, backward or _plain(arena, parents), tuple(saved))
    return value


def passed_on(value: Value, parents: Sequence[Value], storage: Storage) -> Value:
    """A value in `storage` whose gradient goes to every parent as it is: an addition, or a view."""
    nodes = tuple(parent.node for parent in parents)
    node = None
    if any(made is not None for made in nodes):
        node = new_node(value.arena, nodes, lambda gradient: [gradient] * len(nodes))
    return Value(value.arena, value.count, value.itemsize, storage, node)


def run_backward(root: Value, gradient: Storage) -> None:
    """Send `gradient` of `root` down the graph; gradients of leaves stay with them, a second one is added in place."""
    if root.node is None:
        raise ValueError("The value has no gradient: it depends on no leaf.")
    _Engine(root.node).run(gradient)


def new_node(
    arena: Arena,
    parents: tuple[Node | None, ...],
    backward: Backward | None,
    saved: tuple[Storage, ...] = (),
    by: int = 0,
) -> Node:
    """A node younger than all before it; `by` puts it further ahead."""
    arena.nodes += 1
    return Node(by + arena.nodes, parents, backward, saved)


def _plain(arena: Arena, parents: Sequence[Value]) -> Backward:
    sizes = [parent.size if parent.node is not None else None for parent in parents]
    return lambda gradient: [None if size is None else arena.new(size) for size in sizes]


@dataclass
class _Engine:
    root: Node
    waiting: dict[Node, int] = field(default_factory=dict)
    arrived: dict[Node, Storage] = field(default_factory=dict)

    def run(self, gradient: Storage) -> None:
        self._count()
        self.arrived[self.root] = gradient
        del gradient
        ready = [(-self.root.order, self.root)]
        while ready:
            node = heapq.heappop(ready)[1]
            for parent in self._step(node, self.arrived.pop(node)):
                heapq.heappush(ready, (-parent.order, parent))

    def _count(self) -> None:
        """How many gradients each node waits for."""
        seen, stack = {self.root}, [self.root]
        while stack:
            for parent in stack.pop().parents:
                if parent is None:
                    continue
                self.waiting[parent] = self.waiting.get(parent, 0) + 1
                if parent not in seen:
                    seen.add(parent)
                    stack.append(parent)

    def _step(self, node: Node, gradient: Storage) -> list[Node]:
        """Run one node; returns the parents that have their whole gradient now."""
        if node.backward is None:
            if node.gradient is None:
                node.gradient = gradient
                gradient.becomes(GRADIENTS)
            return []
        found = list(node.backward(gradient))
        node.saved, node.backward = (), _spent
        del gradient
        ready = []
        for index, parent in enumerate(node.parents):
            given, found[index] = found[index], None
            if parent is None or given is None:
                continue
            self._arrive(parent, given)
            self.waiting[parent] -= 1
            if not self.waiting[parent]:
                ready.append(parent)
        return ready

    def _arrive(self, node: Node, gradient: Storage) -> None:
        held = self.arrived.get(node)
        self.arrived[node] = gradient if held is None else gradient.arena.new(gradient.size)


def _spent(gradient: Storage) -> Sequence[Storage | None]:
    raise RuntimeError("A node ran backward twice.")
