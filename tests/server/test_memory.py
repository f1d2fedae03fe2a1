"""An engine's memory by arithmetic: slots, KV cache and weights; what the flags say of them; what has no room."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.bases import BaseModel, load_base
from adapters.errors import ConfigInvalid
from server.app import build_services
from server.engine.base import EngineOptions
from server.engine.vllm_flags import build_command
from server.machine import Machine
from server.memory import Layout, MemoryPlan, plan_memory
from server.memory_flags import read_layout
from server.memory_watch import computed_parts
from server.room import check_room, memory_lines, size
from server.settings import Settings
from tests.fixtures.adapters import QWEN25_7B, TINY, shape_only_base, write_safetensors

GB = 1_000_000_000
OURS = ("--max-loras", "9", "--max-cpu-loras", "64", "--max-lora-rank", "64")
CPU = Layout(
    is_cpu=True,
    max_loras=3,
    max_rank=8,
    staged_limit=4,
    dtype_bytes=4,
    lora_bytes=4,
    kv_bytes=4,
    context_tokens=256,
    block_tokens=128,
    kv_cache_bytes=1 << 20,
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """Qwen2.5-7B's shapes, in bfloat16."""
    return shape_only_base(tmp_path_factory.mktemp("base") / "qwen", dtype="bfloat16", **QWEN25_7B)


def gpu_plan(base: BaseModel, *flags: str, weights: int | None = 15 * GB) -> MemoryPlan:
    layout = read_layout((*OURS, "--dtype", "bfloat16", *flags), base.config, is_cpu=False)
    return replace(plan_memory(layout, base), weights_bytes=weights if layout.has_plain_weights else None)


# One layer of TINY: 16 hidden, 24 in the middle, 4 query heads of 4 (16), 2 key-value heads (8).
@pytest.mark.parametrize(
    ("split", "sharded", "each"),
    [
        # q, o: 8*16 + 16*8; k, v: 8*16 + 8*8; gate, up: 8*16 + 24*8; down: 8*24 + 16*8
        (1, False, 2 * 256 + 2 * 192 + 3 * 320),
        # in each of two: q 128 + 64, o 64 + 128; k, v 128 + 32; gate, up 128 + 96; down 96 + 128
        (2, False, 2 * (2 * 192 + 2 * 160 + 3 * 224)),
        # A of the column layers by rank, B of the row layers by output: the half of everything
        (2, True, 2 * (128 + 128 + 2 * 96 + 3 * 160)),
        # four workers share two key-value heads: each keeps one whole (4 wide)
        (4, False, 4 * (2 * (128 + 32) + 2 * (128 + 32) + 3 * (128 + 48))),
    ],
)
def test_a_slot_is_a_rank_times_inputs_and_outputs_of_every_slice(
    split: int, sharded: bool, each: int, tiny_base: BaseModel
) -> None:
    layout = replace(CPU, tensor_parallel=split, is_fully_sharded=sharded)
    plan = plan_memory(layout, tiny_base)
    assert plan.slot_bytes == 4 * TINY["num_hidden_layers"] * each
    assert plan.slots_bytes == 3 * plan.slot_bytes


def test_the_cache_of_a_token_is_keys_and_values_of_its_layers(qwen: BaseModel, tiny_base: BaseModel) -> None:
    assert gpu_plan(qwen).token_bytes == 2 * 28 * 4 * 128 * 2 == 57_344
    assert gpu_plan(qwen, "--kv-cache-dtype", "fp8").token_bytes == 28_672
    assert gpu_plan(qwen, "-tp", "8").token_bytes == 2 * 57_344, "each of eight keeps one of four heads"
    plan = plan_memory(CPU, tiny_base)
    assert plan.token_bytes == 2 * 2 * 2 * 4 * 4
    assert plan.sequence_bytes == (2 + 1) * 128 * 128, "256 tokens are two blocks, and vLLM keeps one"
    assert plan_memory(replace(CPU, kv_cache_bytes=(1 << 20) + 5000), tiny_base).kv_cache_bytes == 1 << 20, (
        "whole blocks"
    )


