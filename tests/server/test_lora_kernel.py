"""The compiled LoRA kernel against a slow reference in float64: any shape, rank, dtype, batch and number of threads.

The tolerance is the bound of the arithmetic, not a guess. A sum of n products in float32, in any order, is off by at
most n * 2^-24 times the sum of their magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section
3.1); here n is the inputs and then the rank. Rounding the result to y's dtype adds half a unit of its last place.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.vllm_flags import processor_flags
from server.vllm_plugin import kernel_build
from server.vllm_plugin.grouped import group_rows, is_hollow, pack
from server.vllm_plugin.kernel import (
    Kernel,
    KernelBatch,
    KernelError,
    KernelLayer,
    KernelSlot,
    apply,
    narrowest,
    pack_slot,
)
from server.vllm_plugin.kernel_build import LEVELS, KernelUnavailable, best_level, built_kernel, find_compiler
from server.vllm_plugin.linear import KernelUpdate, TorchUpdate, choose_update

RUNNABLE = [level for level in LEVELS if level.needs <= processor_flags()]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}  # half of the last subnormal place
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler on this machine")
pytestmark = needs_compiler

Weights = tuple[torch.Tensor, ...]


@pytest.fixture(scope="module", params=RUNNABLE, ids=lambda level: level.name)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return Kernel(built_kernel(request.param))


@dataclass(frozen=True)
class Case:
    """One layer and one batch; slots[row] is -1 for a row of the base."""

    in_features: int
    sizes: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]  # of each slot, by slice; 0: not adapted
    weight_dtypes: tuple[torch.dtype, ...]  # of each slot's adapter, as it was trained
    slots: tuple[int, ...]
    dtype: torch.dtype = torch.float32  # of x and y
    threads: int = 1
    scale: float = 1.0
    seed: int = 0

    def weights(self) -> tuple[Weights, Weights]:
        """As vLLM lays them out, in float32; what is beyond a rank is zero."""
        random = torch.Generator().manual_seed(self.seed)
        most = max(1, *(rank for ranks in self.ranks for rank in ranks))
        lora_a = tuple(torch.zeros(len(self.ranks), 1, most, self.in_features) for _ in self.sizes)
        lora_b = tuple(torch.zeros(len(self.ranks), 1, size, most) for size in self.sizes)
        for slot, (ranks, dtype) in enumerate(zip(self.ranks, self.weight_dtypes, strict=True)):
            for i, rank in enumerate(ranks):
                a = torch.randn(rank, self.in_features, generator=random) / self.in_features**0.5
                b = torch.randn(self.sizes[i], rank, generator=random)
                lora_a[i][slot, 0, :rank], lora_b[i][slot, 0, :, :rank] = a.to(dtype), b.to(dtype)
        return lora_a, lora_b

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """x and y, each a part of wider rows."""
        random = torch.Generator().manual_seed(self.seed + 1)
        x = torch.randn(len(self.slots), self.in_features + 3, generator=random).to(self.dtype)
        y = torch.randn(len(self.slots), sum(self.sizes) + 5, generator=random).to(self.dtype)
        return x[:, : self.in_features], y[:, : sum(self.sizes)]


def reference(case: Case, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact result in float64, and how far each element of a float32 computation may be from it."""
    result, magnitude = y.double(), y.double().abs()
    lora_a, lora_b = case.weights()
    most = max(1, *(rank for ranks in case.ranks for rank in ranks))
    for row, slot in enumerate(case.slots):
        offset = 0
        for a, b, size in zip(lora_a, lora_b, case.sizes, strict=True):
            if slot >= 0:
                one, two = a[slot, 0].double().T, b[slot, 0].double().T
                result[row, offset : offset + size] += case.scale * (x[row].double() @ one @ two)
                magnitude[row, offset : offset + size] += abs(case.scale) * (
                    x[row].double().abs() @ one.abs() @ two.abs()
                )
            offset += size
    steps = case.in_features + most + 4
    return result, steps * 2.0**-24 * magnitude + ROUNDING[case.dtype] * result.abs() + SMALLEST[case.dtype]


