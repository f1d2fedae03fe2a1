"""Is a GGUF file what its plan says? Header and every tensor are read back and compared with float64.

Unchanged and floating-point tensors are held to the bounds of adapters.parity. A quantised block of 32 has a step d of
its own (the largest magnitude over 127, 8 or 16, or the range over 15 or 31), kept in float16, and every element is the
nearest multiple of d as computed before that rounding. So

    |stored - exact| <= d / 2 + levels * |float16(d) - d| + |float16(least) - least| + 3 * what float32 sums may lose

where `levels` is the largest multiple, `least` the smallest element where a block keeps it, and float16 is off by at
most 2^-11 of a number or 2^-25. In Q4_0 and Q5_0 the side opposite the largest element has one multiple less, so an
element there may be off by d. What K-quants are held to says adapters/gguf_k.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adapters.checkpoint import StoredTensor
from adapters.gguf_k import K_BLOCK, K_LIMITS, KBlocks, decode_k, hold_k
from adapters.gguf_plan import NEGLIGIBLE, GgufPlan, GgufTensor
from adapters.gguf_read import GgufFile, ReadTensor, read_blocks, read_elements, read_gguf
from adapters.merge_plan import PlannedTensor
from adapters.readback import (
    CHECK_ELEMENTS,
    EPSILON32,
    MEASURED_ELEMENTS,
    Factors,
    Floats,
    Floats32,
    TensorCheck,
    Weights,
    WeightsReport,
    compare,
    in_threads,
    stride,
    verify_tensor,
)

SYMMETRIC, AFFINE = {"Q8_0": 127, "Q4_0": 8, "Q5_0": 16}, {"Q4_1": 15, "Q5_1": 31}
QUANTISED = {**SYMMETRIC, **AFFINE}
F16_RELATIVE, F16_ABSOLUTE = 2.0**-11, 2.0**-25
SLACK_OF_STEP = 2.0**-14  # of a step: its reciprocal and the product are float32


def verify_gguf(
    plan: GgufPlan, path: Path, progress: Callable[[int], None] | None = None, *, measured: int = MEASURED_ELEMENTS
) -> WeightsReport:
    """Read the whole file back; `problems` is empty when header and every tensor are what the plan says.

    `progress` gets the bytes of each tensor as it is done; `measured` elements at least are in the figures. Raises
    BaseInvalid for a file that is no GGUF.
    """
    file, report = read_gguf(path), WeightsReport()
    report.problems += _metadata_problems(plan, file)
    planned = {tensor.name: tensor for tensor in plan.tensors}
    names = sorted(file.tensors.keys() ^ planned)
    report.problems += [f"{name} is in only one of plan and {path.name}" for name in names]
    pairs = [(tensor, file.tensors[name]) for name, tensor in planned.items() if name in file.tensors]
    every = stride([tensor.source.elements for tensor, _ in pairs if not tensor.is_copy], measured)
    for (tensor, _), found in zip(pairs, in_threads(lambda pair: _verify(*pair, path, every), pairs), strict=True):
        report.add(found)
        if progress:
            progress(tensor.size_bytes)
    return report


def _metadata_problems(plan: GgufPlan, file: GgufFile) -> list[str]:
    problems = [f"{key} is in only one of plan and file" for key in sorted(file.metadata.keys() ^ plan.metadata)]
    for key, (kind, value) in plan.metadata.items():
        wanted = float(np.float32(value)) if kind == "FLOAT32" else list(value) if isinstance(value, tuple) else value
        if key in file.metadata and file.metadata[key] != wanted:
            problems.append(f"{key} is not what was planned: {str(file.metadata[key])[:80]}")
    return problems


def _verify(planned: GgufTensor, written: ReadTensor, path: Path, every: int) -> WeightsReport:
    report = WeightsReport()
    if (written.type, written.shape) != (planned.type, planned.source.shape):
        report.problems.append(f"{planned.name} was written as {written.type} {list(written.shape)}")
    elif planned.type in QUANTISED or planned.type in K_LIMITS or planned.factor != 1.0:
        check = _check(planned, written, path, every)
        report.changed.append(check)
        if check.outside:
            report.problems.append(
                f"{planned.name}: {check.outside} of {check.elements} elements are not what {planned.type} makes of "
                f"W + scaling * B @ A; largest error {check.max_abs_error:g}"
            )
    else:
        source = PlannedTensor(planned.source, planned.type, 0, planned.update, planned.through_nf4)
        stored = StoredTensor(planned.name, written.type, written.shape, path, written.begin)
        return verify_tensor(source, stored, every)
    return report


def _check(planned: GgufTensor, written: ReadTensor, path: Path, every: int) -> TensorCheck:
    rows, columns = planned.matrix_shape
    check, factors = TensorCheck(planned.source.name), Factors.of(planned.update)
    weights = Weights(planned.source, columns, planned.through_nf4)
    step = max(1, CHECK_ELEMENTS // columns)
    with weights:
        for block, first in enumerate(range(0, rows, step)):
            end = min(rows, first + step)
            weight, held = weights.read(first, end), factors.rows(first, end) if factors else None
            if planned.type in K_LIMITS:
                blocks = decode_k(read_blocks(path, written, first * columns, end * columns), planned.type)
                _measure_k(check, weight.astype(np.float64), blocks, held, planned.type)
                continue
            stored = read_elements(path, written, first * columns, end * columns).reshape(-1, columns)
            if planned.type not in QUANTISED:
                exact = weight * np.float64(planned.factor)
                slack = 2 * EPSILON32 * np.abs(exact).max(axis=1, keepdims=True, initial=0.0)
                compare(check, np.zeros_like(exact), stored, exact, slack, planned.type)
                continue
            if block % every == 0:
                _measure(check, weight.astype(np.float64), stored, held, planned.type)
                continue
            check.elements += weight.size
            doubtful = _doubtful(weight + held.update32 if held else weight, stored, planned.type)
            if len(doubtful):
                _judge(check, weight, stored, held, planned.type, doubtful)
    return check


def _doubtful(computed: Floats32, stored: Floats, kind: str) -> npt.NDArray[np.intp]:
    """The blocks of 32, counted over the rows, that a second computation in float32 does not give again."""
    from gguf import GGMLQuantizationType, dequantize, quantize

    numbers = np.where(np.abs(computed) > NEGLIGIBLE, computed, np.float32(0)).reshape(1, -1)
    again = dequantize(quantize(numbers, GGMLQuantizationType[kind]), GGMLQuantizationType[kind])
    differ = (again.reshape(-1, 32) != stored.astype(np.float32).reshape(-1, 32)) | ~np.isfinite(again.reshape(-1, 32))
    return np.flatnonzero(differ.any(axis=1))


def _judge(
    check: TensorCheck,
    weight: Floats32,
    stored: Floats,
    factors: Factors | None,
    kind: str,
    blocks: npt.NDArray[np.intp],
) -> None:
    """The bound, for these blocks alone, in float64."""
    in_row = weight.shape[1] // 32
    rows, columns = blocks // in_row, (blocks % in_row)[:, None] * 32 + np.arange(32)
    exact, lost = weight[rows[:, None], columns].astype(np.float64), np.zeros((len(rows), 1))
    if factors is not None:
        exact += np.einsum("br,rbk->bk", factors.b[rows], factors.a[:, columns])
        lost = factors.slack[rows] + 2 * EPSILON32 * np.abs(exact).max(axis=1, keepdims=True)
    _, bound = _ideal(exact, kind)
    error = np.abs(stored[rows[:, None], columns] - exact)
    check.outside += int((~(error <= bound + 3 * lost)).sum())
    check.max_abs_error = max(check.max_abs_error, float(error.max(initial=0.0)))


def _measure(check: TensorCheck, weight: Floats, stored: Floats, factors: Factors | None, kind: str) -> None:
    """The bound and every figure of a block of rows, in float64."""
    update = factors.b @ factors.a if factors else np.zeros_like(weight)
    exact = weight + update
    lost = factors.slack + 2 * EPSILON32 * np.abs(exact) if factors else np.zeros_like(exact)
    blocks, largest_loss = exact.reshape(-1, 32), lost.reshape(-1, 32).max(axis=1, keepdims=True)
    ideal, bound = _ideal(blocks, kind)
    error = np.abs(stored.reshape(-1, 32) - blocks)
    check.elements += exact.size
    check.measured += exact.size
    check.equal += int((stored.reshape(-1, 32) == ideal).sum())
    check.outside += int((~(error <= bound + 3 * largest_loss)).sum())  # NaN is outside, too
    check.max_abs_error = max(check.max_abs_error, float(error.max(initial=0.0)))
    check.error_squares += float(np.vdot(error, error))
    check.floor_squares += float(np.square(ideal - blocks).sum())
    check.exact_squares += float(np.vdot(exact, exact))
    check.kept += float(np.vdot(stored - weight, update))
    check.update_squares += float(np.vdot(update, update))


def _measure_k(check: TensorCheck, weight: Floats, stored: KBlocks, factors: Factors | None, kind: str) -> None:
    """The bound and every figure of a block of rows of K-quants; the floor is what the stored scales must lose."""
    update = factors.b @ factors.a if factors else np.zeros_like(weight)
    exact = weight + update
    lost = factors.slack + 2 * EPSILON32 * np.abs(exact) if factors else np.zeros_like(exact)
    wrong, nearest = hold_k(exact.reshape(-1, K_BLOCK), lost.reshape(-1, K_BLOCK), stored, kind)
    values = stored.values.reshape(exact.shape)
    error = np.abs(values - exact)
    check.elements += exact.size
    check.measured += exact.size
    check.equal += int((stored.values == nearest).sum())
    check.outside += int(wrong.sum())
    check.max_abs_error = max(check.max_abs_error, float(error.max(initial=0.0)))
    check.error_squares += float(np.vdot(error, error))
    check.floor_squares += float(np.square(nearest - exact.reshape(-1, K_BLOCK)).sum())
    check.exact_squares += float(np.vdot(exact, exact))
    check.kept += float(np.vdot(values - weight, update))
    check.update_squares += float(np.vdot(update, update))


def _ideal(blocks: Floats, kind: str) -> tuple[Floats, Floats]:
    """(blocks, 32) -> what the type makes of them in exact arithmetic, and how far it may be off."""
    return (_symmetric if kind in SYMMETRIC else _affine)(blocks, kind)


def _symmetric(blocks: Floats, kind: str) -> tuple[Floats, Floats]:
    levels = SYMMETRIC[kind]
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    step = np.abs(largest) / 127 if kind == "Q8_0" else largest / -levels
    inverse = np.divide(1.0, step, out=np.zeros_like(step), where=step != 0)
    top = levels if kind == "Q8_0" else levels - 1
    numbers = np.clip(_half_away(blocks * inverse), -levels, top)
    size = np.abs(step)
    beyond = np.where(blocks * inverse > top, size, size / 2)
    return numbers * _float16(step), beyond + SLACK_OF_STEP * size + levels * _float16_error(size)


def _affine(blocks: Floats, kind: str) -> tuple[Floats, Floats]:
    levels, least = AFFINE[kind], blocks.min(axis=1, keepdims=True)
    step = (blocks.max(axis=1, keepdims=True) - least) / levels
    inverse = np.divide(1.0, step, out=np.zeros_like(step), where=step != 0)
    numbers = np.clip(_half_away((blocks - least) * inverse), 0, levels)
    # The range is a difference in float32, so its error is one of the numbers' size and not of the step's.
    rounding = 4 * EPSILON32 * np.abs(blocks).max(axis=1, keepdims=True)
    bound = step * (0.5 + SLACK_OF_STEP) + levels * _float16_error(step) + _float16_error(np.abs(least)) + rounding
    return numbers * _float16(step) + _float16(least), np.broadcast_to(bound, blocks.shape)


def _half_away(values: Floats) -> Floats:
    rounded: Floats = np.copysign(np.floor(np.abs(values) + 0.5), values)
    return rounded


def _float16(values: Floats) -> Floats:
    return values.astype(np.float16).astype(np.float64)


def _float16_error(sizes: Any) -> Floats:
    error: Floats = np.maximum(sizes * F16_RELATIVE, F16_ABSOLUTE)
    return error
