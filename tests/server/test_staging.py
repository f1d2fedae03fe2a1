"""A load in parts: packed beside the engine, handed over between its steps, there when it is whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from adapters.bases import BaseModel
from adapters.errors import EngineFailed
from server.engine.base import EngineAdapter
from server.vllm_plugin.kernel import LINE, SlotImage, lay_out
from server.vllm_plugin.stage import (
    GROUP_BYTES,
    GROUP_LAYERS,
    SHARE,
    Layer,
    Layout,
    Pace,
    Staged,
    StagingThread,
    groups,
    packed,
    stage,
)
from server.vllm_plugin.staged import Staging, mapped
from tests.fixtures.adapters import AdapterSpec, adapter_tensors, write_adapter, write_safetensors
from tests.fixtures.engines import EngineRig
from tests.fixtures.reference import assert_same_greedy

WEIGHTS = "adapter_model.safetensors"
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
MAX_RANK = 16


def layout_for(base: BaseModel) -> Layout:
    """As vLLM lays the base out: q, k and v in one layer, gate and up in another."""
    singles = {name: name for name in ("o_proj", "down_proj")}
    grouped: dict[str, list[str]] = {}
    for name in base.shapes:
        prefix, _, last = name.rpartition(".")
        whole = next((one for one, parts in PACKED.items() if last in parts), singles.get(last, last))
        grouped.setdefault(f"{prefix}.{whole}", []).append(name)
    layers = []
    for name, modules in grouped.items():
        order = PACKED.get(name.rpartition(".")[2], ())
        found = sorted(modules, key=lambda one: order.index(one.rpartition(".")[2]) if order else 0)
        shapes = [base.shapes[module] for module in found]
        sizes = tuple(shape.out_features for shape in shapes)
        layers.append(Layer(name, tuple(found), shapes[0].in_features, sizes))
    expected = tuple({name.rpartition(".")[2] for name in base.shapes})
    return Layout(tuple(layers), expected, vocabulary=1000, max_positions=None)


def image_of(seed: int = 0, columns: int = 24) -> SlotImage:
    random = torch.Generator().manual_seed(seed)
    a, b = torch.randn(16, 8, generator=random), torch.randn(8, columns, generator=random)
    return lay_out(a, [(0, columns, 0, 8, b)])


def test_another_process_maps_the_bytes_and_keeps_them_when_they_are_closed() -> None:
    images = [("first", image_of(1)), ("second", image_of(2))]
    staged = Staged(images, rank=8)
    memory = mapped(staged.path, staged.nbytes)
    staged.close()
    for (name, image), row in zip(images, staged.rows, strict=True):
        assert row[0] == name and row[1] % LINE == 0
        assert np.array_equal(memory[row[1] : row[1] + row[2]], image.stream.numpy())


def test_groups_are_all_rows_in_order_and_bounded() -> None:
    rows: list[Any] = [(f"layer {number}", 0, 1000, 0, 8, []) for number in range(2 * GROUP_LAYERS + 1)]
    rows[3] = ("a large one", 0, GROUP_BYTES, 0, 8, [])
    found = list(groups(rows))
    assert [row for group in found for row in group] == rows
    assert [len(group) for group in found] == [4, GROUP_LAYERS, GROUP_LAYERS - 3]


def test_staging_computes_on_one_thread_and_leaves_other_threads_as_they_were() -> None:
    import asyncio

    here = torch.get_num_threads()
    assert asyncio.run(StagingThread().run(torch.get_num_threads)) == 1
    assert torch.get_num_threads() == here


@pytest.mark.parametrize("is_busy", [True, False])
def test_staging_works_a_small_part_of_the_time_while_answers_are_made(is_busy: bool) -> None:
    pace, begun_at, began_at = Pace(lambda: is_busy), time.thread_time(), time.monotonic()
    while (worked := time.thread_time() - begun_at) < 0.02:
        pace.rest()
    share = worked / (time.monotonic() - began_at)
    assert share < 1.5 * SHARE if is_busy else share > 3 * SHARE


class Manager:
    """What a worker's Staging needs of vLLM's manager."""

    def __init__(self, slots: int, capacity: int) -> None:
        self.lora_index_to_id: list[int | None] = [None] * slots
        self.capacity = capacity
        self._registered_adapters: dict[int, Any] = {}
        self.punica_wrapper_mapping: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._registered_adapters)

    def activate_adapter(self, number: int) -> None:
        self.lora_index_to_id[self.lora_index_to_id.index(None)] = number


@pytest.mark.model
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_in_no_table_until_all_of_it_is_here() -> None:
    manager = Manager(slots=1, capacity=2)
    staging = Staging(manager)
    staged = Staged([("first", image_of(1)), ("second", image_of(2))], rank=8)
    for number in (1, 2):
        staging.begin(number, staged.path, staged.nbytes)
        staging.take(number, staged.rows[:1])
    assert not len(manager)
    with pytest.raises(RuntimeError, match="1 of 2 layers"):
        staging.commit(1, 8, 2)
    assert not len(manager) and manager.lora_index_to_id == [None]
    with pytest.raises(KeyError):
        staging.take(1, staged.rows[1:])
    staging.take(2, staged.rows[1:])
    staging.commit(2, 8, 2)
    assert list(manager._registered_adapters) == [2] and manager.lora_index_to_id == [2]
    for number in (3, 4):
        staging.begin(number, staged.path, staged.nbytes)
        staging.take(number, staged.rows)
    staging.commit(3, 8, 2)
    assert manager.lora_index_to_id == [2], "no slot is taken from another"
    with pytest.raises(RuntimeError, match="2 adapters, as many as may be staged"):
        staging.commit(4, 8, 2)
    staged.close()


@pytest.mark.model
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_what_is_staged_is_what_vllms_own_load_would_be_packed_to(
    tiny_base: BaseModel, tmp_path: Path, dtype: str
) -> None:
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    from server.vllm_plugin.kernel import pack_slot

    rank_of = {"model.layers.0.self_attn.q_proj": 12}
    spec = AdapterSpec(rank=4, alpha=6, dtype=dtype, targets=("q_proj", "v_proj", "down_proj"), rank_pattern=rank_of)
    folder = write_adapter(tmp_path / "one", tiny_base, spec)
    layout, config = layout_for(tiny_base), LoRAConfig(max_lora_rank=MAX_RANK, lora_dtype=torch.float32)
    staged = stage(folder, layout, config)
    memory = mapped(staged.path, staged.nbytes)
    helper = PEFTHelper.from_local_dir(str(folder), None)
    own = LoRAModel.from_local_checkpoint(
        str(folder), set(layout.expected_modules), helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )
    rows = {row[0]: row for row in staged.rows}
    for layer in layout.layers:
        lora_a = tuple(torch.zeros(2, 1, MAX_RANK, layer.in_features) for _ in layer.sizes)
        lora_b = tuple(torch.zeros(2, 1, size, MAX_RANK) for size in layer.sizes)
        for place, module in enumerate(layer.modules):
            if (weights := own.loras.get(module)) is not None:
                weights.optimize()
                rank = weights.lora_a.shape[0]
                lora_a[place][1, 0, :rank] = weights.lora_a
                lora_b[place][1, 0, :, :rank] = weights.lora_b
        image = pack_slot(lora_a, lora_b, 1, layer.sizes)
        if image is None:
            assert layer.name not in rows
            continue
        _, first, size, a_dtype, columns, parts = rows.pop(layer.name)
        assert np.array_equal(memory[first : first + size], image.stream.numpy()), layer.name
        assert (a_dtype, columns) == (image.a_dtype, image.columns)
        assert [tuple(part) for part in parts] == list(image.parts)
    assert not rows
    staged.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_a": torch.zeros(4, 15)}, r"A \(4, 15\)"),
        ({"lora_b": torch.zeros(15, 4)}, r"B \(15, 4\)"),
        ({"lora_a": torch.zeros(17, 16), "lora_b": torch.zeros(16, 17)}, "r at most 16"),
        ({"lora_b": None}, "only one of lora_A and lora_B"),
    ],
)
def test_a_layer_of_another_shape_is_refused_by_name(
    change: dict[str, Any], message: str, tiny_base: BaseModel
) -> None:
    name = "model.layers.1.self_attn.o_proj"
    sides = {"lora_a": torch.ones(4, 16), "lora_b": torch.ones(16, 4), "optimize": lambda: None, **change}
    with pytest.raises(ValueError, match=message) as refused:
        list(packed({name: SimpleNamespace(**sides)}, layout_for(tiny_base), MAX_RANK))
    assert name in str(refused.value)
    with pytest.raises(ValueError, match="no such modules"):
        list(packed({"model.layers.9.o_proj": None}, layout_for(tiny_base), MAX_RANK))


@pytest.fixture
def engine(vllm_engine: EngineRig) -> Iterator[EngineRig]:
    vllm_engine.unload_all()
    yield vllm_engine
    vllm_engine.unload_all()


def with_one_bad_layer(rig: EngineRig) -> EngineAdapter:
    """Whole but for its last layer, which is one column short."""
    adapter = rig.adapter(rank=8)
    tensors = adapter_tensors(rig.base, AdapterSpec(rank=8))
    last = list(tensors)[-1]
    tensors[last] = tensors[last][:-1]
    write_safetensors(adapter.path / WEIGHTS, tensors, "F32")
    return adapter


@pytest.mark.model
def test_a_load_that_fails_leaves_slots_and_other_adapters_as_they_were(engine: EngineRig) -> None:
    held = engine.load(rank=8, scale=0.05)
    before = engine.complete(held.engine_name, logprobs=5).json()
    bad = with_one_bad_layer(engine)
    with pytest.raises(EngineFailed, match=bad.engine_name):
        engine.call(engine.engine.load(bad))
    rows = engine.call(engine.engine.loaded())
    assert [(row.engine_name, row.is_in_slot) for row in rows] == [(held.engine_name, True)]
    assert_same_greedy(engine.complete(held.engine_name, logprobs=5).json(), before)
    assert engine.complete(bad.engine_name).status_code == 404
    another = engine.load(rank=8, scale=0.05)
    assert engine.complete(another.engine_name).status_code == 200


@pytest.mark.model
def test_an_adapter_that_had_no_slot_answers_as_it_did_in_one(engine: EngineRig) -> None:
    """More adapters than slots, of other ranks and modules: each one's turn leaves nothing of the one before."""
    shapes: list[dict[str, Any]] = [{"rank": 16}, {"rank": 4, "targets": ("q_proj", "down_proj")}] * 3
    loaded = [engine.load(scale=0.05, **shape) for shape in shapes]
    first = [engine.complete(one.engine_name, logprobs=5).json() for one in loaded]
    for one, before in zip(reversed(loaded), reversed(first), strict=True):
        assert_same_greedy(engine.complete(one.engine_name, logprobs=5).json(), before)
    engine.unload_all()
    usage = engine.call(engine.engine.usage())
    assert (usage.stage_bytes, usage.packed_bytes) == (0, 0)


@pytest.mark.model
def test_tokens_go_on_during_a_load(engine: EngineRig) -> None:
    """It is handed over in ten pieces or so, each between two steps; in one piece there would be no token."""
    adapter = engine.adapter(rank=16, dtype="BF16")
    came: list[float] = []
    with engine.streaming(engine.base.id, max_tokens=250, ignore_eos=True) as response:
        lines = response.iter_lines()
        for _ in range(20):
            next(lines)
        reading = threading.Thread(target=lambda: came.extend(time.monotonic() for line in lines if line))
        reading.start()
        begin = time.monotonic()
        engine.call(engine.engine.load(adapter))
        end = time.monotonic()
        reading.join()
    during = [moment for moment in came if begin < moment < end]
    assert len(during) >= 5