def weighted(folder: Path, dtype: str = "BF16", **config: Any) -> BaseModel:
    """A base with weights of 100, 20 and 70 numbers: embeddings, something else, the output layer."""
    base = shape_only_base(folder, **config)
    sizes = {"model.embed_tokens.weight": 100, "model.norm.weight": 20, "lm_head.weight": 70}
    tensors = {name: np.zeros((10, count // 10)) for name, count in sizes.items()}
    write_safetensors(base.folder / "model.safetensors", tensors, dtype)
    return load_base(base.folder)


def test_weights_are_the_checkpoints_in_the_dtype_that_is_served(tmp_path: Path, qwen: BaseModel) -> None:
    untied = weighted(tmp_path / "untied", tie_word_embeddings=False)
    assert plan_memory(replace(CPU, is_cpu=False), untied).weights_bytes == 190 * 4
    assert plan_memory(replace(CPU, is_cpu=False, dtype_bytes=2), untied).weights_bytes == 190 * 2
    assert plan_memory(CPU, untied).weights_bytes == (190 + 170) * 4, "with packed copies of both"
    tied = weighted(tmp_path / "tied", tie_word_embeddings=True)
    assert plan_memory(CPU, tied).weights_bytes == (120 + 2 * 100) * 4, "not as stored, but packed"
    assert plan_memory(CPU, qwen).weights_bytes is None, "there are none"


def test_a_quantised_bases_weights_are_unknown(tmp_path: Path) -> None:
    awq = weighted(tmp_path / "awq", quantization_config={"quant_method": "awq", "bits": 4})
    layout = read_layout((*OURS, "--dtype", "float16"), awq.config, is_cpu=False)
    assert plan_memory(layout, awq).weights_bytes is None
    packed = weighted(tmp_path / "packed", dtype="I8")
    assert plan_memory(CPU, packed).weights_bytes is None, "whatever its config says"


def test_staged_adapters_take_at_most_their_rank_or_their_file(tiny_base: BaseModel) -> None:
    plan = plan_memory(CPU, tiny_base)
    sizes = 2 * (32 + 24 + 24 + 32 + 3 * 40) * 4  # inputs and outputs of two layers
    assert plan.rank_bytes == sizes
    assert plan.staged_bytes(rank=8, file_bytes=1 << 30) == 8 * sizes
    assert plan.staged_bytes(rank=8, file_bytes=1000) == 2000, "a 16-bit file of few modules, in 32 bits"
    assert plan.staged_bytes(rank=4, file_bytes=1 << 30) == 8 * sizes, "tiles of the kernel are eight columns wide"
    assert plan.staged_bytes(rank=4, file_bytes=1000) == 4000
    assert plan.stage_most_bytes == 4 * 8 * sizes


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), {"dtype_bytes": 2, "lora_bytes": 2, "kv_bytes": 2, "context_tokens": 32768, "block_tokens": 16}),
        ((), {"memory_fraction": 0.92, "tensor_parallel": 1, "has_plain_weights": True, "kv_cache_bytes": None}),
        (("--max_model_len=8k",), {"context_tokens": 8000}),
        (("--max-model-len", "8K"), {"context_tokens": 8192}),
        (("--max-model-len", "4096", "--max-model-len", "2048"), {"context_tokens": 2048}),
        (("--max-model-len", "-1"), {"context_tokens": None}),
        (("--max-model-len", "auto"), {"context_tokens": None}),
        (("--max-model", "2048"), {"context_tokens": None}),  # an abbreviation
        (("--dtype", "float32"), {"dtype_bytes": 4, "lora_bytes": 4, "kv_bytes": 4}),
        (("--dtype", "float32", "--lora-dtype", "bfloat16"), {"dtype_bytes": 4, "lora_bytes": 2}),
        (("--dtype", "mystery"), {"dtype_bytes": None, "lora_bytes": None, "kv_bytes": None}),
        (("--kv-cache-dtype", "fp8_e5m2"), {"kv_bytes": 1, "dtype_bytes": 2}),
        (("--kv-cache-dtype", "turboquant_k8v4"), {"kv_bytes": None}),
        (("--num-gpu-blocks-override", "99"), {"kv_bytes": None, "has_plain_weights": True}),
        (("-tp", "4", "--pipeline-parallel-size=2"), {"tensor_parallel": 4, "pipeline_parallel": 2, "workers": 8}),
        (("--tensor-parallel", "4"), {"tensor_parallel": None, "workers": None}),
        (("--fully-sharded-loras",), {"is_fully_sharded": True}),
        (("--quantization", "fp8"), {"has_plain_weights": False, "kv_bytes": 2}),
        (("-q", "bitsandbytes"), {"has_plain_weights": False}),
        (("--cpu-offload-gb", "4"), {"has_plain_weights": False}),
        (("--speculative-config.method", "ngram"), {"has_plain_weights": False, "kv_bytes": None}),
        (("--gpu-memory-utilization", ".5"), {"memory_fraction": 0.5}),
        (("--gpu-memory-utilization", "high"), {"memory_fraction": None}),
        (("--ma", "4"), {"max_loras": 9, "context_tokens": None}),
        (("--block-size", "32", "--enforce-eager", "-tp", "2"), {"block_tokens": 32, "tensor_parallel": 2}),
        (("--chat-template", "quantization", "--model-impl", "vllm"), {"context_tokens": None}),
        (("--model", "/models/x"), {"context_tokens": 32768, "has_plain_weights": True}),
    ],
)  # fmt: skip
def test_flags_say_what_is_laid_out_and_what_cannot_be_known(
    flags: Sequence[str], expected: dict[str, object], qwen: BaseModel
) -> None:
    layout = read_layout((*OURS, "--dtype", "auto", *flags), qwen.config, is_cpu=False)
    assert {name: getattr(layout, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, {"context_tokens": None}),
        ({"rope_parameters": {"rope_type": "default"}}, {"context_tokens": 32768}),
        ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}, {"kv_bytes": None}),
        ({"quantization_config": {"quant_method": "gptq"}}, {"kv_bytes": 2, "lora_bytes": 2}),
        ({"dtype": "float32"}, {"dtype_bytes": 2}),  # vLLM's auto
        ({"dtype": None}, {"dtype_bytes": None}),
    ],
)
def test_a_config_says_it_too(config: dict[str, Any], expected: dict[str, object], qwen: BaseModel) -> None:
    layout = read_layout((*OURS, "--dtype", "auto"), {**qwen.config, **config}, is_cpu=False)
    assert {name: getattr(layout, name) for name in expected} == expected


