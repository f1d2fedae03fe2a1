"""The operators of our trainer's decoder, as far as memory knows them: what each makes, saves and makes again backward.

Shapes are counts of numbers: `tokens` x `width`. Weights that are trained are leaves; frozen ones are no values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from training.planner.tape import Storage, Value, constant, made, passed_on

FLOAT32_BYTES = 4


def cast(value: Value, itemsize: int) -> Value:
    """In another number format; the value itself where it has that one."""
    if value.itemsize == itemsize:
        return value
    return made(value.arena, value.count, itemsize, [value])


def scaled(value: Value) -> Value:
    """Times a constant, or times values that need no gradient: nothing is saved."""
    return made(value.arena, value.count, value.itemsize, [value])


def added(first: Value, second: Value) -> Value:
    """The sum, in the wider format; a gradient goes on as it is, or is cast to a narrower parent's format."""
    itemsize = max(first.itemsize, second.itemsize)
    arena, count, widths = first.arena, first.count, (first.itemsize, second.itemsize)
    if first.itemsize == second.itemsize:
        return passed_on(first, [first, second], arena.new(first.size))

    def backward(gradient: Storage) -> Sequence[Storage]:
        return [gradient if width == itemsize else arena.new(count * width) for width in widths]

    return made(arena, count, itemsize, [first, second], (), backward)


def product(first: Value, second: Value) -> Value:
    """Elementwise; both are saved."""
    saved = (first.storage, second.storage)
    return made(first.arena, first.count, first.itemsize, [first, second], saved)


def activation(value: Value) -> Value:
    """SiLU: its input is saved."""
    return made(value.arena, value.count, value.itemsize, [value], [value.storage])


def norm(value: Value, width: int, weight: Value | None) -> Value:
    """RMSNorm in float32 over rows of `width`; `weight` is a leaf where it is trained.

    out = weight * (x * rsqrt(mean(x^2))), cast to x's format before the weight.
    """
    itemsize = value.itemsize
    wide = cast(value, FLOAT32_BYTES)
    rows = value.count // width
    even = _even(wide, _inverse_root(wide, rows), rows)
    del wide
    narrow = cast(even, itemsize)
    del even
    if weight is None:
        return scaled(narrow)
    return _times_weight(narrow, weight)


def _inverse_root(wide: Value, rows: int) -> Value:
    arena = wide.arena
    square = constant(arena, wide.count, FLOAT32_BYTES)
    mean = constant(arena, rows, FLOAT32_BYTES)
    del square

    def backward(gradient: Storage) -> Sequence[Storage | None]:
        spread = arena.new(wide_size)  # the mean's gradient for each number
        power, doubled = arena.new(wide_size), arena.new(wide_size)
        del power
        result = arena.new(wide_size)
        del spread, doubled
        return [result]

    wide_size = wide.size
    return made(arena, mean.count, FLOAT32_BYTES, [wide], [wide.storage], backward)


def _even(wide: Value, inverse: Value, rows: int) -> Value:
    """Each row times its inverse root; both are saved."""
    arena, size = wide.arena, wide.size

    def backward(gradient: Storage) -> Sequence[Storage]:
        of_wide = arena.new(size)
        spread = arena.new(size)
        of_inverse = arena.new(rows * FLOAT32_BYTES)
        del spread
        return [of_wide, of_inverse]

    return made(arena, wide.count, FLOAT32_BYTES, [wide, inverse], (wide.storage, inverse.storage), backward)


def _times_weight(value: Value, weight: Value) -> Value:
    arena = value.arena

    def backward(gradient: Storage) -> Sequence[Storage | None]:
        of_value = arena.new(size) if is_wanted else None
        spread = arena.new(size)
        of_weight = arena.new(weight_size)
        del spread
        return [of_value, of_weight]

    size, weight_size, is_wanted = value.size, weight.size, value.node is not None
    return made(arena, value.count, value.itemsize, [value, weight], [value.storage], backward)


@dataclass(frozen=True)
class Frozen:
    """A frozen projection. `unpacked_bytes` is what a quantised weight takes while it is computed with."""

    out_width: int
    unpacked_bytes: int = 0


def frozen_linear(value: Value, tokens: int, weight: Frozen) -> Value:
    """x W^T with a frozen W: nothing is saved; a quantised W is unpacked each time."""
    arena = value.arena

    def backward(gradient: Storage) -> Sequence[Storage]:
        unpacked = arena.new(weight.unpacked_bytes)
        result = arena.new(size)
        del unpacked
        return [result]

    size = value.size
    unpacked = arena.new(weight.unpacked_bytes)
    result = made(arena, tokens * weight.out_width, value.itemsize, [value], (), backward)
    del unpacked
    return result


def trained_linear(value: Value, tokens: int, weight: Value, out_width: int, bias: Value | None = None) -> Value:
    """x W^T with a trained W: the input is saved for W's gradient."""
    arena = value.arena

    def backward(gradient: Storage) -> Sequence[Storage | None]:
        of_bias = [arena.new(bias_size)] if bias_size else []
        of_weight = arena.new(weight_size)
        of_value = arena.new(size) if is_wanted else None
        return [of_value, of_weight, *of_bias]

    size, weight_size, is_wanted = value.size, weight.size, value.node is not None
    bias_size = bias.size if bias is not None else 0
    parents = [value, weight, *([bias] if bias is not None else [])]
    return made(arena, tokens * out_width, value.itemsize, parents, [value.storage], backward)


def lora_linear(value: Value, tokens: int, weight: Frozen, pair: tuple[Value, Value], rank: int) -> Value:
    """PEFT's LoRA layer: base(x) + B(A(x)) * scaling, the adapter in float32, then back in the base's format."""
    base = frozen_linear(value, tokens, weight)
    itemsize = base.itemsize
    down, up = pair
    wide = cast(value, FLOAT32_BYTES)
    update = scaled(trained_linear(trained_linear(wide, tokens, down, rank), tokens, up, weight.out_width))
    result = added(base, update)
    del base, update
    return cast(result, itemsize)
