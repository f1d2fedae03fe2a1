"""The five control calls: what any engine promises about the adapters that it is given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from adapters.errors import Conflict, EngineBusy, EngineFailed, InvalidRequest, ModelNotFound
from server.engine.base import EngineAdapter
from tests.conftest import CONTEXT_TOKENS, KV_CACHE_BYTES, MAX_RANK, SLOTS, STAGED_LIMIT
from tests.fixtures.engines import EngineRig


def test_capacity_is_what_the_engine_was_started_with(rig: EngineRig) -> None:
    capacity = rig.call(rig.engine.capacity())
    assert (capacity.slots, capacity.staged_limit, capacity.max_rank) == (SLOTS, STAGED_LIMIT, MAX_RANK)
    assert (capacity.base_id, capacity.context_length_tokens) == (rig.base.id, CONTEXT_TOKENS)
    assert capacity.dtype == "float32"
    assert capacity.engine_version


def test_usage_counts_memory_and_finds_an_idle_engine_idle(rig: EngineRig) -> None:
    usage = rig.call(rig.engine.usage())
    assert usage.rss_bytes > 10_000_000
    assert 0.9 * KV_CACHE_BYTES < usage.kv_cache_bytes <= KV_CACHE_BYTES
    assert 0.0 <= usage.kv_cache_used_fraction <= 1.0
    assert (usage.running, usage.waiting) == (0, 0)


def test_a_loaded_adapter_is_listed_in_a_slot_and_answers(rig: EngineRig) -> None:
    adapter = rig.load()
    (listed,) = rig.call(rig.engine.loaded())
    assert (listed.engine_name, listed.engine_id, listed.is_in_slot) == (adapter.engine_name, adapter.engine_id, True)
    assert rig.chat(adapter.engine_name).status_code == 200


def test_the_same_triple_twice_is_one_adapter(rig: EngineRig) -> None:
    adapter = rig.load()
    rig.call(rig.engine.load(adapter))
    assert len(rig.call(rig.engine.loaded())) == 1


def test_a_name_or_an_id_never_stands_for_two_triples(rig: EngineRig) -> None:
    adapter, other = rig.load(), rig.adapter()
    for wrong in (
        replace(adapter, engine_id=other.engine_id),
        replace(adapter, path=other.path),
        replace(adapter, engine_name=other.engine_name),
        replace(other, engine_id=adapter.engine_id),
    ):
        with pytest.raises(Conflict):
            rig.call(rig.engine.load(wrong))
    assert rig.loaded_names() == {adapter.engine_name}
    rig.call(rig.engine.unload(adapter.engine_name))
    with pytest.raises(Conflict):  # not after it is gone either
        rig.call(rig.engine.load(replace(other, engine_id=adapter.engine_id)))


def test_an_adapter_cannot_take_the_bases_name(rig: EngineRig) -> None:
    with pytest.raises(Conflict, match="base"):
        rig.call(rig.engine.load(rig.adapter(rig.base.id)))


def truncated(rig: EngineRig) -> EngineAdapter:
    adapter = rig.adapter()
    weights = adapter.path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return adapter


def missing(rig: EngineRig) -> EngineAdapter:
    return replace(rig.adapter(), path=rig.scratch / "nowhere")


def too_large(rig: EngineRig) -> EngineAdapter:
    return rig.adapter(rank=MAX_RANK + 1)


@pytest.mark.parametrize("broken", [truncated, missing, too_large])
def test_a_failed_load_leaves_nothing_and_burns_its_id_but_not_its_name(rig: EngineRig, broken: object) -> None:
    assert callable(broken)
    adapter: EngineAdapter = broken(rig)
    with pytest.raises(EngineFailed, match=adapter.engine_name):
        rig.call(rig.engine.load(adapter))
    assert rig.loaded_names() == set()
    assert rig.chat(adapter.engine_name).status_code == 404
    mended = rig.adapter(adapter.engine_name)
    with pytest.raises(Conflict, match="burnt"):
        rig.call(rig.engine.load(replace(mended, engine_id=adapter.engine_id)))
    rig.call(rig.engine.load(mended))
    assert rig.chat(adapter.engine_name).status_code == 200
    assert rig.chat(rig.base.id).status_code == 200


def test_an_unloaded_adapter_is_gone_and_may_come_back(rig: EngineRig) -> None:
    adapter = rig.load()
    before = rig.chat(adapter.engine_name).json()["choices"][0]["message"]["content"]
    rig.call(rig.engine.unload(adapter.engine_name))
    assert rig.loaded_names() == set()
    assert rig.chat(adapter.engine_name).status_code == 404
    rig.call(rig.engine.load(adapter))
    assert rig.chat(adapter.engine_name).json()["choices"][0]["message"]["content"] == before


def test_unloading_what_is_not_loaded_is_an_error(rig: EngineRig) -> None:
    with pytest.raises(ModelNotFound, match="ghost@1"):
        rig.call(rig.engine.unload("ghost@1"))


def test_more_adapters_than_slots_stay_loaded_up_to_the_staged_limit(rig: EngineRig) -> None:
    adapters = [rig.load(rank=2) for _ in range(STAGED_LIMIT)]
    listed = rig.call(rig.engine.loaded())
    assert {row.engine_name for row in listed} == {adapter.engine_name for adapter in adapters}
    assert sum(row.is_in_slot for row in listed) == SLOTS + 1
    with pytest.raises(EngineBusy, match=str(STAGED_LIMIT)):
        rig.load()
    assert rig.chat(adapters[0].engine_name).status_code == 200  # it left its slot, not the engine
    rig.call(rig.engine.unload(adapters[1].engine_name))
    assert rig.chat(rig.load().engine_name).status_code == 200


@pytest.mark.parametrize("change", [{"engine_id": 0}, {"engine_name": ""}, {"path": Path("relative")}])
def test_a_triple_that_cannot_be_right_is_refused(rig: EngineRig, change: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        rig.call(rig.engine.load(replace(rig.adapter(), **change)))  # type: ignore[arg-type]


def test_a_control_call_that_is_not_json_gets_an_error_body(rig: EngineRig) -> None:
    answer = rig.http.post("/hotshoe/load", content=b"{")
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_request"
