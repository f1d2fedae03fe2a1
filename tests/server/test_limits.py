"""Token buckets by a clock of the test's, and the same limits seen through HTTP."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.limits import UseLimits
from server.errors import RateLimited
from server.limits import MINUTE, SWEEP_ABOVE, Limiter, Share, duration
from tests.fixtures.service import Server, error_of, eventually
from tests.server.test_keys import keyed, make  # noqa: F401 - keyed is a fixture


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def shares(**limits: int) -> tuple[Share, ...]:
    return (Share("key a", "This key", UseLimits(**limits)),)


def use(limiter: Limiter, who: tuple[Share, ...], tokens: int = 0) -> None:
    with limiter.place(who):
        limiter.spend(who, tokens)


def refusal(limiter: Limiter, who: tuple[Share, ...]) -> RateLimited:
    with pytest.raises(RateLimited) as found, limiter.place(who):
        pass
    return found.value


def test_a_minutes_requests_may_come_at_once_and_come_back_evenly(clock: Clock) -> None:
    limiter, who = Limiter(clock), shares(requests_per_minute=6)
    for _ in range(6):
        use(limiter, who)
    refused = refusal(limiter, who)
    assert refused.retry_after_seconds == 10.0 and refused.param == "requests_per_minute"
    assert refused.message == "This key has used its 6 requests a minute; try again in 10s."
    clock.now += 9.999
    refusal(limiter, who)
    clock.now += 0.001
    use(limiter, who)
    refusal(limiter, who)
    clock.now += 3600
    for _ in range(6):
        use(limiter, who)
    refusal(limiter, who)


def test_tokens_are_paid_when_they_are_known_and_a_debt_is_waited_off(clock: Clock) -> None:
    limiter, who = Limiter(clock), shares(tokens_per_minute=60)
    use(limiter, who, tokens=59)
    use(limiter, who, tokens=61)
    refused = refusal(limiter, who)
    assert refused.retry_after_seconds == 60.0 and refused.param == "tokens_per_minute"
    clock.now += 60.0
    refusal(limiter, who)
    clock.now += 0.5
    use(limiter, who)


def test_a_refused_request_costs_nothing(clock: Clock) -> None:
    limiter = Limiter(clock)
    key = Share("key a", "This key", UseLimits(requests_per_minute=10))
    tenant = Share("tenant t", "The tenant", UseLimits(requests_per_minute=1))
    use(limiter, (key, tenant))
    for _ in range(50):
        assert "The tenant has used its 1 requests" in refusal(limiter, (key, tenant)).message
    for _ in range(9):
        use(limiter, (key,))
    refusal(limiter, (key,))


def test_requests_at_a_time_are_counted_until_they_end_however_they_end(clock: Clock) -> None:
    limiter, who = Limiter(clock), shares(concurrent_requests=2)
    with limiter.place(who):
        with pytest.raises(ZeroDivisionError), limiter.place(who):
            assert refusal(limiter, who).param == "concurrent_requests"
            raise ZeroDivisionError
        with limiter.place(who):
            refusal(limiter, who)
    use(limiter, who)


def test_nothing_is_what_a_limit_of_nothing_allows(clock: Clock) -> None:
    for name in ("requests_per_minute", "tokens_per_minute", "concurrent_requests"):
        refused = refusal(Limiter(clock), shares(**{name: 0}))
        assert refused.retry_after_seconds is not None and refused.retry_after_seconds >= 1


def test_a_changed_limit_keeps_what_was_spent(clock: Clock) -> None:
    limiter = Limiter(clock)
    for _ in range(5):
        use(limiter, shares(requests_per_minute=5))
    refusal(limiter, shares(requests_per_minute=5))
    use(limiter, shares(requests_per_minute=6))
    refusal(limiter, shares(requests_per_minute=6))
    use(limiter, shares())
    for _ in range(5):
        use(limiter, shares(requests_per_minute=5))


def test_headers_are_of_the_share_with_the_least_left(clock: Clock) -> None:
    limiter = Limiter(clock)
    who = (
        Share("key a", "This key", UseLimits(requests_per_minute=60)),
        Share("tenant t", "The tenant", UseLimits(requests_per_minute=100, tokens_per_minute=600)),
    )
    with limiter.place(who):
        assert limiter.headers(who) == [
            (b"x-ratelimit-limit-requests", b"60"),
            (b"x-ratelimit-remaining-requests", b"59"),
            (b"x-ratelimit-reset-requests", b"1s"),
            (b"x-ratelimit-limit-tokens", b"600"),
            (b"x-ratelimit-remaining-tokens", b"600"),
            (b"x-ratelimit-reset-tokens", b"0ms"),
        ]
    assert limiter.headers(shares()) == [] == limiter.headers(())


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.0201, "21ms"), (1, "1s"), (6.51, "6.6s"), (60, "1m0s"), (372.04, "6m12.1s")]
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_accounts_that_are_full_again_are_forgotten(clock: Clock) -> None:
    limiter = Limiter(clock)
    for i in range(SWEEP_ABOVE + 1):
        use(limiter, (Share(f"key {i}", "This key", UseLimits(requests_per_minute=2)),))
    clock.now += 31
    held = (Share("key held", "This key", UseLimits(requests_per_minute=2)),)
    with limiter.place(held):
        use(limiter, (Share("key 0", "This key", UseLimits(requests_per_minute=2)),))
    assert len(limiter._accounts) <= 2
    use(limiter, held)
    refusal(limiter, held)


@given(
    size=st.integers(1, 50),
    steps=st.lists(st.tuples(st.floats(0, 90), st.integers(1, 20)), min_size=1, max_size=30),
)
def test_no_window_holds_more_requests_than_a_full_bucket_and_what_came_back(
    size: int, steps: list[tuple[float, int]]
) -> None:
    clock = Clock()
    limiter, who = Limiter(clock), shares(requests_per_minute=size)
    taken, started = 0, clock.now
    for pause, wanted in steps:
        clock.now += pause
        for _ in range(wanted):
            try:
                use(limiter, who)
                taken += 1
            except RateLimited as refused:
                assert 0 < (refused.retry_after_seconds or 0) <= MINUTE / size + 1e-6
                break
        assert taken <= size + (clock.now - started) * size / MINUTE + 1e-6


def say(server: Server, row: dict[str, Any], **body: Any) -> Any:
    headers = {"authorization": f"Bearer {row['key']}"}
    body = {"model": server.base.id, "messages": [{"role": "user", "content": "hello"}], **body}
    return server.http.post("/v1/chat/completions", json=body, headers=headers)


def test_a_key_over_its_requests_gets_429_with_retry_after_and_openais_headers(keyed: Server) -> None:  # noqa: F811
    row = make(keyed, "infer", limits={"requests_per_minute": 2, "tokens_per_minute": 1000})
    first, second, third = (say(keyed, row) for _ in range(3))
    assert [one.status_code for one in (first, second, third)] == [200, 200, 429]
    used = first.json()["usage"]["total_tokens"]
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert second.headers["x-ratelimit-limit-tokens"] == "1000"
    assert int(second.headers["x-ratelimit-remaining-tokens"]) in (1000 - used, 1000 - used + 1)
    error = error_of(third)
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert 1 <= int(third.headers["retry-after"]) <= 30
    assert third.headers["x-ratelimit-remaining-requests"] == "0"
    assert "x-ratelimit-limit-requests" not in say(keyed, make(keyed, "infer")).headers
    with (
        openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=row["key"], max_retries=0) as client,
        pytest.raises(openai.RateLimitError),
    ):
        client.chat.completions.create(model=keyed.base.id, messages=[{"role": "user", "content": "x"}])


def test_a_tenants_limit_holds_for_all_of_its_keys_and_for_no_other(keyed: Server) -> None:  # noqa: F811
    keyed.http.put("/v1/tenants/small", json={"limits": {"requests_per_minute": 1}})
    keys = [make(keyed, "infer", tenant="small") for _ in range(2)]
    assert [say(keyed, key).status_code for key in keys] == [200, 429]
    assert say(keyed, make(keyed, "infer", tenant="large")).status_code == 200
    keyed.http.put("/v1/tenants/small", json={"limits": {}})
    assert say(keyed, keys[1]).status_code == 200


def test_p4_a_tenant_that_floods_leaves_places_to_others(keyed: Server) -> None:  # noqa: F811
    keyed.http.put("/v1/tenants/flood", json={"limits": {"concurrent_requests": 2}})
    flood, calm = make(keyed, "infer", tenant="flood"), make(keyed, "infer", tenant="calm")
    keyed.script.seconds_to_first_token = 0.3
    try:
        with ThreadPoolExecutor(12) as pool:
            flooding = [pool.submit(say, keyed, flood) for _ in range(12)]
            alone = say(keyed, calm)
            codes = sorted(one.result().status_code for one in flooding)
    finally:
        keyed.script.seconds_to_first_token = 0.0
    assert alone.status_code == 200
    assert codes.count(429) >= 8 and set(codes) == {200, 429}


def test_p4_without_limits_too_a_flood_costs_another_tenant_one_place_at_most(
    make_server: Callable[..., Server],
) -> None:
    server = make_server(api_key="the-operators-own-key", max_running=2)
    flood, calm = make(server, "infer", tenant="flood"), make(server, "infer", tenant="calm")
    server.script.seconds_to_first_token = 0.3
    with ThreadPoolExecutor(24) as pool:
        flooding = [pool.submit(say, server, flood) for _ in range(24)]
        eventually(lambda: server.services.door.admission.waiting > 10)
        waited = [say(server, calm).elapsed.total_seconds() for _ in range(3)]
        is_flooding = not all(one.done() for one in flooding)
        assert {one.result().status_code for one in flooding} == {200}
    assert is_flooding and max(waited) < 3 * 0.3, waited
