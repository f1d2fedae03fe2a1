"""Logits that are not finite: an error for their own request, and nothing for the others of the batch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from server.vllm_plugin.not_finite import ENDED, clear_blocks, count_rows, end_requests, rows_not_finite
from tests.fixtures.engines import EngineRig


def test_a_row_with_one_number_that_is_not_finite_counts_and_no_other() -> None:
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(1)) * 50
    logits[1, 7] = float("nan")
    logits[2, 0] = float("inf")
    logits[3, :900] = float("-inf")  # what a grammar does not take
    logits[4, 999], logits[4, 998] = float("-inf"), float("inf")
    assert rows_not_finite(logits).tolist() == [0, 1, 1, 0, 1]
    assert rows_not_finite(logits.bfloat16()).tolist() == [0, 1, 1, 0, 1]
    assert rows_not_finite(torch.full((1, 200_000), 60_000.0, dtype=torch.float16)).tolist() == [0]
    assert rows_not_finite(torch.zeros(0, 8)).tolist() == []


def test_vllm_counts_by_that_name() -> None:
    runner = SimpleNamespace(count_nans_per_row=None)
    count_rows(runner)
    assert runner.count_nans_per_row is rows_not_finite


def test_a_scheduler_takes_no_token_of_such_a_request_and_ends_it() -> None:
    class Scheduler:
        def __init__(self) -> None:
            self.taken: dict[str, list[int]] = {}

        def update_from_output(self, scheduler_output: Any, model_output: Any) -> list[Any]:
            return [self._update_request_with_output(one, [5]) for one in scheduler_output]

        def _update_request_with_output(self, request: Any, new: list[int], is_stale: bool = False) -> Any:
            self.taken[request.request_id] = new
            return new, False

    end_requests(Scheduler, "an error")
    end_requests(Scheduler, "an error")
    good, bad = (SimpleNamespace(request_id=name, status="running", resumable=True) for name in ("good", "bad"))
    scheduler = Scheduler()
    told = scheduler.update_from_output([good, bad], SimpleNamespace(num_nans_in_logits={"good": 0, "bad": 3}))
    assert told == [([5], False), ([], True)]
    assert scheduler.taken == {"good": [5]} and (good.status, bad.status) == ("running", "an error")
    assert scheduler.update_from_output([good], SimpleNamespace(num_nans_in_logits=None)) == [([5], False)]


class Manager:
    """vLLM's manager of the KV cache, as far as blocks are freed: request "a" has 1, 2 and 3, "b" has 3 too."""

    def __init__(self) -> None:
        counts = [1, 1, 1, 2, 0]
        self.block_pool = SimpleNamespace(
            blocks=[SimpleNamespace(ref_cnt=count) for count in counts], null_block=SimpleNamespace(block_id=0)
        )
        self.held = {"a": ([0, 1, 2, 3],), "b": ([3],)}
        self.evicted: set[int] = set()

    def get_block_ids(self, request_id: str) -> tuple[list[int], ...]:
        return self.held[request_id]

    def evict_blocks(self, blocks: set[int]) -> None:
        self.evicted |= blocks

    def free(self, request: Any) -> None:
        for block in self.held.pop(request.request_id)[0]:
            self.block_pool.blocks[block].ref_cnt -= 1


def request_of(name: str, *, tokens: int = 3, is_broken: bool = False, adapter: object | None = "one") -> Any:
    one = SimpleNamespace(request_id=name, lora_request=adapter, num_output_tokens=tokens)
    if is_broken:
        one.hotshoe_is_not_finite = True
    return one


@pytest.mark.parametrize(
    ("request_a", "is_cleared"),
    [
        (request_of("a", is_broken=True), True),
        (request_of("a", tokens=0), True),
        (request_of("a"), False),
        (request_of("a", tokens=0, adapter=None), False),
    ],
    ids=["not finite", "left before its first token", "answered", "left, of the base"],
)
def test_its_blocks_are_forgotten_and_zeroed_once_nobody_holds_them(request_a: Any, is_cleared: bool) -> None:
    manager_class = type("Fresh", (Manager,), {"free": Manager.free})
    scheduler_class = type("Scheduler", (), {"_get_new_block_ids_to_zero": lambda scheduler: None})
    clear_blocks(scheduler_class, manager_class)
    clear_blocks(scheduler_class, manager_class)
    scheduler: Any = scheduler_class()
    scheduler.kv_cache_manager = manager = manager_class()
    manager.free(request_a)
    assert manager.evicted == ({1, 2, 3} if is_cleared else set())
    assert scheduler._get_new_block_ids_to_zero() == ([1, 2] if is_cleared else None), "the third is another's too"
    assert scheduler._get_new_block_ids_to_zero() is None
    manager.free(request_of("b", is_broken=True))
    assert scheduler._get_new_block_ids_to_zero() == [3]


@pytest.fixture
def broken(vllm_engine: EngineRig) -> Iterator[str]:
    """An adapter whose products overflow float32: each weight is finite, so that the engine loads it."""
    vllm_engine.unload_all()
    yield vllm_engine.load(fill=(1e25, 1e25)).engine_name
    vllm_engine.unload_all()


@pytest.mark.model
def test_a_real_engine_answers_with_an_error_and_goes_on(vllm_engine: EngineRig, broken: str) -> None:
    before = vllm_engine.complete(vllm_engine.base.id).json()["choices"][0]["text"]
    for fields in ({}, {"logprobs": 3}, {"temperature": 1.0}):
        answer = vllm_engine.complete(broken, **fields)
        assert answer.status_code == 500, answer.text
        assert answer.json()["error"]["message"] == ENDED
    assert vllm_engine.chat(broken).status_code == 500
    body = {"model": broken, "prompt": "The quick", "max_tokens": 8, "stream": True}
    with vllm_engine.http.stream("POST", "/v1/completions", json=body) as stream:
        told = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: {")]
    assert any("error" in json.loads(line) for line in told)
    assert not any(choice.get("text") for line in told for choice in json.loads(line).get("choices", []))
    assert vllm_engine.complete(vllm_engine.base.id).json()["choices"][0]["text"] == before
    assert vllm_engine.call(vllm_engine.engine.usage()).running == 0


@pytest.mark.model
def test_the_rows_beside_it_are_as_they_are_alone(vllm_engine: EngineRig, broken: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    base = vllm_engine.base.id
    alone = vllm_engine.complete(base, max_tokens=24).json()["choices"][0]["text"]
    with ThreadPoolExecutor(4) as pool:
        beside = [pool.submit(vllm_engine.complete, base, max_tokens=24) for _ in range(2)]
        failing = [pool.submit(vllm_engine.complete, broken) for _ in range(2)]
        assert [one.result().json()["choices"][0]["text"] for one in beside] == [alone] * 2
        assert [one.result().status_code for one in failing] == [500] * 2
