"""More than the engine can do, over HTTP: who gets what, how fast the rest is told, what a client's patience does."""

from __future__ import annotations

import re
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from adapters.errors import InvalidRequest
from server.client_timeout import timeout_of
from tests.fixtures.service import Server, error_of, eventually
from tests.server.test_keys import make

TOKEN_SECONDS, WORDS = 0.01, "w " * 10


def answered(server: Server, clients: int, seconds: float) -> tuple[int, list[httpx.Response]]:
    """So many clients ask one after another for so long; one that is refused comes back in a tenth of a second."""
    until, done, refused = time.monotonic() + seconds, [], list[httpx.Response]()

    def ask() -> None:
        while time.monotonic() < until:
            answer = server.say("tiny", WORDS)
            if answer.status_code == 200:
                done.append(answer)
            else:
                refused.append(answer)
                time.sleep(0.1)

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(done), refused


def test_at_ten_times_the_load_as_much_is_answered_and_refusals_are_quick(make_server: Callable[..., Server]) -> None:
    server = make_server(max_running=3, max_queued=3)
    server.script.seconds_per_token = TOKEN_SECONDS
    peak, none = answered(server, 3, 2.0)
    under_load, refused = answered(server, 30, 2.0)
    assert not none and refused
    assert {(one.status_code, error_of(one)["code"]) for one in refused} == {(503, "engine_busy")}
    assert all(1 <= int(one.headers["retry-after"]) <= 60 for one in refused)
    assert under_load >= 0.8 * peak
    assert statistics.median(one.elapsed.total_seconds() for one in refused) < 0.05
    assert server.metric("hotshoe_refusals_total", reason="tenant_queue") == len(refused)


def test_p4_a_flood_costs_another_tenant_at_most_twice_its_own_time(make_server: Callable[..., Server]) -> None:
    server = make_server(api_key="the-operators-own-key", max_running=4)
    flood, calm = make(server, "infer", tenant="flood"), make(server, "infer", tenant="calm")
    server.script.seconds_per_token = 0.03

    def say(key: str, words: int) -> float:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "w " * words}]}
        with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
            answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.elapsed.total_seconds()

    alone = sorted(say(calm["key"], 20) for _ in range(5))
    with ThreadPoolExecutor(24) as pool:
        flooding = [pool.submit(say, flood["key"], 20) for _ in range(72)]
        eventually(lambda: server.services.door.admission.waiting > 10)
        beside = sorted(say(calm["key"], 20) for _ in range(5))
        assert not all(one.done() for one in flooding)
        for one in flooding:
            one.result()
    assert beside[-1] <= 2 * alone[-1]


def test_adapters_of_one_name_in_two_tenants_never_meet_in_a_slot(make_server: Callable[..., Server]) -> None:
    server = make_server(api_key="the-operators-own-key", slots=1, patience_seconds=0.05, quantum_floor_seconds=0.05)
    keys = [make(server, "infer", "upload", tenant=tenant)["key"] for tenant in ("one", "two")]
    clients = [openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) for key in keys]
    for key in keys:
        answer = server.push("same", headers={"authorization": f"Bearer {key}"})
        assert answer.json()["status"] == "ready"
    server.script.seconds_per_token = 0.005
    sampled: list[set[str]] = []

    def watch() -> None:
        while not is_over.wait(0.002):
            sampled.append({owner.adapter for owner in list(server.services.door.admission.slots.owners.values())})

    def ask(number: int) -> str:
        client = clients[number % 2]
        messages = [{"role": "user", "content": f"of {number} " + "w " * 10}]
        return client.chat.completions.create(model="same", messages=messages).choices[0].message.content or ""  # type: ignore[arg-type]

    is_over = threading.Event()
    watching = threading.Thread(target=watch)
    watching.start()
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(24)))
    is_over.set()
    watching.join()
    assert all(text.startswith("same@1 heard: ") and f"of {i} " in text for i, text in enumerate(texts)), texts
    heard: dict[str, set[int]] = {"one/same@1": set(), "two/same@1": set()}
    app = server.engine.app
    assert app is not None
    for (_, model), prompts in app.state.models.prompts.items():
        numbers = [int(found[1]) for prompt in prompts if (found := re.search(r"of (\d+) ", prompt))]
        if numbers:
            heard[model].update(numbers)
    assert heard == {"one/same@1": set(range(0, 24, 2)), "two/same@1": set(range(1, 24, 2))}
    assert all(len(names) <= 1 for names in sampled) and set().union(*sampled) == {"one/same@1", "two/same@1"}


