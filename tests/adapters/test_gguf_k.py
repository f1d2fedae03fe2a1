"""K-quants: llama.cpp's blocks as we read them, which type a tensor gets, and that a wrong element is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from adapters.bases import BaseModel, load_base
from adapters.ggml import quantise
from adapters.gguf_k import K_LIMITS, decode_k, hold_k
from adapters.gguf_plan import GgufPlan, plan_gguf
from adapters.gguf_types import BLOCK_SIZES, K_QUANTS, chosen_type, tensor_type
from adapters.gguf_verify import verify_gguf
from adapters.gguf_write import write_gguf
from adapters.llamacpp import missing
from adapters.merge_plan import plan_merge
from adapters.parity_gguf import GgufFiles, ask_llamacpp
from tests.fixtures.adapters import write_adapter
from tests.fixtures.bases import tiny_qwen2

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")
SHAPE = (32, 1024)


def kinds_of_weights() -> dict[str, np.ndarray]:
    """What may be hard for scales that a block shares."""
    random = np.random.default_rng(0)
    normal = random.normal(size=SHAPE)
    spiked = normal * 0.02
    spiked[:, ::64] = random.normal(size=(SHAPE[0], SHAPE[1] // 64)) * 50
    return {
        "normal": normal,
        "heavy": random.standard_t(2, size=SHAPE),
        "sparse": normal * (random.random(SHAPE) < 0.02),
        "positive": np.abs(normal) + 3,
        "negative": -np.abs(normal) - 3,
        "constant": np.full(SHAPE, 0.37),
        "zero": np.zeros(SHAPE),
        "below float16": normal * 1e-9,
        "scales apart": normal * np.exp(2 * random.normal(size=(SHAPE[0], SHAPE[1] // 16))).repeat(16, 1),
        "offsets apart": normal + 5 * random.normal(size=(SHAPE[0], SHAPE[1] // 32)).repeat(32, 1),
        "spiked": spiked,
        "large": normal * 1e5,
    }


@pytest.mark.parametrize("kind", K_LIMITS)
def test_blocks_are_read_as_the_gguf_library_reads_them_and_held_to_their_scales(kind: str) -> None:
    from gguf import GGMLQuantizationType, dequantize

    for name, weights in kinds_of_weights().items():
        rows = weights.astype(np.float32)
        raw = quantise(rows, kind)
        stored = decode_k(raw.reshape(-1, BLOCK_SIZES[kind][1]), kind)
        theirs = dequantize(raw.reshape(len(rows), -1), GGMLQuantizationType[kind])
        np.testing.assert_allclose(stored.values.reshape(SHAPE), theirs, rtol=1e-6, atol=1e-30)
        exact = rows.astype(np.float64).reshape(-1, 256)
        wrong, nearest = hold_k(exact, np.zeros_like(exact), stored, kind)
        assert not wrong.any(), (name, kind, int(wrong.sum()))
        assert (np.abs(stored.values - nearest) <= 1e-9 * np.abs(nearest)).mean() > 0.99, name


@pytest.mark.parametrize("kind", K_LIMITS)
def test_a_flipped_bit_of_a_block_is_found_unless_it_is_the_last_of_a_scale(kind: str) -> None:
    random = np.random.default_rng(1)
    rows = random.normal(size=(1, 256)).astype(np.float32)
    block, exact = quantise(rows, kind), rows.astype(np.float64)
    missed = []
    for at in range(8 * len(block)):
        flipped = block.copy()
        flipped[at // 8] ^= 1 << at % 8
        wrong, _ = hold_k(exact, np.zeros_like(exact), decode_k(flipped.reshape(1, -1), kind), kind)
        missed += [] if wrong.any() else [at]
    assert len(missed) <= 4 and all(at % 8 == 0 for at in missed), "these change no element by half a step of its own"


def test_each_tensor_has_the_type_that_llama_cpp_gives_it() -> None:
    down = [chosen_type(f"blk.{layer}.ffn_down.weight", "Q4_K_M", 16) for layer in range(16)]
    assert [layer for layer, kind in enumerate(down) if kind == "Q6_K"] == [0, 1, 4, 7, 10, 13, 14, 15]
    assert set(down) == {"Q4_K", "Q6_K"}
    assert (
        chosen_type("blk.0.attn_q.weight", "Q4_K_M", 16) == "Q4_K" == chosen_type("blk.2.attn_v.weight", "Q4_K_M", 16)
    )
    assert chosen_type("token_embd.weight", "Q5_K_M", 16) == chosen_type("output.weight", "Q4_K_M", 16) == "Q6_K"
    assert chosen_type("blk.2.ffn_up.weight", "Q5_K_M", 16) == "Q5_K"
    assert {chosen_type(f"blk.{layer}.ffn_down.weight", "Q6_K", 16) for layer in range(16)} == {"Q6_K"}
    narrow = [tensor_type("blk.2.ffn_up.weight", (8, width), "Q4_K_M", 16) for width in (512, 576, 100)]
    assert narrow == ["Q4_K", "Q5_0", "F16"]
    assert tensor_type("blk.2.attn_norm.weight", (512,), "Q4_K_M", 16) == "F32"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A base whose rows are whole super-blocks."""
    folder = tmp_path_factory.mktemp("wide") / "base"
    return load_base(tiny_qwen2(folder, hidden_size=256, intermediate_size=512, num_hidden_layers=4, head_dim=64))