def test_a_sliding_window_makes_a_sequence_unknown(qwen: BaseModel, tmp_path: Path) -> None:
    sliding = shape_only_base(tmp_path / "base", **QWEN25_7B, use_sliding_window=True, sliding_window=4096)
    assert gpu_plan(sliding).sequence_bytes is None


def test_the_flags_that_we_start_vllm_with_are_all_read(qwen: BaseModel, tmp_path: Path) -> None:
    options = EngineOptions(qwen.folder, qwen.id, tmp_path, slots=8, max_rank=20, staged_limit=16)
    layout = read_layout(build_command(options, tmp_path / "socket")[4:], qwen.config, is_cpu=True)
    assert (layout.max_loras, layout.max_rank, layout.staged_limit) == (9, 32, 16), "as vLLM rounds them up"
    assert (layout.kv_cache_bytes, layout.context_tokens, layout.block_tokens) == (1 << 30, 4096, 128)
    assert layout.dtype_bytes in (2, 4) and layout.lora_bytes == layout.kv_bytes == layout.dtype_bytes


def test_an_engine_without_lora_has_no_slots_and_no_stage(qwen: BaseModel, tmp_path: Path) -> None:
    options = EngineOptions(qwen.folder, qwen.id, tmp_path, slots=0)
    plan = plan_memory(read_layout(build_command(options, tmp_path / "socket")[4:], qwen.config, is_cpu=True), qwen)
    assert (plan.slots_bytes, plan.stage_most_bytes) == (0, 0)
    (line,) = memory_lines(plan, Machine(GB))
    assert "no slots" in line and "KV cache" in line
    parts = computed_parts(plan, [(16, 10_000_000)], None)  # what is merged into the weights
    assert (parts["slots"], parts["packed"], parts["stage"]) == (0, 0, 0)


def cpu_plan(base: BaseModel, **changes: Any) -> MemoryPlan:
    return plan_memory(replace(CPU, **changes), base)


def test_one_sequence_must_fit_the_cpus_cache_and_the_advice_does(tiny_base: BaseModel) -> None:
    needed = cpu_plan(tiny_base).sequence_bytes
    assert needed is not None
    roomy = Machine(GB)
    check_room(cpu_plan(tiny_base, kv_cache_bytes=needed), roomy)
    with pytest.raises(ConfigInvalid, match=f"raise HOTSHOE_KV_CACHE_BYTES to {needed}") as refused:
        check_room(cpu_plan(tiny_base, kv_cache_bytes=needed - 1), roomy)
    assert f"has {needed - 1} bytes" in refused.value.message and "to at most 128." in refused.value.message
    assert refused.value.param == "kv_cache_bytes"
    check_room(cpu_plan(tiny_base, kv_cache_bytes=needed - 1, context_tokens=128), roomy)
    with pytest.raises(ConfigInvalid, match=r"HOTSHOE_KV_CACHE_BYTES to \d+\.$"):  # no context is short enough
        check_room(cpu_plan(tiny_base, kv_cache_bytes=1000), roomy)


