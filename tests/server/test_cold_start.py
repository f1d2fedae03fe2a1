"""A request for an adapter that is not in the engine waits for a stated time, or hears when to come again."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.cold_start import FIRST_SECONDS, LoadTimes
from tests.fixtures.service import Server, error_of, eventually

LOAD_SECONDS = 1.2


def test_a_wait_is_the_rest_of_the_load_that_goes_on_and_one_load_for_each_after_it() -> None:
    times = LoadTimes()
    assert times.wait_seconds(0, 100.0) == FIRST_SECONDS, "before any was measured"
    for begin, end in ((0.0, 2.0), (10.0, 13.0), (20.0, 21.0)):
        times.begin(begin)
        times.end(end, is_loaded=True)
    assert times.wait_seconds(0, 30.0) == 3.0, "the longest of the last"
    assert times.wait_seconds(2, 30.0) == 9.0
    times.begin(30.0)
    assert times.wait_seconds(0, 31.0) == 2.0
    assert times.wait_seconds(2, 31.0) == 8.0
    assert times.wait_seconds(0, 40.0) == 5.0, "overdue: the half of its time once more"
    times.end(90.0, is_loaded=False)
    assert times.wait_seconds(0, 90.0) == 3.0, "a failed load is no measure"


def cold(server: Server, name: str) -> None:
    registry = server.services.registry
    registry.set_warm("default", name, 1, False)
    server.call(server.services.residents._leave(registry.get("default", name, 1)))


@pytest.fixture
def slow(make_server: Callable[..., Server]) -> Server:
    """Two adapters that are not in the engine, whose loads last a while, as was measured when they came."""
    server = make_server(load_wait_seconds=0.2)
    server.script.seconds_to_load = LOAD_SECONDS
    for name in ("first", "second"):
        server.pushed(name)
        cold(server, name)
    return server


def test_a_request_that_cannot_be_in_time_is_refused_and_right_when_told(slow: Server) -> None:
    begin = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        refused = list(pool.map(slow.say, ("first", "second")))
    assert time.monotonic() - begin < LOAD_SECONDS, "at once, for it is known"
    for answer in refused:
        assert (answer.status_code, error_of(answer)["code"]) == (503, "adapter_loading")
        assert "HOTSHOE_LOAD_WAIT_SECONDS" in error_of(answer)["message"]
    told = sorted(int(answer.headers["retry-after"]) for answer in refused)
    assert LOAD_SECONDS <= told[0] <= 3 * LOAD_SECONDS and told[0] < told[1] <= 5 * LOAD_SECONDS
    time.sleep(max(0.0, begin + told[1] - time.monotonic()))
    assert [slow.say(name).status_code for name in ("first", "second")] == [200, 200]
    assert slow.metric("hotshoe_cold_requests_total", outcome="refused") == 2


def test_a_request_that_waits_in_vain_is_refused_after_that_time(make_server: Callable[..., Server]) -> None:
    server = make_server(load_wait_seconds=0.5)
    server.pushed("sudden")
    cold(server, "sudden")
    server.script.seconds_to_load = 2.0  # those before it took no time
    begin = time.monotonic()
    answer = server.say("sudden")
    assert (answer.status_code, error_of(answer)["code"]) == (503, "adapter_loading")
    assert 0.5 <= time.monotonic() - begin < 1.5
    eventually(lambda: server.say("sudden").status_code == 200, 10)
    assert server.services.registry.get("default", "sudden", 1).is_warm


def test_a_request_waits_for_a_load_that_comes_in_time(make_server: Callable[..., Server]) -> None:
    server = make_server(load_wait_seconds=30.0)
    server.pushed("cold")
    cold(server, "cold")
    server.script.seconds_to_load = 0.3
    assert server.say("cold").status_code == 200
    assert server.metric("hotshoe_cold_requests_total", outcome="waited") == 1
    assert server.metric("hotshoe_cold_wait_seconds_count") == 1


def test_who_warms_a_version_waits_for_it(slow: Server) -> None:
    row = slow.http.post("/v1/adapters/first/versions/1/warm", timeout=30).json()
    assert row["residency"] == "resident"
