"""Is a merged checkpoint what base + adapter gives? Weights read back against float64, logits against a reference.

The read-back shares no arithmetic with the merge: numpy in float64, its own decoding and rounding, other block sizes,
offsets from the written headers. A changed element passes when

    |merged - exact| <= half a unit in its last place + what float32 sums of this rank may lose
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adapters.checkpoint import ITEM_BYTES, StoredTensor, read_header
from adapters.merge_plan import MergePlan, PlannedTensor

Floats = npt.NDArray[np.float64]
CHECK_ELEMENTS = 1 << 18  # per block: a float64 array of it is 2 MiB
# Explicit mantissa bits and the exponent of the smallest normal number (IEEE 754; bfloat16 is float32 cut short).
PRECISION = {"F32": (23, -126), "F16": (10, -14), "BF16": (7, -126)}
EPSILON32 = 2.0**-24


@dataclass
class TensorCheck:
    """What the read-back of one changed tensor found; sums are over its elements, in float64."""

    name: str
    elements: int = 0
    equal: int = 0  # elements that are round(exact) to the bit
    outside: int = 0  # elements beyond the bound: each one is a bug
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
        return {**counts, **{figure: _round(getattr(self, figure)) for figure in figures}}


@dataclass
class WeightsReport:
    """The read-back of a whole folder. `problems` is empty when every tensor is as it must be."""

    changed: list[TensorCheck] = field(default_factory=list)
    unchanged_tensors: int = 0
    unchanged_bytes: int = 0
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        elements = sum(check.elements for check in self.changed)
        worst = max(self.changed, key=lambda check: check.max_abs_error, default=None)
        least = min(self.changed, key=lambda check: check.update_kept, default=None)
        return {
            "changed_tensors": len(self.changed),
            "changed_elements": elements,
            "equal_to_rounded_exact": _round(sum(check.equal for check in self.changed) / elements)
            if elements
            else None,
            "outside_bound": sum(check.outside for check in self.changed),
            "max_abs_error": _round(worst.max_abs_error) if worst else 0.0,
            "max_abs_error_in": worst.name if worst else None,
            "relative_error": _round(_over(self.changed, "error_squares", "exact_squares")),
            "rounding_floor": _round(_over(self.changed, "floor_squares", "exact_squares")),
            "least_update_kept": _round(least.update_kept) if least else None,
            "least_update_kept_in": least.name if least else None,
            "unchanged_tensors_equal": self.unchanged_tensors,
            "unchanged_bytes_equal": self.unchanged_bytes,
            "problems": self.problems,
            "tensors": [check.as_dict() for check in self.changed],
        }


def verify_weights(plan: MergePlan, folder: Path, progress: Callable[[int], None] | None = None) -> WeightsReport:
    """Read every tensor of the merged files in `folder` back and compare it with what the plan says it must be.

    `progress` gets the bytes of each tensor as it is done.
    """
    report = WeightsReport()
    for file in plan.files:
        written = {tensor.name: tensor for tensor in read_header(folder / file.name)}
        expected = {tensor.source.name: tensor for tensor in file.tensors}
        report.problems += [
            f"{name} is in only one of plan and {file.name}" for name in sorted(written.keys() ^ expected)
        ]
        for name in sorted(written.keys() & expected.keys()):
            _verify_tensor(expected[name], written[name], report)
            if progress:
                progress(expected[name].size_bytes)
    return report


def _verify_tensor(planned: PlannedTensor, written: StoredTensor, report: WeightsReport) -> None:
    name = planned.source.name
    if (written.dtype, written.shape) != (planned.dtype, planned.source.shape):
        report.problems.append(f"{name} was written as {written.dtype} {list(written.shape)}")
    elif planned.is_copy:
        if not _same_bytes(planned.source, written):
            report.problems.append(f"{name} should be unchanged and is not")
        report.unchanged_tensors += 1
        report.unchanged_bytes += written.size_bytes
    else:
        check = _check_changed(planned, written)
        report.changed.append(check)
        if check.outside:
            report.problems.append(
                f"{name}: {check.outside} of {check.elements} elements are not round(W + scaling * B @ A); "
                f"largest error {check.max_abs_error:g}"
            )


def _same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    chunk = 4 << 20
    with one.path.open("rb") as left, other.path.open("rb") as right:
        left.seek(one.begin)
        right.seek(other.begin)
        for start in range(0, one.size_bytes, chunk):
            size = min(chunk, one.size_bytes - start)
            if left.read(size) != right.read(size):
                return False
    return True


def _check_changed(planned: PlannedTensor, written: StoredTensor) -> TensorCheck:
    rows, columns = planned.matrix_shape
    check = TensorCheck(planned.source.name)
    factors = None
    if planned.update:
        a, b = _read(planned.update.a).reshape(-1, columns), _read(planned.update.b).reshape(rows, -1)
        factors = (a, b * planned.update.scaling)
    step = max(1, CHECK_ELEMENTS // columns)
    for first in range(0, rows, step):
        span = (first * columns, min(rows, first + step) * columns)
        weight = _read(planned.source, span).reshape(-1, columns)
        merged = _read(written, span).reshape(-1, columns)
        if factors is None:
            _compare(check, weight, merged, np.zeros_like(weight), np.zeros((len(weight), 1)), planned.dtype)
            continue
        a, b = factors[0], factors[1][first : first + step]
        # An element of B @ A sums `rank` products in float32; each row's largest possible sum bounds what that loses.
        slack = EPSILON32 * (len(a) + 3) * (np.abs(b) @ np.abs(a).max(axis=1, keepdims=True))
        _compare(check, weight, merged, b @ a, slack, planned.dtype)
    return check


def _compare(check: TensorCheck, weight: Floats, merged: Floats, update: Floats, slack: Floats, dtype: str) -> None:
    exact = weight + update
    unit = _unit(exact, dtype)
    rounded = np.rint(exact / unit) * unit
    error = np.abs(merged - exact)
    bound = unit / 2 + (slack + 2 * EPSILON32 * np.abs(exact) if update.any() else 0.0)
    check.elements += exact.size
    check.equal += int((merged == rounded).sum())
    check.outside += int((~(error <= bound)).sum())  # NaN is outside, too
    check.max_abs_error = max(check.max_abs_error, float(error.max(initial=0.0)))
    check.error_squares += float(np.vdot(error, error))
    check.floor_squares += float(np.square(rounded - exact).sum())
    check.exact_squares += float(np.vdot(exact, exact))
    check.kept += float(np.vdot(merged - weight, update))
    check.update_squares += float(np.vdot(update, update))


def _unit(values: Floats, dtype: str) -> Floats:
    """The distance between neighbours of `dtype` around each value (a unit in the last place)."""
    bits, smallest = PRECISION[dtype]
    exponent = np.frexp(values)[1] - 1
    unit: Floats = np.ldexp(1.0, np.maximum(exponent, smallest) - bits)
    return unit


def _read(stored: StoredTensor, span: tuple[int, int] | None = None) -> Floats:
    """Elements span[0]..span[1] of a tensor, in float64 and flat."""
    first, end = span or (0, stored.elements)
    item = ITEM_BYTES[stored.dtype]
    with stored.path.open("rb") as file:
        file.seek(stored.begin + first * item)
        raw = file.read((end - first) * item)
    if stored.dtype == "BF16":
        wide = np.frombuffer(raw, "<u2").astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32).astype(np.float64)
    return np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[stored.dtype]).astype(np.float64)


@dataclass(frozen=True, slots=True)
class LogitComparison:
    """How far `other` is from `reference` over all positions. KL is KL(reference || other) in nats."""

    positions: int
    max_abs: float
    mean_abs: float
    max_kl: float
    mean_kl: float
    top1_agreement: float
    top1_disagreements_beyond_margin: int  # where the reference's top two differ by more than MARGIN
    largest_logit: float

    def as_dict(self) -> dict[str, Any]:
        return {key: _round(value) if isinstance(value, float) else value for key, value in asdict(self).items()}


MARGIN = 1e-3


def compare_logits(reference: Sequence[npt.ArrayLike], other: Sequence[npt.ArrayLike]) -> LogitComparison:
    """Compare two runs over the same positions: each a sequence of (num_positions, vocab_size) or (vocab_size,) arrays.

    The caller fetched them, from wherever; log-probabilities over the whole vocabulary compare as well as logits do.
    Raises ValueError where the shapes differ.
    """
    rows = [_compare_rows(one, two) for one, two in _row_pairs(reference, other)]
    if not rows:
        raise ValueError("nothing to compare: no positions")
    table = np.concatenate(rows)
    beyond = (table[:, 3] == 0) & (table[:, 4] > MARGIN)
    return LogitComparison(
        positions=len(table),
        max_abs=float(table[:, 0].max()),
        mean_abs=float(table[:, 1].mean()),
        max_kl=float(table[:, 2].max()),
        mean_kl=float(table[:, 2].mean()),
        top1_agreement=float(table[:, 3].mean()),
        top1_disagreements_beyond_margin=int(beyond.sum()),
        largest_logit=float(table[:, 5].max()),
    )


def _row_pairs(reference: Sequence[npt.ArrayLike], other: Sequence[npt.ArrayLike]) -> Iterator[tuple[Floats, Floats]]:
    for one, two in zip(reference, other, strict=True):
        left, right = (np.atleast_2d(np.asarray(side, dtype=np.float64)) for side in (one, two))
        if left.shape != right.shape:
            raise ValueError(f"cannot compare logits of shapes {left.shape} and {right.shape}")
        for first in range(0, len(left), 8):  # a few positions at a time: a vocabulary is 152k wide
            yield left[first : first + 8], right[first : first + 8]


def _compare_rows(one: Floats, two: Floats) -> Floats:
    """(rows, 6): largest and mean difference, KL, same top-1, top-2 margin of the reference, its largest logit."""
    difference = np.abs(one - two)
    log_p, log_q = _log_softmax(one), _log_softmax(two)
    kl = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=1), 0.0)
    top = np.partition(one, -2, axis=1)[:, -2:]
    same = one.argmax(axis=1) == two.argmax(axis=1)
    columns = (
        difference.max(axis=1),
        difference.mean(axis=1),
        kl,
        same,
        top[:, 1] - top[:, 0],
        np.abs(one).max(axis=1),
    )
    return np.stack(columns, axis=1).astype(np.float64)


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _over(checks: list[TensorCheck], top: str, bottom: str) -> float:
    return _root_ratio(sum(getattr(check, top) for check in checks), sum(getattr(check, bottom) for check in checks))


def _root_ratio(top: float, bottom: float) -> float:
    return float((top / bottom) ** 0.5) if bottom else 0.0


def _round(value: float) -> float:
    """Six digits: what a report is read for, and no more than summation order leaves stable."""
    return float(f"{value:.6g}")
