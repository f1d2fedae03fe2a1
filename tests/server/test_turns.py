"""Steps of the engine shared among tenants: the accounts, what a scheduler is made to do, and the real engine."""

from __future__ import annotations

import importlib.util
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.base import WEIGHT
from server.inference import read_request
from server.vllm_plugin.turns import SLACK_SECONDS, Accounts, Flow, flow_of, install
from tests.fixtures.engines import EngineRig

A, B, C = (Flow(name, 1.0) for name in "abc")


def stepped(accounts: Accounts, rows: dict[Flow, int], seconds_each: float = 0.01) -> frozenset[Flow]:
    """One step of all that are not held; returns who was."""
    held = accounts.held(rows)
    tokens = {flow: count for flow, count in rows.items() if flow not in held}
    accounts.charge(seconds_each * sum(tokens.values()), tokens)
    return held


def test_a_flow_alone_is_in_every_step() -> None:
    accounts = Accounts()
    assert not any(stepped(accounts, {A: 16}) for _ in range(100))
    assert accounts.held([]) == frozenset()


def test_flows_that_are_alike_share_each_step() -> None:
    accounts = Accounts()
    assert not any(stepped(accounts, {A: 4, B: 4, C: 4}) for _ in range(100))


def test_one_request_beside_sixteen_gets_half_of_the_seconds() -> None:
    accounts, seconds = Accounts(), {A: 0.0, B: 0.0}
    for _ in range(1000):
        held = accounts.held([A, B])
        assert B not in held
        tokens = {flow: count for flow, count in {A: 16, B: 1}.items() if flow not in held}
        accounts.charge(0.02 + 0.005 * sum(tokens.values()), tokens)
        for flow, count in tokens.items():
            seconds[flow] += (0.02 + 0.005 * sum(tokens.values())) * count / sum(tokens.values())
    assert seconds[B] / sum(seconds.values()) == pytest.approx(0.5, abs=0.01)


def test_seconds_go_by_weight() -> None:
    heavy, accounts = Flow("a", 4.0), Accounts()
    seconds = {heavy: 0.0, B: 0.0}
    for _ in range(2000):
        held = accounts.held([heavy, B])
        tokens = {flow: 8 for flow in (heavy, B) if flow not in held}
        accounts.charge(0.1, tokens)
        for flow in tokens:
            seconds[flow] += 0.1 / len(tokens)
    assert seconds[heavy] / seconds[B] == pytest.approx(4.0, rel=0.05)


def test_who_comes_begins_where_the_one_furthest_behind_stands() -> None:
    accounts = Accounts()
    for _ in range(100):
        stepped(accounts, {A: 16})
    held = [bool(stepped(accounts, {A: 16, B: 16})) for _ in range(50)]
    assert held[0] and not any(held[1:]), "A's last step is all that it is ahead: nothing was saved up while B was away"


def test_who_leaves_ahead_and_comes_back_is_still_ahead() -> None:
    accounts = Accounts()
    stepped(accounts, {A: 16, B: 1})
    stepped(accounts, {B: 1})
    assert stepped(accounts, {A: 16, B: 1}) == {A}
    for _ in range(100):
        stepped(accounts, {B: 1})
    assert stepped(accounts, {A: 16, B: 1}) == frozenset(), "B has had as much since"
    assert len(accounts._charged) <= 2


flows = st.builds(Flow, st.sampled_from("abcdef"), st.sampled_from([0.25, 1.0, 4.0]))
steps = st.lists(st.dictionaries(flows, st.integers(1, 500), min_size=1, max_size=6), min_size=1, max_size=60)


@given(steps, st.floats(1e-4, 5.0))
def test_somebody_is_always_in_the_step(rows: list[dict[Flow, int]], seconds: float) -> None:
    accounts = Accounts()
    for one in rows:
        held = accounts.held(one)
        assert held < set(one)
        accounts.charge(seconds, {flow: count for flow, count in one.items() if flow not in held})


@given(st.dictionaries(flows, st.integers(1, 500), min_size=2, max_size=6), st.floats(1e-3, 1.0), st.integers(1, 200))
def test_nobody_is_further_ahead_than_a_step_and_the_slack(rows: dict[Flow, int], seconds: float, count: int) -> None:
    accounts, had = Accounts(), dict.fromkeys(rows, 0.0)
    for _ in range(count):
        held = accounts.held(rows)
        tokens = {flow: number for flow, number in rows.items() if flow not in held}
        accounts.charge(seconds, tokens)
        for flow, number in tokens.items():
            had[flow] += seconds * number / sum(tokens.values()) / flow.weight
    most = SLACK_SECONDS + seconds / min(flow.weight for flow in rows)
    assert max(had.values()) - min(had.values()) <= most + 1e-9


def request(name: str, tenant: str, weight: float = 1.0, adapter: int | None = None) -> Any:
    extra = {WEIGHT: weight} if weight != 1.0 else None
    lora = None if adapter is None else SimpleNamespace(lora_int_id=adapter)
    return SimpleNamespace(
        request_id=name,
        cache_salt=tenant,
        sampling_params=SimpleNamespace(extra_args=extra),
        lora_request=lora,
        next_decode_eligible_step=0,
    )