def computed(kernel: Kernel, case: Case, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """y after the update, with the rows around it checked to be as they were."""
    layer, slots = KernelLayer(*case.weights(), case.sizes), np.array(case.slots, dtype=np.int64)
    whole = torch.full((len(slots), y.stride(0) if len(slots) else y.shape[1]), 7.0, dtype=y.dtype)
    whole[:, : y.shape[1]] = y
    apply(kernel, layer, KernelBatch(slots), whole[:, : y.shape[1]], x, case.threads, case.scale)
    assert (whole[:, y.shape[1] :] == 7.0).all(), "columns beside y's"
    return whole[:, : y.shape[1]].contiguous()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = draw(st.lists(st.integers(1, 100), min_size=1, max_size=3))
    rank = st.one_of(st.integers(0, 20), st.integers(0, 80), st.sampled_from([8, 16, 32, 64]))
    num_slots = draw(st.integers(1, 4))
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    return Case(
        in_features=draw(st.one_of(st.integers(1, 40), st.integers(1, 700))),
        sizes=tuple(sizes),
        ranks=tuple(tuple(draw(rank) for _ in sizes) for _ in range(num_slots)),
        weight_dtypes=tuple(draw(dtypes) for _ in range(num_slots)),
        slots=tuple(draw(st.lists(st.integers(-1, num_slots - 1), max_size=draw(st.sampled_from([4, 20, 130]))))),
        dtype=draw(dtypes),
        threads=draw(st.integers(1, 4)),
        scale=draw(st.sampled_from([1.0, 0.5, -3.0])),
        seed=draw(st.integers(0, 2**20)),
    )


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_each_row_gets_its_own_adapters_update_and_base_rows_none(kernel: Kernel, case: Case) -> None:
    x, y = case.rows()
    expected, bound = reference(case, x, y)
    result = computed(kernel, case, x, y)
    excess = (result.double() - expected).abs() - bound
    assert not len(case.slots) or excess.max() <= 0, excess.max()
    base = [row for row, slot in enumerate(case.slots) if slot < 0]
    assert torch.equal(result[base], y[base])


@settings(max_examples=60, deadline=None)
@given(case=cases(), data=st.data())
def test_a_rows_result_is_the_same_bits_beside_any_other_rows_and_on_any_number_of_threads(
    kernel: Kernel, case: Case, data: st.DataObject
) -> None:
    x, y = case.rows()
    together = computed(kernel, case, x, y)
    kept = data.draw(st.permutations(range(len(case.slots))))[: data.draw(st.integers(0, len(case.slots)))]
    changed = {"slots": tuple(case.slots[row] for row in kept), "threads": data.draw(st.integers(1, 4))}
    fewer = computed(kernel, Case(**{**vars_of(case), **changed}), x[kept], y[kept])
    assert torch.equal(fewer, together[kept])


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_a_long_prompts_rows_are_all_updated_whatever_the_number_of_threads(kernel: Kernel, threads: int) -> None:
    case = Case(320, (200, 64), ((16, 16), (24, 3)), (torch.float32,) * 2, (0,) * 700 + (-1,) * 5 + (1,) * 90)
    x, y = case.rows()
    alone = computed(kernel, case, x, y)
    expected, bound = reference(case, x, y)
    assert ((alone.double() - expected).abs() <= bound).all()
    assert torch.equal(computed(kernel, Case(**{**vars_of(case), "threads": threads}), x, y), alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_result_is_rounded_once_to_the_nearest_and_to_even_between_two(
    kernel: Kernel, dtype: torch.dtype
) -> None:
    """x @ A @ B adds half of the last place of 1: as torch rounds the exact sum."""
    half = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    layer = KernelLayer((torch.ones(1, 1, 1, 1),), (torch.full((1, 1, 24, 1), half),), (24,))
    starts = torch.tensor([1.0, 1.0 + 2 * half, -1.0, -1.0 - 2 * half, 0.0, 1024.0, 2 * half], dtype=dtype)
    y = starts[:, None].repeat(1, 24)
    apply(kernel, layer, KernelBatch(np.zeros(len(starts))), y, torch.ones(len(starts), 1, dtype=dtype), 1, 1.0)
    assert torch.equal(y, (starts.double() + half).to(dtype)[:, None].repeat(1, 24))


def vars_of(case: Case) -> dict[str, object]:
    return {name: getattr(case, name) for name in case.__dataclass_fields__}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 5, 16, 300])
