"""Reads merged weights back and holds every element to `W + scaling * B @ A`, by other code than wrote them.

It shares no arithmetic with the merge but that of NF4, which is the library's: numpy, its own decoding and rounding,
other block sizes, offsets from the written headers. A changed element passes when

    |merged - exact| <= half a unit in its last place + what float32 sums of this rank may lose

Every element is looked at. Where a second computation in float32 shows that it is within the bound (the same bits in 16
bits, no more than float32's own loss in 32), that is enough; of all others the exact value is computed in float64. The
figures, such as how far the whole is from exact, are of MEASURED_ELEMENTS spread evenly, all of them in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from adapters.checkpoint import ITEM_BYTES, StoredTensor, read_header
from adapters.errors import BaseInvalid
from adapters.merge_plan import MergePlan, PlannedTensor, Update

Item = TypeVar("Item")
Found = TypeVar("Found")
Floats = npt.NDArray[np.float64]
Floats32 = npt.NDArray[np.float32]
CHECK_ELEMENTS = 1 << 16  # per block: what a core keeps in its cache, half a MiB in float64
MEASURED_ELEMENTS = 1 << 24
MAX_WORKERS = 4
COPY_CHUNK = 4 << 20
# Explicit mantissa bits and the exponent of the smallest normal number (IEEE 754; bfloat16 is float32 cut short).
PRECISION = {"F32": (23, -126), "F16": (10, -14), "BF16": (7, -126)}
EPSILON32 = 2.0**-24


@dataclass
class TensorCheck:
    """What the read-back of one changed tensor found; sums are over its measured elements, in float64."""

    name: str
    elements: int = 0
    measured: int = 0
    equal: int = 0  # measured elements that are round(exact) to the bit
    outside: int = 0  # of all elements: each one beyond the bound is a bug
    max_abs_error: float = 0.0
    error_squares: float = 0.0
    floor_squares: float = 0.0  # of round(exact) - exact: what any merge in this dtype must lose
    exact_squares: float = 0.0
    kept: float = 0.0  # <merged - W, update>
    update_squares: float = 0.0

    @property
    def relative_error(self) -> float:
        return _root_ratio(self.error_squares, self.exact_squares)

    @property
    def rounding_floor(self) -> float:
        return _root_ratio(self.floor_squares, self.exact_squares)

    @property
    def update_kept(self) -> float:
        """The part of the adapter's update that survived rounding; 1 is all of it."""
        return self.kept / self.update_squares if self.update_squares else 1.0

    def as_dict(self) -> dict[str, Any]:
        figures = ("relative_error", "rounding_floor", "update_kept", "max_abs_error")
        counts = {"name": self.name, "elements": self.elements, "outside": self.outside}
        return {**counts, **{figure: six_digits(getattr(self, figure)) for figure in figures}}


@dataclass
class WeightsReport:
    """The read-back of a whole folder. `problems` is empty when every tensor is as it must be."""

    changed: list[TensorCheck] = field(default_factory=list)
    unchanged_tensors: int = 0
    unchanged_bytes: int = 0
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        measured = sum(check.measured for check in self.changed)
        worst = max(self.changed, key=lambda check: check.max_abs_error, default=None)
        least = min(self.changed, key=lambda check: check.update_kept, default=None)
        return {
            "changed_tensors": len(self.changed),
            "changed_elements": sum(check.elements for check in self.changed),
            "measured_elements": measured,
            "equal_to_rounded_exact": six_digits(sum(check.equal for check in self.changed) / measured)
            if measured
            else None,
            "outside_bound": sum(check.outside for check in self.changed),
            "max_abs_error": six_digits(worst.max_abs_error) if worst else 0.0,
            "max_abs_error_in": worst.name if worst else None,
            "relative_error": six_digits(_over(self.changed, "error_squares", "exact_squares")),
            "rounding_floor": six_digits(_over(self.changed, "floor_squares", "exact_squares")),
            "least_update_kept": six_digits(least.update_kept) if least else None,
            "least_update_kept_in": least.name if least else None,
            "unchanged_tensors_equal": self.unchanged_tensors,
            "unchanged_bytes_equal": self.unchanged_bytes,
            "problems": self.problems,
            "tensors": [check.as_dict() for check in self.changed],
        }

    def add(self, other: WeightsReport) -> None:
        """Take in what was found of further tensors."""
        self.changed += other.changed
        self.problems += other.problems
        self.unchanged_tensors += other.unchanged_tensors
        self.unchanged_bytes += other.unchanged_bytes