class Scheduler:
    """vLLM's, as far as it says who is in a step: running ones that may be, then waiting ones that are ready."""

    def __init__(self, *running: Any, max_loras: int = 8) -> None:
        self.running: list[Any] = list(running)
        self.waiting: list[Any] = []
        self.requests = {one.request_id: one for one in running}
        self.current_step = 0
        self.lora_config = SimpleNamespace(max_loras=max_loras)
        self.unready: set[str] = set()

    def schedule(self) -> Any:
        self.current_step += 1
        found = [one for one in self.running if self.current_step >= one.next_decode_eligible_step]
        ready = [one for one in self.waiting if self._handle_blocked_waiting_request(one)]
        tokens = {one.request_id: 1 for one in found if one.request_id not in self.unready}
        tokens |= {one.request_id: 32 for one in ready}
        return SimpleNamespace(num_scheduled_tokens=tokens, total_num_scheduled_tokens=sum(tokens.values()))

    def _handle_blocked_waiting_request(self, one: Any) -> bool:
        return one.request_id not in self.unready

    def update_from_output(self, output: Any, model_output: Any) -> set[str]:
        return set(output.num_scheduled_tokens)


@pytest.fixture
def scheduler_class() -> Any:
    class Turning(Scheduler):
        pass

    install(Turning)
    install(Turning)
    return Turning


def step(scheduler: Any, seconds: float, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    output = scheduler.schedule()
    now = time.monotonic()
    with monkeypatch.context() as patched:
        patched.setattr("server.vllm_plugin.turns.time.monotonic", lambda: now + seconds)
        told: set[str] = scheduler.update_from_output(output, None)
    return told


def test_a_scheduler_leaves_out_who_is_ahead(scheduler_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    flood = [request(f"f{number}", "flood") for number in range(4)]
    scheduler = scheduler_class(*flood, request("calm", "calm"))
    assert step(scheduler, 0.5, monkeypatch) == {"f0", "f1", "f2", "f3", "calm"}
    scheduler.waiting = [request("new", "flood"), request("mine", "calm")]
    assert step(scheduler, 0.1, monkeypatch) == {"calm", "mine"}
    scheduler.waiting = []
    assert step(scheduler, 1.0, monkeypatch) == {"calm"}
    assert step(scheduler, 0.5, monkeypatch) == {"f0", "f1", "f2", "f3"}


def test_a_step_that_nobody_could_use_is_followed_by_one_of_all(
    scheduler_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = scheduler_class(request("flood", "flood"))
    step(scheduler, 0.1, monkeypatch)
    waits = request("waits", "calm")
    scheduler.waiting, scheduler.unready = [waits], {"waits"}
    scheduler.requests["waits"] = waits
    seen = [step(scheduler, 0.1, monkeypatch) for _ in range(7)]
    assert seen == [set(), {"flood"}] * 3 + [set()], "the one who is behind is looked for, then the other goes on"


def test_nobody_is_held_with_requests_of_more_adapters_than_slots(
    scheduler_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flood = [request(f"f{number}", "flood", adapter=number) for number in range(2)]
    scheduler = scheduler_class(*flood, request("calm", "calm", adapter=9), max_loras=2)
    for _ in range(3):
        assert len(step(scheduler, 1.0, monkeypatch)) == 3
    scheduler.lora_config.max_loras = 3
    assert step(scheduler, 1.0, monkeypatch) == {"calm"}


def test_a_flow_is_the_salt_and_the_weight_that_the_gateway_sends() -> None:
    assert flow_of(request("x", "salt")) == Flow("salt", 1.0)
    assert flow_of(request("x", "salt", 4.0)) == Flow("salt", 4.0)
    asked = read_request("/v1/completions", b'{"model": "m", "prompt": "x"}', "m")
    sent = json.loads(replace(asked, cache_salt="salt", weight=4.0).for_engine("m"))
    assert (sent["cache_salt"], sent["vllm_xargs"]) == ("salt", {WEIGHT: 4.0})
    assert "vllm_xargs" not in json.loads(replace(asked, cache_salt="salt").for_engine("m"))


def test_vllm_has_what_this_patches() -> None:
    """The field by which its scheduler leaves a running request out of a step; what it asks of a waiting one."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    text = (Path(spec.origin).parent / "v1/core/sched/scheduler.py").read_text("utf-8")
    assert "if self.current_step < request.next_decode_eligible_step:" in text
    assert "ready_to_schedule = self._handle_blocked_waiting_request(request)" in text


@pytest.mark.model
def test_a_real_engine_answers_as_ever_while_tenants_take_turns(vllm_engine: EngineRig) -> None:
    """Eight requests of one tenant and one of another: its tokens come sooner than theirs, and no answer is another."""
    vllm_engine.unload_all()
    models = [vllm_engine.base.id, vllm_engine.load(scale=0.02).engine_name]
    alone = {model: "".join(text for _, text in stream(vllm_engine, model, "alone", 40)) for model in models}
    with ThreadPoolExecutor(9) as pool:
        flood = [pool.submit(stream, vllm_engine, models[number % 2], "flood", 40) for number in range(8)]
        time.sleep(0.5)
        calm = stream(vllm_engine, models[1], "calm", 16)
        beside = [one.result() for one in flood]
    assert alone[models[1]].startswith("".join(text for _, text in calm))
    for number, seen in enumerate(beside):
        assert "".join(text for _, text in seen) == alone[models[number % 2]]
    first, last = calm[0][0], calm[-1][0]
    most = max(sum(first < at <= last for at, _ in seen) for seen in beside)
    assert most < 0.75 * len(calm), f"{most} tokens of a request of the flood beside {len(calm)} of the other"
    vllm_engine.unload_all()


def stream(rig: EngineRig, model: str, salt: str, tokens: int) -> list[tuple[float, str]]:
    """When each piece of a greedy answer came, and what it was."""
    fields = {"prompt": "The quick brown fox", "max_tokens": tokens, "ignore_eos": True, "cache_salt": salt}
    found = []
    with rig.streaming(model, "/v1/completions", **fields) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                found.append((time.monotonic(), json.loads(line.removeprefix("data: "))["choices"][0]["text"]))
    return found