def test_it_gives_what_the_torch_form_gives_on_a_real_layers_shape(
    kernel: Kernel, rows: int, dtype: torch.dtype
) -> None:
    slots = tuple((row * 7 % 5) - 1 for row in range(rows))
    ranks = ((16,) * 3, (64,) * 3, (7, 0, 3), (8,) * 3)
    case = Case(576, (576, 192, 192), ranks, (torch.bfloat16,) * 4, slots, dtype, threads=2)
    x, y = case.rows()
    plain = y.clone()
    for group in group_rows(np.array(slots)):
        packed = pack(*case.weights(), group.slot, case.sizes, torch.float32)
        assert packed is not None
        rows_of = torch.tensor([row for row, slot in enumerate(slots) if slot == group.slot])
        update = torch.zeros(len(rows_of), y.shape[1])
        packed.apply(update, x[rows_of].float(), 1.0)
        plain[rows_of] = (y[rows_of].float() + update).to(dtype)
    atol = 1e-4 if dtype == torch.float32 else 2.0**-7 * float(plain.abs().max())
    torch.testing.assert_close(computed(kernel, case, x, y), plain, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_not_finite_stay_so_in_their_row_alone(kernel: Kernel, dtype: torch.dtype) -> None:
    case = Case(20, (19,), ((3,),), (torch.float32,), (0, 0, 0), dtype)
    x, y = (part.clone() for part in case.rows())
    x[1, 4] = float("nan")
    y[2, 3] = float("inf")
    result = computed(kernel, case, x, y)
    assert result[1].isnan().all()
    assert result[2, 3].isinf()
    assert result[0].isfinite().all()


def test_a_16_bit_adapter_is_kept_in_16_bits_and_multiplied_exactly(kernel: Kernel) -> None:
    sizes: dict[torch.dtype, int] = {}
    for dtype in ROUNDING:
        case = Case(576, (192,), ((16,),), (dtype,), (0,))
        layer = KernelLayer(*case.weights(), case.sizes)
        layer.refresh()
        sizes[dtype] = layer.nbytes
        x, y = case.rows()
        expected, bound = reference(case, x, y)
        assert ((computed(kernel, case, x, y).double() - expected).abs() <= bound).all()
    assert sizes == {torch.float32: 4 * 16 * 768, torch.bfloat16: 2 * 16 * 768, torch.float16: 2 * 16 * 768}


def test_numbers_that_16_bits_do_not_hold_stay_in_32() -> None:
    assert narrowest(torch.tensor([1.0, 2.0**-10 + 1])).dtype == torch.float16
    assert narrowest(torch.tensor([1e30 * 0 + 2.0**100])).dtype == torch.bfloat16
    assert narrowest(torch.tensor([1.0, 0.1])).dtype == torch.float32


def test_a_slot_is_packed_again_only_when_it_is_stale(kernel: Kernel) -> None:
    case = Case(24, (8,), ((4,), (4,)), (torch.float32,) * 2, (0, 1))
    lora_a, lora_b = case.weights()
    layer, x = KernelLayer(lora_a, lora_b, case.sizes), case.rows()[0]

    def update() -> torch.Tensor:
        y = torch.zeros(2, 8)
        apply(kernel, layer, KernelBatch(np.array(case.slots)), y, x, 1, 1.0)
        return y

    before = update()
    lora_b[0][1] *= 2
    assert torch.equal(update(), before)
    layer.stale.add(1)
    torch.testing.assert_close(update(), before * torch.tensor([[1.0], [2.0]]))
    lora_a[0][1] = 0
    layer.stale.add(1)
    assert not update()[1].any()


def test_rows_and_slots_that_are_not_there_are_refused(kernel: Kernel) -> None:
    case = Case(24, (8,), ((4,),), (torch.float32,), (0,))
    layer = KernelLayer(*case.weights(), case.sizes)
    with pytest.raises(KernelError, match="more rows"):
        apply(kernel, layer, KernelBatch(np.array([0, 0])), torch.zeros(1, 8), torch.zeros(1, 24), 1, 1.0)
    with pytest.raises(KernelError, match="does not have"):
        apply(kernel, layer, KernelBatch(np.array([1])), torch.zeros(1, 8), torch.zeros(1, 24), 1, 1.0)
    with pytest.raises(KernelError, match="one dtype"):
        apply(kernel, layer, KernelBatch(np.array([0])), torch.zeros(1, 8), torch.zeros(1, 24).bfloat16(), 1, 1.0)


def test_it_runs_on_the_threads_of_torchs_own_runtime(kernel: Kernel) -> None:
    """A second OpenMP runtime in the process would spin against torch's."""
    assert kernel.is_threaded


def test_every_level_gives_the_same_bits_where_both_multiply_and_add_at_once() -> None:
    fused = [Kernel(built_kernel(level)) for level in RUNNABLE if "fma" in level.needs]
    if len(fused) < 2:
        pytest.skip("one level of this processor has fused multiply-add")
    case = Case(600, (200, 60), ((16, 5),), (torch.bfloat16,), (0,) * 30, torch.bfloat16)
    first, second = (computed(kernel, case, *case.rows()) for kernel in fused[:2])
    assert torch.equal(first, second)


def test_two_processes_that_build_at_once_both_end_with_the_one_library(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from server.vllm_plugin.kernel_build import LEVELS, built_kernel; "
        f"print(built_kernel(LEVELS[-1], Path({str(tmp_path)!r})))"
    )
    runs = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {run.communicate(timeout=120)[0].strip() for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    assert paths == {str(path) for path in tmp_path.iterdir()}
    Kernel(Path(paths.pop()))


def test_without_a_compiler_what_was_built_is_used_and_else_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = built_kernel(LEVELS[-1], tmp_path)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert built_kernel(LEVELS[-1], tmp_path) == made
    with pytest.raises(KernelUnavailable, match="no C compiler"):
        built_kernel(LEVELS[-1], tmp_path / "empty")


def test_a_compiler_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "cc"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit 0\necho no target for this >&2\nexit 1\n'
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(KernelUnavailable, match="no target for this"):
        built_kernel(LEVELS[-1], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cc"]


def test_the_switch_chooses_and_what_cannot_be_had_is_refused_or_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert choose_update("c").description.startswith("c (")
    assert choose_update("torch").description == "torch (HOTSHOE_LORA_KERNEL=torch)"
    with pytest.raises(ValueError, match="takes c or torch"):
        choose_update("fast")
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("HOTSHOE_CACHE", str(tmp_path))
    with pytest.raises(KernelUnavailable, match="HOTSHOE_LORA_KERNEL=c"):
        choose_update("c")
    fallback = choose_update("")
    assert isinstance(fallback, TorchUpdate)
    assert "no C compiler" in fallback.description
    assert "No LoRA kernel" in caplog.text
    assert kernel_build.main(()) == 1


def test_both_forms_give_the_same_through_the_same_calls() -> None:
    case = Case(64, (48, 16), ((8, 4), (16, 16)), (torch.float32,) * 2, (0, -1, 1, 0, -1))
    lora_a, lora_b = case.weights()
    x, y = case.rows()
    results = []
    for update in (KernelUpdate(Kernel(built_kernel(best_level(processor_flags()))), "here"), TorchUpdate("here")):
        update.begin(np.array(case.slots))
        result = y.clone()
        update.add(result, x, lora_a, lora_b, 1.0, case.sizes)
        results.append(result)
        assert update.packed_bytes == 4 * (64 * 12 + 8 * 48 + 4 * 16 + 64 * 32 + 16 * 64) + extra(update)
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


def extra(update: KernelUpdate | TorchUpdate) -> int:
    """The kernel's A of 12 columns is 16 wide."""
    return 4 * 64 * 4 if isinstance(update, KernelUpdate) else 0


def test_slots_of_weights_without_memory_hold_what_is_put(kernel: Kernel) -> None:
    case = Case(64, (48, 16), ((8, 4), (0, 0), (4, 4)), (torch.float32,) * 3, (0, 1, 2))
    lora_a, lora_b = case.weights()
    images = [pack_slot(lora_a, lora_b, slot, case.sizes) for slot in range(3)]
    first, none, third = images
    assert first is not None and none is None and third is not None
    pointer = KernelSlot(first.stream, first.stream.data_ptr(), first.a_dtype, first.columns, first.parts)
    hollow_a, hollow_b = (tuple(torch.zeros(()).expand(stacked.shape) for stacked in side) for side in (lora_a, lora_b))
    assert all(map(is_hollow, (*hollow_a, *hollow_b))) and not any(map(is_hollow, (*lora_a, *lora_b)))
    x = case.rows()[0]
    update = KernelUpdate(kernel, "here")
    update.begin(np.array(case.slots))

    def computed_rows() -> torch.Tensor:
        y = torch.zeros(3, sum(case.sizes))
        update.add(y, x, hollow_a, hollow_b, 1.0, case.sizes)
        return y

    assert not computed_rows().any()
    update.put(hollow_a, hollow_b, case.sizes, 1, pointer)
    update.put(hollow_a, hollow_b, case.sizes, 2, third)
    rows = computed_rows()
    expected, bound = reference(case, x, torch.zeros(3, sum(case.sizes)))
    assert not rows[0].any()
    assert rows[1].any(), "the first adapter, in the second slot"
    assert ((rows[2].double() - expected[2]).abs() <= bound[2]).all()
    assert update.packed_bytes == third.stream.nbytes, "a pointer is another's memory"
    update.put(hollow_a, hollow_b, case.sizes, 0, pointer)
    assert ((computed_rows()[0].double() - expected[0]).abs() <= bound[0]).all()
    update.put(hollow_a, hollow_b, case.sizes, 1, None)
    assert not computed_rows()[1].any()
    for slot in (0, 2):
        update.clear(slot)
    assert not computed_rows().any() and not update.packed_bytes
