"""The arithmetic of memory against published figures, and against what a run really holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.bases import load_base
from tests.fixtures.adapters import QWEN25_7B
from tests.fixtures.bases import shape_only
from tests.training.test_packed import settings
from training.memory import memory
from training.model import load_model
from training.planner.sizes import of_base

QWEN2_5_7B = {**QWEN25_7B, "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": False}
GIB = 2**30


def on_a_gpu(method: Any, **asked: Any) -> Any:
    return replace(settings(method, dtype="bfloat16", **asked), optimizer="paged_adamw_8bit")


def test_qwen2_5_7b_has_the_published_sizes(tmp_path: Path) -> None:
    base = load_base(shape_only(tmp_path / "qwen2.5-7b", QWEN2_5_7B))
    lora, qlora, full = (memory(on_a_gpu(method), base) for method in ("lora", "qlora", "full"))
    adapter = of_base(base).lora_parameters(16)
    assert adapter == pytest.approx(40.4e6, rel=0.002)
    assert (lora.weights_bytes - 4 * adapter) / GIB == pytest.approx(14.2, rel=0.01)
    assert (qlora.weights_bytes - 4 * adapter) / GIB == pytest.approx(5.17, rel=0.01)
    embedding = 152_064 * 3584  # whose state stays in float32, 6 bytes more a weight
    assert full.total_bytes == pytest.approx(10 * 7.616e9 + 6 * embedding, rel=0.005)  # 76 GB and that


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_loaded_model_has_the_bytes_that_were_counted(method: Any, qwen2_base: Path) -> None:
    base, chosen = load_base(qwen2_base), settings(method)
    model = load_model(base, chosen, "cpu")
    counted = memory(chosen, base)
    assert sum(value.nbytes for value in model.parameters()) == pytest.approx(counted.weights_bytes, rel=0.02)
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert counted.gradients_bytes == pytest.approx(4 * trained, rel=0.02)
    assert counted.optimizer_bytes == 2 * counted.gradients_bytes
    assert f"memory: {counted.total_bytes / 1e9:.2f} GB (weights " in counted.line()