@pytest.fixture(scope="module")
def adapter(wide: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "router", wide, rank=8, scale=0.1)


def plan_of(adapter: Path, base: BaseModel, quantisation: str) -> GgufPlan:
    return plan_gguf(plan_merge(adapter, base), quantisation=quantisation, name="x")


@pytest.mark.parametrize("quantisation", K_QUANTS)
def test_a_file_reads_back_right_is_the_same_for_any_workers_and_a_changed_byte_is_found(
    wide: BaseModel, adapter: Path, tmp_path: Path, quantisation: str
) -> None:
    plan = plan_of(adapter, wide, quantisation)
    paths = [tmp_path / f"{workers}.gguf" for workers in (1, 3)]
    for path, workers in zip(paths, (1, 3), strict=True):
        write_gguf(plan, path, workers=workers)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    report = verify_gguf(plan, paths[0])
    assert report.problems == [] and plan.fallbacks == {}
    figures = report.as_dict()
    assert figures["outside_bound"] == 0 and 0 < figures["relative_error"] < 0.12
    kinds = {tensor.type for tensor in plan.tensors if len(tensor.source.shape) == 2}
    assert kinds == {"q6_k": {"Q6_K"}, "q5_k_m": {"Q5_K", "Q6_K"}, "q4_k_m": {"Q4_K", "Q6_K"}}[quantisation]
    (tensor,) = (one for one in plan.tensors if one.name == "blk.1.ffn_up.weight")
    raw = bytearray(paths[0].read_bytes())
    raw[tensor.begin + 100] ^= 0x10
    paths[0].write_bytes(raw)
    (problem,) = verify_gguf(plan, paths[0]).problems
    assert "gate_proj" in problem or "up_proj" in problem or "ffn_up" in problem


@pytest.mark.parametrize("quantisation", K_QUANTS)
def test_llama_cpp_answers_from_it_within_what_its_bits_lose(
    wide: BaseModel, adapter: Path, tmp_path: Path, quantisation: str
) -> None:
    write_gguf(plan_of(adapter, wide, quantisation), tmp_path / "f.gguf")
    found = ask_llamacpp(GgufFiles(tmp_path / "f.gguf", quantisation.upper()), wide.folder, adapter)
    assert found["problems"] == [] and found["tokenizer"]["different"] == []
    assert found["forms"][0]["against_peft"]["mean_kl"] < 0.1
