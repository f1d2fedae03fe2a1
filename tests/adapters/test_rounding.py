"""The copy that answers is rounded from the canonical files once, and what it loses by that is measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.bases import BaseModel
from adapters.rounding import rounding
from tests.fixtures.adapters import write_adapter

WEIGHTS = "adapter_model.safetensors"


def stored_as(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(value.shape, generator=generator).to(dtype)
        for name, value in load_file(folder / WEIGHTS).items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("served", ["bfloat16", "float16"])
def test_the_loss_is_that_of_torchs_own_rounding(served: str, tmp_path: Path, tiny: BaseModel) -> None:
    tensors = stored_as(write_adapter(tmp_path, tiny), torch.float32)
    found = rounding(tmp_path, served)
    assert found is not None and found.stored == ("F32",)
    away = {name: value - value.to(getattr(torch, served)).float() for name, value in tensors.items()}
    joined, lost = (torch.cat([value.flatten() for value in part.values()]).double() for part in (tensors, away))
    assert found.relative_error == pytest.approx(float(lost.norm() / joined.norm()), rel=1e-9)
    each = {name: float(away[name].double().norm() / value.double().norm()) for name, value in tensors.items()}
    assert (found.tensor, found.tensor_relative_error) == (
        max(each, key=lambda name: each[name]),
        pytest.approx(max(each.values()), rel=1e-9),
    )
    assert found.relative_error < (2**-9 if served == "bfloat16" else 2**-12)


@pytest.mark.parametrize(
    ("stored", "served"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float16", "float32")]
)
def test_a_format_that_holds_every_value_loses_nothing(
    stored: str, served: str, tmp_path: Path, tiny: BaseModel
) -> None:
    stored_as(write_adapter(tmp_path, tiny), getattr(torch, stored))
    found = rounding(tmp_path, served)
    assert found is not None and (found.relative_error, found.tensor_relative_error) == (0.0, 0.0)


def test_a_value_that_the_serving_format_cannot_hold_is_no_figure(tmp_path: Path, tiny: BaseModel) -> None:
    folder = write_adapter(tmp_path, tiny)
    tensors = {name: torch.full_like(value, 70_000.0) for name, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    assert rounding(folder, "float16") is None
    assert rounding(folder, "bfloat16") is not None


def test_a_format_that_is_not_known_and_an_adapter_of_zeros_are_no_division_by_zero(
    tmp_path: Path, tiny: BaseModel
) -> None:
    folder = write_adapter(tmp_path, tiny)
    assert rounding(folder, "fp8_e5m2") is None
    zeros = {name: torch.zeros_like(value) for name, value in load_file(folder / WEIGHTS).items()}
    save_file(zeros, folder / WEIGHTS, metadata={"format": "pt"})
    found = rounding(folder, "bfloat16")
    assert found is not None and np.isfinite(found.relative_error) and found.relative_error == 0.0
