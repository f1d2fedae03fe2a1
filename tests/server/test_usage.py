"""Usage adds up to the `usage` objects that clients were given, and survives the server."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import RegistryBusy
from adapters.registry import Registry
from adapters.usage import UsageRow
from server.usage import UsageMeter
from tests.fixtures.service import Server, chunks_of, error_of, eventually


def rows_of(server: Server, query: str = "") -> list[dict[str, Any]]:
    answer = server.http.get(f"/v1/usage{query}")
    assert answer.status_code == 200, answer.text
    data: list[dict[str, Any]] = answer.json()["data"]
    return data


def test_usage_is_the_sum_of_the_usage_objects_of_completed_requests(make_server: Callable[..., Server]) -> None:
    server = make_server()
    server.pushed("one")
    expected: Counter[tuple[str, str]] = Counter()

    def count(model: str, usage: dict[str, int]) -> None:
        expected[model, "requests"] += 1
        for name in ("prompt_tokens", "completion_tokens"):
            expected[model, name] += usage[name]

    for i, text in enumerate(("a", "a b c", "one two three four five")):
        count("one@1", server.say("one", text, max_tokens=i + 1).json()["usage"])
        events = server.events("one@1", text, stream_options={"include_usage": True})
        count("one@1", chunks_of(events)[-1]["usage"])
        assert not any("usage" in chunk for chunk in chunks_of(server.events("tiny", text))), "not asked for"
        usage = server.say("tiny", text).json()["usage"]
        for _ in range(2):  # and the stream before it, whose numbers are the same
            count("tiny", usage)
    assert server.say("nobody").status_code == 404
    assert server.say("tiny", priority=1).status_code == 400
    found: Counter[tuple[str, str]] = Counter()
    for row in rows_of(server):
        assert row["tenant"] == "default" and row["object"] == "usage" and row["partial_requests"] == 0
        for name in ("requests", "prompt_tokens", "completion_tokens"):
            found[row["model"], name] += row[name]
    assert found == expected


def test_a_stream_that_its_client_leaves_is_counted_by_what_was_delivered(make_server: Callable[..., Server]) -> None:
    server = make_server()
    server.script.seconds_per_token = 0.05
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a b c d e f g h"}], "stream": True}
    with server.http.stream(
        "POST", "/v1/chat/completions", json={**body, "max_tokens": 200, "ignore_eos": True}
    ) as one:
        lines = one.iter_lines()
        seen = [next(lines) for _ in range(8)]
    assert seen[0].startswith("data: ")
    eventually(lambda: bool(rows_of(server)))
    (row,) = rows_of(server)
    assert (row["requests"], row["prompt_tokens"], row["completion_tokens"]) == (0, 0, 0)
    assert row["partial_requests"] == 1 and 3 <= row["partial_completion_tokens"] < 200


def test_a_stream_that_the_engine_breaks_is_partial(make_server: Callable[..., Server]) -> None:
    server = make_server()
    server.script.error_after_tokens = 3
    server.events("tiny", "a b c d e f g")
    (row,) = rows_of(server)
    assert row["requests"] == 0 and row["partial_requests"] == 1 and 3 <= row["partial_completion_tokens"] <= 4


def test_usage_outlives_the_server(make_server: Callable[..., Server], tmp_path: Path) -> None:
    server = make_server()
    usage = server.say("tiny").json()["usage"]
    server.stop()
    registry = Registry.open(tmp_path / "home")
    (row,) = registry.usage()
    assert (row.requests, row.prompt_tokens, row.completion_tokens) == (
        1,
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )
    registry.close()


def test_a_tenants_usage_is_its_own_and_the_operator_sees_all(make_server: Callable[..., Server]) -> None:
    server = make_server(api_key="the-operators-own-key")
    row = server.http.post("/v1/keys", json={"tenant": "acme", "scopes": ["infer", "read"]}).json()
    headers = {"authorization": f"Bearer {row['key']}"}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    server.http.post("/v1/chat/completions", json=body, headers=headers)
    server.say("tiny")
    mine = server.http.get("/v1/usage", headers=headers).json()["data"]
    assert [found["tenant"] for found in mine] == ["acme"]
    refused = server.http.get("/v1/usage?tenant=default", headers=headers)
    assert refused.status_code == 403 and error_of(refused)["code"] == "forbidden"
    assert {found["tenant"] for found in rows_of(server, "?tenant=*")} == {"acme", "default"}
    assert [found["tenant"] for found in rows_of(server, "?tenant=acme")] == ["acme"]
    assert rows_of(server, "?end=2020-01-01") == []
    assert server.http.get("/v1/usage?start=yesterday").status_code == 422


COUNTED = st.tuples(st.booleans(), st.sampled_from(["a", "b"]), st.integers(0, 99), st.integers(0, 99), st.booleans())


@settings(max_examples=30, deadline=None)
@given(requests=st.lists(COUNTED, max_size=20))
def test_nothing_is_lost_or_counted_twice_by_flushes_at_any_time(
    tmp_path_factory: pytest.TempPathFactory, requests: list[tuple[bool, str, int, int, bool]]
) -> None:
    registry = Registry.open(tmp_path_factory.mktemp("usage"))
    expected = Counter[str]()

    async def count() -> None:
        meter = UsageMeter(registry, clock=lambda: 0.0)
        flushes = []
        for is_whole, model, prompt, completion, flushes_now in requests:
            if is_whole:
                meter.completed("acme", model, prompt, completion)
                expected.update(requests=1, prompt_tokens=prompt, completion_tokens=completion)
            else:
                meter.partial("acme", model, completion)
                expected.update(partial_requests=1, partial_completion_tokens=completion)
            if flushes_now:
                flushes.append(asyncio.ensure_future(meter.flush()))
                await asyncio.sleep(0)
                flushes[-1].cancel()  # a caller that leaves undoes nothing
        await asyncio.gather(*flushes, return_exceptions=True)
        await meter.stop()

    asyncio.run(count())
    found = Counter[str]()
    for row in registry.usage("acme", start="1970-01-01", end="1970-01-01"):
        found.update({name: value for name, value in row.as_dict().items() if isinstance(value, int)})
    assert {name: value for name, value in found.items() if value} == {name: n for name, n in expected.items() if n}
    registry.close()


def test_a_write_that_fails_is_made_up_for_by_the_next(tmp_path: Path) -> None:
    registry = Registry.open(tmp_path)

    class Busy:
        is_busy = True

        def add_usage(self, rows: list[UsageRow]) -> None:
            if self.is_busy:
                raise RegistryBusy("busy")
            registry.add_usage(rows)

    async def run() -> None:
        busy = Busy()
        meter = UsageMeter(busy)  # type: ignore[arg-type]
        meter.completed("acme", "a", 1, 2)
        with pytest.raises(RegistryBusy):
            await meter.flush()
        meter.completed("acme", "a", 10, 20)
        busy.is_busy = False
        await meter.flush()

    asyncio.run(run())
    (row,) = registry.usage()
    assert (row.requests, row.prompt_tokens, row.completion_tokens) == (2, 11, 22)
    assert json.dumps(row.as_dict())
    registry.close()
