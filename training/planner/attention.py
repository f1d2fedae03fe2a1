"""Packed attention as memory knows it: gathering rows, the keys and values repeated for a group's heads, SDPA."""

from __future__ import annotations

from collections.abc import Sequence

from training.planner.operators import FLOAT32_BYTES
from training.planner.sizes import Architecture
from training.planner.tape import Arena, Storage, Value, made
from training.planner.work import Pass


def rotated(value: Value) -> Value:
    """Rotary positions: x * cos + rotate_half(x) * sin; nothing is saved but the angles, which all layers share."""
    arena, size = value.arena, value.size

    def backward(gradient: Storage) -> Sequence[Storage]:
        turned, half = arena.new(size), arena.new(size // 2)
        left = arena.new(size)
        del half
        right = arena.new(size)
        both = arena.new(size)
        del left, right, turned
        straight = arena.new(size)
        result = arena.new(size)
        del both, straight
        return [result]

    straight, half = arena.new(size), arena.new(size // 2)
    turned = arena.new(size)
    del half
    by_sine = arena.new(size)
    del turned
    result = made(arena, value.count, value.itemsize, [value], (), backward)
    del straight, by_sine
    return result


def attend(query: Value, key: Value, value: Value, work: Pass, of: Architecture) -> Value:
    """(tokens x query width): each row attends to the shared prefix and to its own rest."""
    arena, itemsize = query.arena, query.itemsize
    rows = _gathered(query, work.padded_rest * of.query_width)
    keys, values = _spread(key, work, of), _spread(value, work, of)
    masks = [_mask(arena, work, itemsize)] if work.prefix else []
    rest = _sdpa([rows, keys, values], work.padded_rest, masks, of)
    del rows, keys, values, masks
    flat = _gathered(rest, (work.tokens - work.prefix) * of.query_width)
    if not work.prefix:
        return flat
    copies = [arena.new(work.prefix * of.query_width * itemsize) for _ in range(2)]
    alone = _prefix_sdpa(query, key, value, copies, work, of)
    del copies
    return made(
        arena,
        work.tokens * of.query_width,
        itemsize,
        [alone, flat],
        (),
        lambda gradient: [gradient, gradient],
    )


def _gathered(source: Value, count: int) -> Value:
    """`source` at some positions; its gradient is scattered into zeros, out of place."""
    arena, size = source.arena, source.size

    def backward(gradient: Storage) -> Sequence[Storage]:
        zeros = arena.new(size)
        result = arena.new(size)
        del zeros
        return [result]

    return made(arena, count, source.itemsize, [source], (), backward)


def _spread(source: Value, work: Pass, of: Architecture) -> Value:
    """Each row's keys or values after the prefix's, repeated for the query heads of a group."""
    arena, itemsize, size = source.arena, source.itemsize, source.size
    narrow = work.rows * (work.prefix + work.longest_rest) * of.key_value_width * itemsize
    groups = of.heads // of.key_value_heads

    def backward(gradient: Storage) -> Sequence[Storage]:
        summed = [arena.new(narrow)] if groups > 1 else []
        zeros = arena.new(size)
        result = arena.new(size)
        del zeros, summed
        return [result]

    gathered = arena.new(work.padded_rest * of.key_value_width * itemsize)
    if work.prefix:
        gathered = arena.new(narrow)
    result = made(arena, groups * narrow // itemsize, itemsize, [source], (), backward)
    del gathered
    return result


def _mask(arena: Arena, work: Pass, itemsize: int) -> Storage:
    """The prefix and a triangle, as SDPA wants it: first booleans, then numbers that are added."""
    cells = work.longest_rest * (work.prefix + work.longest_rest)
    ones = arena.new(cells)
    triangle = arena.new(cells)
    del ones
    numbers = arena.new(cells * itemsize)
    del triangle
    return numbers


def _sdpa(parents: Sequence[Value], positions: int, masks: list[Storage], of: Architecture) -> Value:
    """Flash attention: saves its inputs, its output and a normaliser for each query; one gradient for each input."""
    arena, itemsize = parents[0].arena, parents[0].itemsize
    normaliser = arena.new(positions * of.heads * FLOAT32_BYTES)
    saved = [value.storage for value in parents] + masks + [normaliser]
    result = made(arena, positions * of.query_width, itemsize, parents, saved)
    if result.node is not None:
        result.node.saved += (result.storage,)
    return result


def _prefix_sdpa(query: Value, key: Value, value: Value, copies: list[Storage], work: Pass, of: Architecture) -> Value:
    """The prefix by itself. It reads a slice of the queries, whose whole buffer is saved with it."""
    arena = query.arena
    sizes = [query.size, key.size, value.size]
    part = work.prefix * of.query_width * query.itemsize

    def backward(gradient: Storage) -> Sequence[Storage]:
        parts = [arena.new(part) for _ in sizes]
        whole = [arena.new(size) for size in sizes]
        del parts
        return whole

    normaliser = arena.new(work.prefix * of.heads * FLOAT32_BYTES)
    saved = (query.storage, *copies, normaliser)
    result = made(arena, work.prefix * of.query_width, query.itemsize, [query, key, value], saved, backward)
    if result.node is not None:
        result.node.saved += (result.storage,)
    return result
