"""The loss at supervised positions as memory knows it: `training.loss`, a block of logits at a time."""

from __future__ import annotations

from collections.abc import Sequence

from training.planner.operators import FLOAT32_BYTES
from training.planner.sizes import Architecture
from training.planner.tape import GRADIENTS, LOGITS, Storage, Value, made
from training.planner.work import Pass

BLOCK_BYTES = 16_000_000  # of float32 logits at a time, as in training.loss
TELLING_BLOCKS = 3  # the first meets no block before it, the last is smaller


def supervised(hidden: Value, work: Pass, width: int) -> Value:
    """The states whose next token is learned: (supervised x width)."""
    arena, size = hidden.arena, hidden.size

    def backward(gradient: Storage) -> Sequence[Storage]:
        zeros = arena.new(size)
        scattered = arena.new(size)
        del zeros
        result = arena.new(size)
        del scattered
        return [result]

    return made(arena, work.supervised * width, hidden.itemsize, [hidden], (), backward)


def cross_entropy(states: Value, work: Pass, of: Architecture, output: Value | None, weight_itemsize: int) -> Value:
    """The summed loss; the states' gradient is made beside it, and the output weight's where that is trained."""
    arena = states.arena
    of_states = arena.new(states.size)
    of_weight = [arena.new(output.size, GRADIENTS)] if output is not None else []
    _blocks(states, work, of, output, weight_itemsize)

    def backward(gradient: Storage) -> Sequence[Storage | None]:
        scaled = [arena.new(storage_size, GRADIENTS) for storage_size in weight_sizes]
        return [arena.new(states_size), *scaled]

    weight_sizes = [output.size] if output is not None else []
    states_size = states.size
    parents = [states, *([output] if output is not None else [])]
    return made(arena, 1, FLOAT32_BYTES, parents, (of_states, *of_weight), backward)


def _blocks(states: Value, work: Pass, of: Architecture, output: Value | None, itemsize: int) -> None:
    """The loop's buffers: a block's logits are alive until the next block's are made."""
    arena = states.arena
    most = max(1, BLOCK_BYTES // (FLOAT32_BYTES * of.vocabulary))
    logits = None
    for index in range(min(TELLING_BLOCKS, -(-work.supervised // most))):
        size = min(most, work.supervised - index * most) * of.vocabulary
        if itemsize == FLOAT32_BYTES:
            logits = arena.new(size * FLOAT32_BYTES, LOGITS)
        else:
            narrow = arena.new(size * itemsize, LOGITS)
            logits = arena.new(size * FLOAT32_BYTES, LOGITS)
            del narrow
            narrow = arena.new(size * itemsize, LOGITS)
            del narrow
        if output is not None:
            product = arena.new(output.size, GRADIENTS)
            del product
    del logits