def test_what_is_allocated_must_fit_the_machine(tmp_path: Path) -> None:
    base = weighted(tmp_path / "base", tie_word_embeddings=False)
    plan = cpu_plan(base)
    assert plan.weights_bytes is not None and plan.slots_bytes is not None and plan.kv_cache_bytes is not None
    total = plan.weights_bytes + plan.slots_bytes + plan.kv_cache_bytes
    check_room(plan, Machine(total))
    with pytest.raises(ConfigInvalid, match=r"weights 1.44 kB, slots .* KV cache 1.05 MB.*HOTSHOE_SLOTS"):
        check_room(plan, Machine(total - 1))


def test_one_sequence_must_fit_what_a_gpu_has_left_and_the_advice_does(qwen: BaseModel) -> None:
    card = Machine(64 * GB, 24 * GB)
    check_room(gpu_plan(qwen), card)  # 22.08 GB less weights 15 GB and slots 2.91 GB; a sequence takes 1.88 GB
    with pytest.raises(ConfigInvalid) as refused:
        check_room(gpu_plan(qwen, "--gpu-memory-utilization", "0.8"), card)
    message = refused.value.message
    figures = ("32768 tokens needs 1.88 GB", "at most 1.29 GB is left", "19.2 GB of 24.0 GB", "utilization 0.8")
    for figure in (*figures, "weights take 15.0 GB", "9 slots 2.91 GB"):
        assert figure in message, message
    shorter = message.split("to at most ")[1].split(" tokens")[0]
    check_room(gpu_plan(qwen, "--gpu-memory-utilization", "0.8", "--max-model-len", shorter), card)
    with pytest.raises(ConfigInvalid, match="at most 0 B is left"):
        check_room(gpu_plan(qwen), Machine(64 * GB, 16 * GB))
    check_room(gpu_plan(qwen, "-tp", "2"), Machine(64 * GB, 16 * GB))


@pytest.mark.parametrize(
    "flags",
    [
        ("--quantization", "bitsandbytes"),
        ("--max-model-len", "auto"),
        ("--tensor-parallel", "8"),
        ("--kv-cache-dtype", "nvfp4"),
        ("--cpu-offload-gb", "16"),
    ],
)
def test_nothing_is_refused_for_a_size_that_is_unknown(flags: Sequence[str], qwen: BaseModel) -> None:
    tight = Machine(64 * GB, 8 * GB)
    check_room(gpu_plan(qwen, *flags), tight)
    check_room(gpu_plan(qwen), Machine(64 * GB))
    assert memory_lines(gpu_plan(qwen, *flags), tight)
    with pytest.raises(ConfigInvalid):
        check_room(gpu_plan(qwen), tight)


def test_a_start_prints_the_parts(tmp_path: Path, qwen: BaseModel) -> None:
    base = weighted(tmp_path / "base", tie_word_embeddings=False)
    first, second = memory_lines(cpu_plan(base), Machine(2 * GB))
    cache = "KV cache 1.05 MB (21.3 sequences of 256 tokens); together 1.09 MB"
    assert first == f"  memory  weights 1.44 kB, 3 slots x 14.8 kB (rank 8), {cache}"
    assert second.strip() == "staged adapters: at most 4 x 14.8 kB = 59.4 kB more, of 2.00 GB main memory"
    first, _ = memory_lines(gpu_plan(qwen, "--quantization", "fp8"), Machine(GB, 24 * GB))
    assert first.startswith("  memory  weights unknown, 9 slots x 323 MB (rank 64), KV cache at most unknown")
    assert "GPU memory unknown" in memory_lines(gpu_plan(qwen), Machine(GB))[0]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (78_151_680, "78.2 MB"), (999_999, "1.00 MB"), (5e15, "5000 TB")],
)
def test_sizes_are_written_with_three_digits(count: float, text: str) -> None:
    assert size(count) == text


def test_a_server_without_room_is_refused_before_it_opens_its_state_or_starts_an_engine(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    large = json.loads((tiny_base.folder / "config.json").read_text()) | QWEN25_7B
    base = shape_only_base(tmp_path / "base", **large)
    home = tmp_path / "home"
    home.mkdir()
    settings = Settings(home=home, base=str(base.folder), kv_cache_bytes=64 << 20)
    with pytest.raises(ConfigInvalid, match="one sequence of 4096 tokens needs"):
        build_services(settings)
    assert not list(home.iterdir())
