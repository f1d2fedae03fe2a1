"""The read-back finds one wrong element anywhere, whether it lies in a measured block or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from adapters.bases import BaseModel, load_base
from adapters.checkpoint import ITEM_BYTES, read_header
from adapters.merge import merge, plan_merge
from adapters.merge_plan import MergePlan
from adapters.readback import CHECK_ELEMENTS, PRECISION, unit, verify_weights
from tests.fixtures.adapters import write_adapter
from tests.fixtures.bases import tiny_qwen2

UP = "model.layers.1.mlp.up_proj.weight"
NEXT = {"BF16": ("<u2", 1), "F16": ("<u2", 1), "F32": ("<u4", 1024)}  # a neighbour; in float32 one beyond the slack


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """Matrices of several blocks each."""
    folder = tmp_path_factory.mktemp("wide")
    return load_base(tiny_qwen2(folder / "base", hidden_size=256, intermediate_size=1024))


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def merged(request: pytest.FixtureRequest, wide: BaseModel, tmp_path: Path) -> tuple[MergePlan, Path]:
    adapter = write_adapter(tmp_path / "adapter", wide, rank=8)
    plan = plan_merge(adapter, wide, dtype=request.param)
    (tmp_path / "out").mkdir()
    merge(plan, tmp_path / "out")
    return plan, tmp_path / "out"


def change(folder: Path, element: int, how: Callable[[np.ndarray], object]) -> None:
    """Change one element of a matrix of 1024 x 256 in place, as bits."""
    stored = next(tensor for tensor in read_header(folder / "model.safetensors") if tensor.name == UP)
    kind, item = NEXT[stored.dtype][0], ITEM_BYTES[stored.dtype]
    with stored.path.open("r+b") as file:
        file.seek(stored.begin + element * item)
        bits = np.frombuffer(file.read(item), kind).copy()
        how(bits)
        file.seek(stored.begin + element * item)
        file.write(bits.tobytes())


def test_what_is_right_passes_with_few_or_all_elements_measured(merged: tuple[MergePlan, Path]) -> None:
    plan, folder = merged
    whole, sampled = verify_weights(plan, folder), verify_weights(plan, folder, measured=1)
    assert whole.problems == sampled.problems == []
    counts = [(sum(check.elements for check in report.changed)) for report in (whole, sampled)]
    assert counts[0] == counts[1] and sampled.as_dict()["measured_elements"] < counts[0] / 2
    assert whole.as_dict()["measured_elements"] == counts[0]
    for one, other in zip(whole.changed, sampled.changed, strict=True):
        assert other.relative_error == pytest.approx(one.relative_error, rel=0.2)


@pytest.mark.parametrize("measured", [1, 1 << 30], ids=["sampled", "measured"])
@pytest.mark.parametrize("element", [5, 3 * CHECK_ELEMENTS + 77], ids=["first block", "last block"])
def test_one_element_that_is_a_neighbour_of_the_right_one_is_found(
    merged: tuple[MergePlan, Path], element: int, measured: int
) -> None:
    plan, folder = merged
    dtype = plan.files[0].tensors[0].dtype

    def next_one(bits: np.ndarray) -> None:
        bits += np.array(NEXT[dtype][1], bits.dtype)

    change(folder, element, next_one)
    report = verify_weights(plan, folder, measured=measured)
    assert [check.name for check in report.changed if check.outside] == [UP]
    assert report.problems[0].startswith(f"{UP}: 1 of 262144 elements are not round(W + scaling * B @ A)")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_found(merged: tuple[MergePlan, Path], value: float) -> None:
    plan, folder = merged

    def no_number(bits: np.ndarray) -> None:
        wide = np.array([value], np.float32).view(np.uint32)
        dtype = plan.files[0].tensors[0].dtype
        narrow = np.array([value], np.float16).view(np.uint16) if dtype == "F16" else (wide >> 16).astype(np.uint16)
        bits[:] = wide if dtype == "F32" else narrow

    change(folder, 3 * CHECK_ELEMENTS + 1, no_number)
    assert len(verify_weights(plan, folder, measured=1).problems) == 1


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_beside_an_exact_zero_nothing_is_rounding(dtype: str) -> None:
    bits, smallest = PRECISION[dtype]
    assert unit(np.array([0.0, 1.0]), dtype).tolist() == [2.0 ** (smallest - bits), 2.0**-bits]


def test_a_wrong_scaling_is_found_without_measuring(merged: tuple[MergePlan, Path]) -> None:
    plan, folder = merged
    other = plan_merge(write_adapter(folder.parent / "other", plan.base, rank=8, alpha=64), plan.base, dtype=plan.dtype)
    report = verify_weights(other, folder, measured=1)
    assert len(report.problems) == len(plan.updates)
