"""I6, I7, I8 on the real engine: what failed, was swapped or was cancelled is in nobody else's answer."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from adapters.errors import Conflict, EngineFailed
from server.engine.base import EngineAdapter
from tests.conftest import SLOTS
from tests.fixtures.adapters import WEIGHTS_FILE, AdapterSpec, adapter_tensors, write_safetensors
from tests.fixtures.engines import EngineRig, eventually
from tests.fixtures.reference import assert_same_greedy, prompt_logprobs, served_prompt_logprobs
from tests.fixtures.service import Server

pytestmark = pytest.mark.model
IDS = [504, 2644, 17054, 282, 4649, 314, 7042, 30, 1, 4093, 198, 28120]
PREFIX = "The lamp in the hall is on, and the one in the kitchen is off. " * 12
TOLERANCE = 1e-4


@pytest.fixture
def engine(vllm_engine: EngineRig) -> Iterator[EngineRig]:
    vllm_engine.unload_all()
    yield vllm_engine
    vllm_engine.unload_all()


def scores(rig: EngineRig, model: str) -> list[float]:
    body = rig.complete(model, IDS, max_tokens=1, prompt_logprobs=0).json()
    return served_prompt_logprobs(body, IDS)


def breaking_late(rig: EngineRig) -> EngineAdapter:
    """An adapter of large values whose last tensor has another shape: the engine finds out when most are in a slot."""
    adapter = rig.adapter(rank=8, scale=0.5)
    tensors = adapter_tensors(rig.base, AdapterSpec(rank=8, scale=0.5, seed=1))
    last = max(name for name in tensors if ".29." in name and name.endswith("lora_B.weight"))
    tensors[last] = np.zeros((tensors[last].shape[0] + 8, 8), np.float32)
    write_safetensors(adapter.path / WEIGHTS_FILE, tensors)
    return adapter


def test_i6_a_failed_load_leaves_no_mixed_slot_and_its_id_is_burnt(engine: EngineRig) -> None:
    base = scores(engine, engine.base.id)
    neighbour = engine.load(scale=0.05)
    before = scores(engine, neighbour.engine_name)
    broken = breaking_late(engine)
    with pytest.raises(EngineFailed):
        engine.call(engine.engine.load(broken))
    assert scores(engine, engine.base.id) == pytest.approx(base, abs=TOLERANCE)
    assert scores(engine, neighbour.engine_name) == pytest.approx(before, abs=TOLERANCE)
    with pytest.raises(Conflict, match="burnt"):
        engine.call(engine.engine.load(replace(engine.adapter(), engine_id=broken.engine_id)))
    # The next adapters get the slot that was half filled; they adapt one module a layer, so that what was left behind
    # in the others would show.
    for _ in range(SLOTS):
        small = engine.load(scale=0.05, targets=("q_proj",))
        expected = prompt_logprobs(engine.base.folder, small.path, IDS)
        assert scores(engine, small.engine_name) == pytest.approx(expected, abs=1e-3)
    assert scores(engine, neighbour.engine_name) == pytest.approx(before, abs=TOLERANCE)


def first_tokens(rig: EngineRig, model: str, salt: str) -> tuple[list[float], int]:
    """Log-probabilities of four greedy tokens after the long prefix, and how much of it came from the cache."""
    body = rig.complete(model, PREFIX, max_tokens=4, logprobs=1, ignore_eos=True, cache_salt=salt).json()
    cached = (body["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return body["choices"][0]["logprobs"]["token_logprobs"], int(cached)


def test_i7_another_version_under_the_same_salt_never_meets_the_old_ones_cache(engine: EngineRig) -> None:
    salt = uuid.uuid4().hex
    first, second = engine.load("router@1", scale=0.05), engine.load("router@2", scale=0.05)
    for model in (engine.base.id, first.engine_name):
        first_tokens(engine, model, salt)
        assert first_tokens(engine, model, salt)[1] > 100, "the cache works for one version"
    found, cached = first_tokens(engine, second.engine_name, salt)
    cold, _ = first_tokens(engine, second.engine_name, uuid.uuid4().hex)
    assert cached == 0 and found == pytest.approx(cold, abs=TOLERANCE)
    engine.call(engine.engine.unload(first.engine_name))
    again = engine.load(
        "router@1", scale=0.05
    )  # the same name for other files: a number is never re-used, but if it were
    found, cached = first_tokens(engine, again.engine_name, salt)
    cold, _ = first_tokens(engine, again.engine_name, uuid.uuid4().hex)
    assert cached == 0 and found == pytest.approx(cold, abs=TOLERANCE)


def test_i7_after_a_promote_the_alias_answers_as_a_cold_engine_does(on_vllm: Server, vllm_engine: EngineRig) -> None:
    for _ in range(2):
        assert on_vllm.pushed("router", targets=("q_proj", "v_proj"), scale=0.05)
    body = {"prompt": PREFIX, "max_tokens": 4, "logprobs": 1, "ignore_eos": True, "temperature": 0}

    def ask() -> dict[str, Any]:
        answer: dict[str, Any] = on_vllm.http.post("/v1/completions", json={"model": "router", **body}).json()
        return answer

    old = [ask() for _ in range(2)]
    assert {one["model"] for one in old} == {"router@1"}
    assert old[1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
    assert on_vllm.promote("router", 2).status_code == 200
    new = ask()
    assert new["model"] == "router@2" and not new["usage"]["prompt_tokens_details"]["cached_tokens"]
    found = new["choices"][0]["logprobs"]["token_logprobs"]
    cold, cached = first_tokens(vllm_engine, "router@2", uuid.uuid4().hex)
    assert cached == 0 and found == pytest.approx(cold, abs=TOLERANCE)
    assert found != pytest.approx(old[0]["choices"][0]["logprobs"]["token_logprobs"], abs=1e-2)


def test_i8_fast_alternation_with_a_shared_prefix_and_cancels_equals_solo_runs(engine: EngineRig) -> None:
    models = [engine.load(scale=0.05, rank=rank).engine_name for rank in (4, 8, 16, 32)]
    fields = {"prompt": PREFIX, "max_tokens": 12, "logprobs": 2, "ignore_eos": True}
    solo = {model: engine.complete(model, **fields, cache_salt=uuid.uuid4().hex).json() for model in models}
    salt = uuid.uuid4().hex

    def cancelled(model: str) -> None:
        body = {"model": model, **fields, "temperature": 0, "stream": True, "max_tokens": 400, "cache_salt": salt}
        with engine.http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())

    def asked(model: str) -> dict[str, Any]:
        answer: dict[str, Any] = engine.complete(model, **fields, cache_salt=salt).json()
        return answer

    with ThreadPoolExecutor(6) as pool:
        found = []
        for i, model in enumerate(itertools.islice(itertools.cycle(models), 32)):
            if i % 3 == 2:
                pool.submit(cancelled, model)
            else:
                found.append((model, pool.submit(asked, model)))
        for model, answer in found:
            assert_same_greedy(answer.result(), solo[model])
    assert {model for model, _ in found} == set(models)
    eventually(lambda: engine.call(engine.engine.usage()).running == 0, 15)
    for model in models:
        assert_same_greedy(engine.complete(model, **fields, cache_salt=salt).json(), solo[model])
