"""The size of an update beside its base: measured without making it, and held back above a factor of ten."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from adapters.bases import BaseModel, load_base
from adapters.magnitude import largest_update
from adapters.publish import PublishContext, preview, publish
from adapters.types import VersionStatus
from tests.fixtures.adapters import AdapterSpec, adapter_tensors, write_adapter
from tests.fixtures.bases import tiny_qwen2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A tiny base with its weights."""
    return load_base(tiny_qwen2(tmp_path_factory.mktemp("whole") / "base"))


def test_the_ratio_is_that_of_the_frobenius_norms(tmp_path: Path, whole: BaseModel) -> None:
    from safetensors.numpy import load_file

    spec = AdapterSpec(targets=("q_proj", "down_proj"), scale=0.5, alpha=20)
    found = largest_update(write_adapter(tmp_path, whole, spec), whole)
    assert found is not None
    weights, tensors = load_file(whole.folder / "model.safetensors"), adapter_tensors(whole, spec)
    ratios = {}
    for name in {key.split(".lora_")[0] for key in tensors}:
        update = 5 * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        module = name.removeprefix("base_model.model.")
        ratios[module] = float(np.linalg.norm(update) / np.linalg.norm(weights[f"{module}.weight"]))
    assert found.module in ratios
    assert found.ratio == pytest.approx(ratios[found.module], rel=0.15)  # |W| comes from 32 of its rows
    assert found.ratio == pytest.approx(max(ratios.values()), rel=0.15)


def test_a_base_without_weights_measures_nothing(tmp_path: Path, tiny: BaseModel) -> None:
    assert largest_update(write_adapter(tmp_path, tiny), tiny) is None


def test_u19_an_update_ten_times_its_base_is_kept_quarantined_with_figure_limit_and_next_step(
    tmp_path: Path, context: PublishContext, whole: BaseModel
) -> None:
    context = dataclasses.replace(context, base=whole)
    version = publish(write_adapter(tmp_path / "big", whole, alpha=1e5), "router", context=context)
    assert version.status is VersionStatus.QUARANTINED
    (reason,) = version.reasons
    assert (reason["code"], "10 is the most" in reason["message"]) == ("update_too_large", True)
    assert "HOTSHOE_MAX_UPDATE_RATIO" in reason["advice"]
    assert reason["path"] in whole.shapes
    assert publish(write_adapter(tmp_path / "small", whole, alpha=8), "router", context=context).reasons == ()
    allowed = dataclasses.replace(context, max_update_ratio=1e9)
    assert preview(tmp_path / "big", context=context)["reasons"] == [reason]
    assert preview(tmp_path / "big", context=allowed)["reasons"] == []
