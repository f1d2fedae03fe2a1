"""LoRA over the rows of a mixed batch: grouping, packing and the update itself, against a slow reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.vllm_plugin.grouped import MAX_RUNS, Packed, group_rows, pack

MAX_RANK, IN_FEATURES, OUTPUT_SLICES = 16, 48, (40, 8, 8)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def stacked(
    ranks: list[tuple[int, ...]], dtype: torch.dtype, seed: int = 0
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Slots as vLLM lays them out: ranks[slot][slice]; what is beyond a rank is zero, as `set_lora` leaves it."""
    random = torch.Generator().manual_seed(seed)
    count = len(ranks)
    lora_a = tuple(torch.zeros(count, 1, MAX_RANK, IN_FEATURES, dtype=dtype) for _ in OUTPUT_SLICES)
    lora_b = tuple(torch.zeros(count, 1, size, MAX_RANK, dtype=dtype) for size in OUTPUT_SLICES)
    for slot, by_slice in enumerate(ranks):
        for i, rank in enumerate(by_slice):
            lora_a[i][slot, 0, :rank] = torch.randn(rank, IN_FEATURES, generator=random).to(dtype) / IN_FEATURES**0.5
            lora_b[i][slot, 0, :, :rank] = torch.randn(OUTPUT_SLICES[i], rank, generator=random).to(dtype)
    return lora_a, lora_b


def reference(
    y: torch.Tensor,
    x: torch.Tensor,
    slots: list[int],
    weights: tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]],
) -> torch.Tensor:
    """Row by row in float64: y[row] += x[row] @ A^T @ B^T of the row's slot, none for -1."""
    result = y.double()
    for row, slot in enumerate(slots):
        offset = 0
        for a, b, size in zip(*weights, OUTPUT_SLICES, strict=True):
            if slot >= 0:
                update = x[row].double() @ a[slot, 0].double().T @ b[slot, 0].double().T
                result[row, offset : offset + size] += update
            offset += size
    return result


def grouped(y: torch.Tensor, x: torch.Tensor, slots: list[int], weights: tuple[tuple[torch.Tensor, ...], ...]) -> None:
    for group in group_rows(np.array(slots)):
        packed = pack(weights[0], weights[1], group.slot, OUTPUT_SLICES, x.dtype)
        if packed is None:
            continue
        if group.rows is not None:
            packed.apply_to_rows(y, x, group.rows, 1.0)
        for run in group.runs:
            packed.apply(y[run], x[run], 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "slots",
    [[0] * 6, [-1] * 5, [0, 1, 0, 1, 0, 1, 0], [-1, 3, -1, 0, 0, -1, 2, 1, -1], [3, 3, -1, -1, 3], [2]],
    ids=["one adapter", "base only", "alternating", "base in between", "two runs", "one row"],
)
def test_a_mixed_batch_gets_each_row_its_own_update_and_base_rows_none(slots: list[int], dtype: torch.dtype) -> None:
    weights = stacked([(1, 1, 1), (8, 8, 8), (16, 16, 16), (4, 12, 7)], dtype)
    random = torch.Generator().manual_seed(1)
    x = torch.randn(len(slots), IN_FEATURES, generator=random).to(dtype)
    y = torch.randn(len(slots), sum(OUTPUT_SLICES), generator=random).to(dtype)
    expected = reference(y, x, slots, weights)
    before = y.clone()
    grouped(y, x, slots, weights)
    torch.testing.assert_close(y.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    base = [row for row, slot in enumerate(slots) if slot < 0]
    assert torch.equal(y[base], before[base])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 4), min_size=0, max_size=40))
def test_groups_hold_every_adapted_row_once_and_no_base_row(slots: list[int]) -> None:
    seen: dict[int, list[int]] = {}
    for group in group_rows(np.array(slots, dtype=np.int64)):
        rows = [row for run in group.runs for row in range(run.start, run.stop)]
        rows += group.rows.tolist() if group.rows is not None else []
        assert group.slot not in seen
        assert len(group.runs) <= MAX_RUNS
        seen[group.slot] = rows
    assert seen == {slot: [i for i, other in enumerate(slots) if other == slot] for slot in set(slots) - {-1}}


def test_a_batch_of_one_adapter_is_one_run_without_indices() -> None:
    (group,) = group_rows(np.array([2] * 100))
    assert (group.slot, group.runs, group.rows) == (2, (slice(0, 100),), None)


def test_packing_leaves_out_unused_rank_and_slices_that_are_not_adapted() -> None:
    weights = stacked([(4, 0, 2), (0, 0, 0)], torch.float32)
    packed = pack(*weights, 0, OUTPUT_SLICES, torch.float32)
    assert isinstance(packed, Packed)
    assert packed.a.shape == (IN_FEATURES, 6)
    assert [(part[0], part[1], part[4].shape) for part in packed.parts] == [(0, 40, (4, 40)), (48, 56, (2, 8))]
    assert pack(*weights, 1, OUTPUT_SLICES, torch.float32) is None


def test_a_rank_whose_last_rows_of_a_are_zero_gives_the_same_update() -> None:
    weights = stacked([(8, 8, 8)], torch.float32)
    weights[0][0][0, 0, 5:] = 0
    x, y = torch.randn(3, IN_FEATURES), torch.randn(3, sum(OUTPUT_SLICES))
    expected = reference(y, x, [0, 0, 0], weights)
    grouped(y, x, [0, 0, 0], weights)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_16_bit_adapter_is_multiplied_in_float32_beside_a_float32_base() -> None:
    weights = stacked([(8, 8, 8)], torch.bfloat16)
    x, y = torch.randn(3, IN_FEATURES), torch.randn(3, sum(OUTPUT_SLICES))
    expected = reference(y, x, [0, 0, 0], weights)
    grouped(y, x, [0, 0, 0], weights)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