def verify_weights(
    plan: MergePlan, folder: Path, progress: Callable[[int], None] | None = None, *, measured: int = MEASURED_ELEMENTS
) -> WeightsReport:
    """Read every tensor of the merged files in `folder` back and compare it with what the plan says it must be.

    `progress` gets the bytes of each tensor as it is done. `measured` elements at least are in the figures.
    """
    report = WeightsReport()
    pairs: list[tuple[PlannedTensor, StoredTensor]] = []
    for file in plan.files:
        written = {tensor.name: tensor for tensor in read_header(folder / file.name)}
        expected = {tensor.source.name: tensor for tensor in file.tensors}
        report.problems += [
            f"{name} is in only one of plan and {file.name}" for name in sorted(written.keys() ^ expected)
        ]
        pairs += [(expected[name], written[name]) for name in sorted(written.keys() & expected.keys())]
    every = stride([planned.source.elements for planned, _ in pairs if not planned.is_copy], measured)
    for (planned, _), found in zip(pairs, in_threads(lambda pair: verify_tensor(*pair, every), pairs), strict=True):
        report.add(found)
        if progress:
            progress(planned.size_bytes)
    return report


def stride(elements: list[int], measured: int) -> int:
    """Every how manieth block is measured, so that at least so many elements are."""
    return max(1, sum(elements) // max(1, measured))


def in_threads(check: Callable[[Item], Found], items: list[Item]) -> Iterator[Found]:
    """The results in order. One thread computes a product, so that no figure depends on how many there are."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(MAX_WORKERS) as pool:
        yield from pool.map(check, items)


def verify_tensor(planned: PlannedTensor, written: StoredTensor, every: int = 1) -> WeightsReport:
    """One tensor against its plan; figures are of every `every`-th block."""
    return verified(
        planned.source.name,
        planned.source,
        written,
        planned.dtype,
        None if planned.is_copy else lambda: _check_changed(planned, written, every),
        "round(W + scaling * B @ A)",
    )


def verified(
    name: str,
    source: StoredTensor,
    written: StoredTensor,
    dtype: str,
    check: Callable[[], TensorCheck] | None,
    expected: str,
) -> WeightsReport:
    """What is found of one tensor: its dtype and shape, then every byte of a copy (`check` is None), or every element
    by `check`, which should be as the words `expected` say."""
    report = WeightsReport()
    if (written.dtype, written.shape) != (dtype, source.shape):
        report.problems.append(f"{name} was written as {written.dtype} {list(written.shape)}")
    elif check is None:
        if not same_bytes(source, written):
            report.problems.append(f"{name} should be unchanged and is not")
        report.unchanged_tensors, report.unchanged_bytes = 1, written.size_bytes
    else:
        checked = check()
        report.changed.append(checked)
        if checked.outside:
            report.problems.append(
                f"{name}: {checked.outside} of {checked.elements} elements are not {expected}; "
                f"largest error {checked.max_abs_error:g}"
            )
    return report


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Two tensors of the same size hold the same bytes."""
    with one.path.open("rb") as left, other.path.open("rb") as right:
        left.seek(one.begin)
        right.seek(other.begin)
        for start in range(0, one.size_bytes, COPY_CHUNK):
            size = min(COPY_CHUNK, one.size_bytes - start)
            if left.read(size) != right.read(size):
                return False
    return True


@dataclass(frozen=True)
class Factors:
    """scaling * B (rows, rank) and A (rank, columns) in float64, and what a float32 sum of a row may lose."""

    b: Floats
    a: Floats
    slack: Floats  # (rows, 1)

    @classmethod
    def of(cls, update: Update | None) -> Factors | None:
        """None where nothing is added."""
        if update is None:
            return None
        a, b = (read_floats(half).reshape(half.shape) for half in (update.a, update.b))
        return cls.of_floats(b, a, update.scaling)

    @classmethod
    def of_floats(cls, b: Floats, a: Floats, scaling: float) -> Factors:
        b = b * scaling
        # An element of B @ A sums `rank` products in float32; each row's largest possible sum bounds what that loses.
        slack = EPSILON32 * (len(a) + 3) * (np.abs(b) @ np.abs(a).max(axis=1, keepdims=True))
        return cls(b, a, slack)

    def rows(self, first: int, end: int) -> Factors:
        """Of some rows."""
        return Factors(self.b[first:end], self.a, self.slack[first:end])

    @property
    def update32(self) -> Floats32:
        """scaling * B @ A, computed in float32."""
        return np.asarray(self.b.astype(np.float32) @ self.a.astype(np.float32))


def _check_changed(planned: PlannedTensor, written: StoredTensor, every: int) -> TensorCheck:
    rows, columns = planned.matrix_shape
    check, factors = TensorCheck(planned.source.name), Factors.of(planned.update)
    weights = Weights(planned.source, columns, planned.through_nf4)
    step = max(1, CHECK_ELEMENTS // columns)
    with weights, written.path.open("rb") as file:
        for block, first in enumerate(range(0, rows, step)):
            end = min(rows, first + step)
            weight = weights.read(first, end)
            file.seek(written.begin + first * columns * ITEM_BYTES[written.dtype])
            raw = file.read((end - first) * columns * ITEM_BYTES[written.dtype])
            held = factors.rows(first, end) if factors else None
            if block % every == 0:
                merged = _decoded(raw, written.dtype).reshape(-1, columns)
                _measure(check, weight, merged, held, planned.dtype)
                continue
            check.elements += weight.size
            computed = weight + held.update32 if held else weight
            doubtful = _doubtful(computed, raw, held, planned.dtype)
            if doubtful.any():
                merged = _decoded(raw, written.dtype).reshape(-1, columns)
                _judge(check, weight, merged, held, planned.dtype, doubtful)
    return check


class Weights:
    """Rows of the weight that is merged into, in float32: as stored, or as NF4 leaves them."""

    def __init__(self, source: StoredTensor, columns: int, through_nf4: bool) -> None:
        self.source, self.columns, self.through_nf4 = source, columns, through_nf4

    def __enter__(self) -> None:
        self.file = self.source.path.open("rb")
        self.scales = None
        if self.through_nf4:
            from adapters.nf4 import nf4_scales

            self.scales = nf4_scales(self.source, self.file.fileno())

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def read(self, first: int, end: int) -> Floats32:
        """Rows first..end, (end - first, columns); raises BaseInvalid where the file ends early."""
        source, columns = self.source, self.columns
        item = ITEM_BYTES[source.dtype]
        self.file.seek(source.begin + first * columns * item)
        values = _decoded(self.file.read((end - first) * columns * item), source.dtype)
        if values.size != (end - first) * columns:
            raise BaseInvalid("A weight file of the base ended early: it changed during the export.")
        if self.scales is not None:
            import torch

            values = self.scales.through(torch.from_numpy(values.copy()), first * columns).numpy()
        return values.reshape(-1, columns)


def _doubtful(computed: Floats32, raw: bytes, factors: Factors | None, dtype: str) -> npt.NDArray[np.bool_]:
    """Elements (rows, columns) that a second computation in float32 does not show to be right.

    In 16 bits the same bits show it: `computed` is within the slack of the exact value. In 32 bits two such
    computations are off by the slack each and a rounding each, which is within the bound of one of them with its half
    unit where they differ by no more than one slack.
    """
    if dtype == "F32":
        slack = factors.slack if factors else 0.0
        near: npt.NDArray[np.bool_] = np.abs(_decoded(raw, dtype).reshape(computed.shape) - computed) <= slack
        return ~near
    merged = np.frombuffer(raw, "<u2").reshape(computed.shape)
    infinite = np.uint16(0x7C00 if dtype == "F16" else 0x7F80)
    doubtful: npt.NDArray[np.bool_] = _bits(computed, dtype) != merged
    doubtful |= (merged & infinite) == infinite
    return doubtful


def _judge(
    check: TensorCheck,
    weight: Floats32,
    merged: Floats32,
    factors: Factors | None,
    dtype: str,
    doubtful: npt.NDArray[np.bool_],
) -> None:
    """The bound, for these elements alone, in float64."""
    rows, columns = np.nonzero(doubtful)
    exact = weight[rows, columns].astype(np.float64)
    slack: Any = 0.0
    if factors is not None:
        exact += np.einsum("ij,ji->i", factors.b[rows], factors.a[:, columns])
        slack = factors.slack[rows, 0] + 2 * EPSILON32 * np.abs(exact)
    error = np.abs(merged[rows, columns] - exact)
    wrong = ~(error <= unit(exact, dtype) / 2 + slack)
    check.outside += int(wrong.sum())
    check.max_abs_error = max(check.max_abs_error, float(error.max(initial=0.0)))


def _measure(check: TensorCheck, weight: Floats32, merged: Floats32, factors: Factors | None, dtype: str) -> None:
    """The bound and every figure of a block, in float64."""
    wide = weight.astype(np.float64)
    if factors is None:
        update, slack = np.zeros_like(wide), np.zeros((len(wide), 1))
    else:
        update, slack = factors.b @ factors.a, factors.slack
    compare(check, wide, merged.astype(np.float64), update, slack, dtype)


def compare(check: TensorCheck, weight: Floats, merged: Floats, update: Floats, slack: Floats, dtype: str) -> None:
    """Add a block (rows, columns) to the check; `slack` (rows, 1) is what float32 sums of the update may lose."""
    exact = weight + update
    size = unit(exact, dtype)
    rounded = np.rint(exact / size) * size
    error = np.abs(merged - exact)
    bound = size / 2 + (slack + 2 * EPSILON32 * np.abs(exact) if update.any() else 0.0)
    check.elements += exact.size
    check.measured += exact.size
    check.equal += int((merged == rounded).sum())
    check.outside += int((~(error <= bound)).sum())  # NaN is outside, too
    check.max_abs_error = max(check.max_abs_error, float(error.max(initial=0.0)))
    check.error_squares += float(np.vdot(error, error))
    check.floor_squares += float(np.square(rounded - exact).sum())
    check.exact_squares += float(np.vdot(exact, exact))
    check.kept += float(np.vdot(merged - weight, update))
    check.update_squares += float(np.vdot(update, update))


def unit(values: Floats, dtype: str) -> Floats:
    """The distance between neighbours of `dtype` around each value (a unit in the last place)."""
    bits, smallest = PRECISION[dtype]
    exponent = np.where(values == 0, smallest, np.frexp(values)[1] - 1)
    distance: Floats = np.ldexp(1.0, np.maximum(exponent, smallest) - bits)
    return distance


def read_floats(stored: StoredTensor, span: tuple[int, int] | None = None) -> Floats:
    """Elements span[0]..span[1] of a tensor, in float64 and flat."""
    first, end = span or (0, stored.elements)
    item = ITEM_BYTES[stored.dtype]
    with stored.path.open("rb") as file:
        file.seek(stored.begin + first * item)
        raw = file.read((end - first) * item)
    return _decoded(raw, stored.dtype).astype(np.float64)


def _decoded(raw: bytes, dtype: str) -> Floats32:
    """Little-endian numbers in float32, which holds each of them exactly."""
    if dtype == "BF16":
        wide: Floats32 = np.left_shift(np.frombuffer(raw, "<u2"), 16, dtype=np.uint32).view(np.float32)
        return wide
    return np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32, copy=False)


def _bits(values: Floats32, dtype: str) -> npt.NDArray[np.uint16]:
    """Values rounded to nearest even in 16 bits, as their bits; NaN differs from every number."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    whole = values.view(np.uint32)
    odd = (whole >> np.uint32(16)) & np.uint32(1)
    odd += np.uint32(0x7FFF)
    odd += whole
    return np.asarray(odd >> np.uint32(16)).astype(np.uint16)


def _over(checks: list[TensorCheck], top: str, bottom: str) -> float:
    return _root_ratio(sum(getattr(check, top) for check in checks), sum(getattr(check, bottom) for check in checks))


def _root_ratio(top: float, bottom: float) -> float:
    return float((top / bottom) ** 0.5) if bottom else 0.0


def six_digits(value: float) -> float:
    """What a report is read for, and no more than summation order leaves stable."""
    return float(f"{value:.6g}")
