"""What `hotshoe size` predicts beside what the running engine reports: within 5%, on the CPU here and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from adapters.bases import BaseModel, load_base
from server.cli.devices import find_device
from server.cli.size import base_config, form_of
from server.engine.base import EngineOptions, EngineUsage
from server.engine.vllm import VllmEngine
from server.engine.vllm_flags import is_cpu_build, lora_rank
from server.machine import Machine, open_gpus
from server.memory import Layout, plan_sizes
from server.sizing.parts import Device
from server.sizing.placed import Chosen, Placed
from server.sizing.served import served_sizing
from tests.conftest import CONTEXT_TOKENS, MAX_RANK, SLOTS, engine_options
from tests.fixtures.bases import tiny_qwen3
from tests.fixtures.borrowed import BorrowedEngine
from tests.fixtures.engines import EngineRig
from tests.fixtures.service import Server, running

WITHIN = 0.05
EXACT = ("weights_bytes", "slot_bytes", "stage_bytes")
COMPARED = (*EXACT, "kv_cache_bytes", "kv_cache_tokens")
GB = 10**9
FRACTION = 0.5  # of a GPU


def cpu() -> Device:
    return find_device("cpu", 1, 0, None)


def near(predicted: dict[str, Any], reported: dict[str, Any], *names: str) -> None:
    for name in names:
        assert reported[name] > 0 or name == "slot_bytes", name  # slots that point at staged adapters take none
        assert predicted[name] == pytest.approx(reported[name], rel=WITHIN), name


@pytest.mark.model
def test_the_running_engine_reports_what_was_predicted_and_system_shows_both(
    vllm_engine: EngineRig, embedded_base: BaseModel, tmp_path: Path
) -> None:
    vllm_engine.unload_all()
    on = BorrowedEngine(vllm_engine, tmp_path / "engine")
    with running(embedded_base, tmp_path, on=on, staged_limit=6) as server:
        for name, rank in (("one", 8), ("two", 64)):
            assert server.push(name, server.adapter(rank=rank), wait=120).json()["status"] == "ready"
        sizing = server.http.get("/v1/system").json()["sizing"]
    near(sizing["predicted"], sizing["reported"], *COMPARED)
    assert sizing["unknown"] is None
    assert sizing["predicted"]["one_slot_bytes"] * (SLOTS + 1) == sizing["reported"]["slot_bytes"]
    assert sizing["predicted"]["one_staged_bytes"] * (8 + 64) == MAX_RANK * sizing["reported"]["stage_bytes"]
    room = sizing["room"]
    assert room["adapters"] == room["adapters_by_setting"] == 4 < room["adapters_by_memory"]
    assert room["kv_cache_tokens"] <= sizing["reported"]["kv_cache_tokens"]
    assert room["sequences"] == room["kv_cache_tokens"] // CONTEXT_TOKENS
    assert sizing["recommended"]["max_rank"] == MAX_RANK and sizing["recommended"]["slots"] == 6


def test_a_server_that_loads_no_model_has_no_sizing(server: Server) -> None:
    assert server.http.get("/v1/system").json()["sizing"] is None


SETTINGS = [
    {"slots": 1, "max_rank": 8, "context_length_tokens": 512, "kv_cache_bytes": 64 << 20},
    {"slots": 9, "max_rank": 20, "context_length_tokens": 4096, "kv_cache_bytes": 300 << 20},
    {"slots": 2, "max_rank": 128, "dtype": "bfloat16", "context_length_tokens": 1024, "kv_cache_bytes": 200 << 20},
]


@pytest.mark.model
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("given", SETTINGS, ids=lambda given: f"{given['slots']} of rank {given['max_rank']}")
def test_an_engine_of_other_settings_reports_what_the_command_predicts(
    given: dict[str, Any], embedded_base: BaseModel, tmp_path: Path
) -> None:
    options = replace(engine_options(embedded_base, tmp_path / "run"), extra_args=(), **given)
    with started(options, embedded_base, tmp_path) as rig:
        check(rig, options, "embedded", cpu())


@pytest.mark.model
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_qwen3_reports_what_the_command_predicts(tmp_path: Path) -> None:
    base = load_base(tiny_qwen3(tmp_path / "tiny-qwen3", head_dim=32))
    sizes: dict[str, Any] = {"slots": 2, "max_rank": 16, "context_length_tokens": 1024, "kv_cache_bytes": 64 << 20}
    options = EngineOptions(base.folder, base.id, tmp_path / "run", **sizes)
    with started(options, base, tmp_path) as rig:
        check(rig, options, str(base.folder), cpu())


@contextmanager
def started(options: EngineOptions, base: BaseModel, scratch: Path) -> Iterator[EngineRig]:
    """An engine for one test."""
    rig = EngineRig(VllmEngine(options), base, scratch)
    try:
        rig.call(rig.engine.start())
        yield rig
    finally:
        rig.close()


def check(rig: EngineRig, options: EngineOptions, source: str, device: Device) -> None:
    """Load an adapter of the largest rank and hold the command's figures to what the engine then reports."""
    rig.load(rank=options.max_rank)
    usage = rig.call(rig.engine.usage())
    _, config = base_config(source)
    form = form_of(config, device, options.dtype, None, "auto")
    context = options.context_length_tokens or int(config["max_position_embeddings"])
    fraction = 1.0 if device.is_cpu else FRACTION
    chosen = Chosen(options.slots, lora_rank(options.max_rank), context, 1, options.max_rank, 1, fraction)
    placed = Placed(config, form, device, chosen)
    cache, tokens = placed.cache_bytes, placed.cache_tokens
    if device.is_cpu:  # the cache is what was set, and not what one sequence needs
        blocks = options.kv_cache_bytes // placed.block_bytes
        cache, tokens = blocks * placed.block_bytes, (blocks - 1) * placed.block_tokens
    predicted = {
        "weights_bytes": placed.plan.weights_bytes,
        "slot_bytes": placed.plan.slots_bytes,
        "kv_cache_bytes": cache,
        "kv_cache_tokens": tokens,
        "stage_bytes": placed.stage_bytes,
    }
    near(predicted, asdict(usage), *(COMPARED if device.is_cpu else EXACT))
    if not device.is_cpu:
        (cached,) = (part for part in placed.parts() if part.name == "kv_cache")
        low, high = (1 - WITHIN) * cached.low_bytes, (1 + WITHIN) * cached.high_bytes
        assert low <= usage.kv_cache_bytes <= high, "what estimates leave of the share, with their ranges"
        assert usage.kv_cache_tokens == (usage.kv_cache_bytes // placed.block_bytes - 1) * placed.block_tokens


@pytest.mark.gpu
@pytest.mark.timeout(1800)
def test_on_a_gpu_weights_slots_and_stage_are_those_predicted_and_the_cache_is_in_its_range(
    embedded_base: BaseModel, tmp_path: Path
) -> None:
    gpus = open_gpus()
    if is_cpu_build():
        pytest.skip("this vLLM is its CPU build: no engine runs on a GPU here")
    if gpus is None or (total := gpus.largest_bytes()) is None:
        pytest.skip("no NVIDIA driver on this machine: there is no GPU to predict for")
    device = Device(gpus_name(total), total)
    options = replace(
        engine_options(embedded_base, tmp_path / "run"), extra_args=("--gpu-memory-utilization", str(FRACTION))
    )
    with started(options, embedded_base, tmp_path) as rig:
        check(rig, options, "embedded", device)


def gpus_name(total: int) -> str:
    """Enough of a name for vLLM's defaults, which tell an A100 from others of its size."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"a GPU of {total} bytes"


def test_what_cannot_be_predicted_says_why_and_what_is_reported_stays(tiny_base: BaseModel) -> None:
    usage = EngineUsage(GB, 1000, 0.5, 10, 0, 0, kv_cache_tokens=100, weights_bytes=5)
    layout = Layout(True, 3, 8, 4, 4, 4, 4, 256, 128, kv_cache_bytes=1 << 20)
    wrong = {
        "quantised": {"has_plain_weights": False},
        "pipeline": {"pipeline_parallel": 2},
        "unknown": {"context_tokens": None},
        "vLLM's own size": {"block_tokens": 32},
        "memory of the GPU": {"is_cpu": False, "block_tokens": 16, "memory_fraction": 0.9},
    }
    for words, change in wrong.items():
        plan = plan_sizes(replace(layout, **change), tiny_base.config, 1)  # type: ignore[arg-type]
        row = served_sizing(tiny_base, plan, Machine(8 * GB), [], usage)
        assert row["predicted"] is None and words in row["unknown"], words
        assert row["reported"]["weights_bytes"] == 5


def test_a_base_whose_config_says_too_little_is_unknown_and_no_error(tiny_base: BaseModel) -> None:
    config = {key: value for key, value in tiny_base.config.items() if key != "vocab_size"}
    plan = plan_sizes(Layout(True, 3, 8, 4, 4, 4, 4, 256, 128), config, None)
    row = served_sizing(replace(tiny_base, config=config), plan, Machine(8 * GB), [], None)
    assert "vocab_size" in row["unknown"]


def test_a_gpu_engine_has_its_cache_predicted_too(tiny_base: BaseModel) -> None:
    layout = Layout(False, 3, 8, 4, 2, 2, 2, 256, 16, memory_fraction=0.9)
    row = served_sizing(tiny_base, plan_sizes(layout, tiny_base.config, 1), Machine(64 * GB, 24 * GB), [(8, 99)], None)
    predicted, room = row["predicted"], row["room"]
    assert row["reported"] is None and row["unknown"] is None
    assert 15 * GB < predicted["kv_cache_bytes"] < 0.9 * 24 * GB and predicted["stage_bytes"] == 99
    assert room == {
        "adapters": 3,
        "adapters_by_setting": 3,
        "adapters_by_memory": None,
        "kv_cache_tokens": None,
        "sequences": None,
    }
    assert row["recommended"]["gpu_memory_utilization"] == 0.95
