"""LoRA on rows of a batch that belong to different adapters, in plain torch: grouped by slot, packed by rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

MAX_RUNS = 2  # a group of at most so many runs of neighbouring rows is updated in place; else its rows are gathered


@dataclass(frozen=True, slots=True)
class Group:
    """The rows of one batch that one slot's adapter works on: as few runs, or as indices where there are many."""

    slot: int
    runs: tuple[slice, ...]
    rows: torch.Tensor | None = None


def group_rows(slots: np.ndarray) -> tuple[Group, ...]:
    """Group the rows of a batch by slot. `slots` is (num_rows,), -1 for a row of the base, which is in no group."""
    edges = np.flatnonzero(np.diff(slots)) + 1
    starts, stops = [0, *edges.tolist()], [*edges.tolist(), len(slots)]
    runs: dict[int, list[slice]] = {}
    for start, stop in zip(starts, stops, strict=True):
        if stop > start and slots[start] >= 0:
            runs.setdefault(int(slots[start]), []).append(slice(start, stop))
    return tuple(_group(slot, tuple(found)) for slot, found in runs.items())


def _group(slot: int, runs: tuple[slice, ...]) -> Group:
    if len(runs) <= MAX_RUNS:
        return Group(slot, runs)
    rows = np.concatenate([np.arange(run.start, run.stop) for run in runs])
    return Group(slot, (), torch.from_numpy(rows))


@dataclass(frozen=True, slots=True)
class Packed:
    """One slot of one layer without its unused rank: y += (x @ a) @ b, slice by slice of y.

    `a` is (in_features, sum of ranks); a part is (first column of y, its end, first column of x @ a, its end, b) with b
    of shape (rank, columns). Scaling is in b already, where vLLM folds it in at load.
    """

    a: torch.Tensor
    parts: tuple[tuple[int, int, int, int, torch.Tensor], ...]

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + sum(part[4].nbytes for part in self.parts)

    def apply(self, y: torch.Tensor, x: torch.Tensor, scale: float) -> None:
        """y (num_rows, out_features) += scale * (x @ a) @ b; x is (num_rows, in_features)."""
        shrunk = torch.mm(x, self.a)
        for start, end, first, last, b in self.parts:
            y[:, start:end].addmm_(shrunk[:, first:last], b, alpha=scale)

    def apply_to_rows(self, y: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, scale: float) -> None:
        """The same for the given rows of y and x only."""
        shrunk = torch.mm(x.index_select(0, rows), self.a)
        for start, end, first, last, b in self.parts:
            y[:, start:end].index_add_(0, rows, torch.mm(shrunk[:, first:last], b), alpha=scale)


def pack(
    lora_a: tuple[torch.Tensor, ...],
    lora_b: tuple[torch.Tensor, ...],
    slot: int,
    output_slices: tuple[int, ...],
    dtype: torch.dtype,
) -> Packed | None:
    """Copy what slot `slot` holds of one layer; None when no slice of it is adapted.

    lora_a[i] is (slots, 1, max_rank, in_features), lora_b[i] (slots, 1, output_slices[i], max_rank). The adapter's own
    rank is where the rows of A end that are not zero: `set_lora` zeroes a slot before it fills it.
    """
    pieces, parts, column, offset = [], [], 0, 0
    for stacked_a, stacked_b, size in zip(lora_a, lora_b, output_slices, strict=True):
        a, b = matrix(stacked_a, slot), matrix(stacked_b, slot)
        rank = used_rank(a)
        if rank:
            pieces.append(a[:rank])
            expand = b[:size, :rank].t().to(dtype).contiguous()
            parts.append((offset, offset + size, column, column + rank, expand))
        column += rank
        offset += size
    if not pieces:
        return None
    return Packed(torch.cat(pieces).t().to(dtype).contiguous(), tuple(parts))


def used_rank(a: torch.Tensor) -> int:
    """Where the rows of A (max_rank, in_features) end that are not zero: `set_lora` zeroes a slot first."""
    used = torch.nonzero((a != 0).any(dim=1))
    return int(used[-1]) + 1 if len(used) else 0


def matrix(stacked: torch.Tensor, slot: int) -> torch.Tensor:
    return stacked[slot].reshape(stacked.shape[-2], stacked.shape[-1])


def is_hollow(stacked: torch.Tensor) -> bool:
    """Whether these stacked weights are a shape without memory (cpu_lora.py): one zero for all of their elements."""
    return not any(stacked.stride())