def test_a_client_that_leaves_frees_its_slot_within_a_second(make_server: Callable[..., Server]) -> None:
    server = make_server(slots=1)
    server.pushed("long")
    server.pushed("next")
    server.script.seconds_per_token = 0.05
    body = {"model": "long", "messages": [{"role": "user", "content": "w " * 400}], "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()  # kept: a generator that is dropped closes the answer
        next(lines)
        assert server.services.door.admission.slots.owners["long@1"].running == 1
    left_at = time.monotonic()
    server.script.seconds_per_token = 0.0
    assert server.say("next").status_code == 200
    assert time.monotonic() - left_at < 1.0


def test_a_request_whose_client_would_be_gone_is_refused_at_once(make_server: Callable[..., Server]) -> None:
    server = make_server(max_running=1)
    server.script.seconds_per_token = 0.05
    for _ in range(3):
        server.say("tiny", "w " * 20)  # a second each: the estimate follows
    busy = threading.Thread(target=server.events, args=("tiny", "w " * 40))
    busy.start()
    eventually(lambda: server.services.door.admission.running == 1)
    try:
        with server.openai.with_options(timeout=0.3) as hurried, pytest.raises(openai.InternalServerError) as found:
            hurried.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "w"}])
        assert "its client waits" in str(found.value) and "Try again in" in str(found.value)
        assert server.metric("hotshoe_refusals_total", reason="client_timeout") == 1
    finally:
        busy.join()


def test_a_client_says_how_long_it_waits() -> None:
    assert timeout_of([]) is None
    assert timeout_of([(b"x-stainless-read-timeout", b"600")]) == 600.0
    assert timeout_of([(b"x-stainless-timeout", b"30")]) == 30.0
    assert timeout_of([(b"x-stainless-read-timeout", b"600"), (b"x-hotshoe-timeout", b"2.5")]) == 2.5
    for raw in (b"None", b"nan", b"inf", b"-1", b"0", b"1e99", b""):
        assert timeout_of([(b"x-stainless-read-timeout", raw)]) is None
        with pytest.raises(InvalidRequest, match="x-hotshoe-timeout must be one number of seconds"):
            timeout_of([(b"x-hotshoe-timeout", raw)])
    with pytest.raises(InvalidRequest):
        timeout_of([(b"x-hotshoe-timeout", b"1"), (b"x-hotshoe-timeout", b"2")])


def test_a_queue_for_a_slot_holds_no_staged_adapter(make_server: Callable[..., Server]) -> None:
    server = make_server(slots=1, staged_limit=2, patience_seconds=0.05, quantum_floor_seconds=0.05)
    for name in ("a", "b", "c", "d"):
        server.pushed(name)
    server.script.seconds_per_token = 0.02
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: server.say("abcd"[i % 4], WORDS), range(16)))
    assert [answer.status_code for answer in answers] == [200] * 16


def test_a_pinned_adapter_is_not_evicted(make_server: Callable[..., Server]) -> None:
    server = make_server(slots=1, staged_limit=2, pinned=("kept",))
    for name in ("kept", "a", "b", "c"):
        server.pushed(name)
    places = {row["id"]: row["place"] for row in server.http.get("/v1/system").json()["adapters"]}
    assert places["kept@1"] != "absent" and places["a@1"] == "absent"


def test_a_keys_priority_is_kept_and_shown(make_server: Callable[..., Server]) -> None:
    server = make_server(api_key="the-operators-own-key")
    assert make(server, "infer", priority="low")["priority"] == "low"
    assert make(server, "infer")["priority"] == "normal"
    answer = server.http.post("/v1/keys", json={"scopes": ["infer"], "priority": "urgent"})
    assert answer.status_code == 400
    assert error_of(answer)["message"] == "priority must be one of high, normal, low; 'urgent' is none of them."
