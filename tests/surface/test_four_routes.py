"""A14 on each inference route: every event parses, a stream ends once, an error in it is an error event."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.fixtures.forms import FORMS, Event, Form, parsed
from tests.fixtures.service import Server, eventually
from tests.surface.conftest import KEY

HELLO: list[Any] = [{"role": "user", "content": "one two three four"}]
FAILURE = "EngineCore encountered an issue"


@pytest.fixture
def failing(server: Server) -> Iterator[Server]:
    """The engine reports an error after two tokens of a stream."""
    server.script.error_after_tokens = 2
    yield server
    server.script.error_after_tokens = None


@pytest.fixture
def slow(server: Server) -> Iterator[Server]:
    server.script.seconds_per_token = 0.2
    yield server
    server.script.seconds_per_token = 0.0


def stream(server: Server, form: Form, model: str = "tiny", http: httpx.Client | None = None) -> list[Event]:
    body = form.body(model, "one two three four", 8, stream=True)
    with (http or server.http).stream("POST", form.path, json=body) as response:
        assert response.status_code == 200, response.read()
        return parsed(response.iter_lines())


def errors_in(events: list[Event]) -> list[dict[str, Any]]:
    return [data["error"] for _, data in events if isinstance(data, dict) and data.get("error")]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a14_every_event_parses_and_the_stream_ends_once(server: Server, form: Form) -> None:
    events = stream(server, form)
    assert form.is_whole(events) and not errors_in(events)
    assert form.streamed_text(events).startswith("tiny heard: one two")


def check_failed(form: Form, events: list[Event]) -> dict[str, Any]:
    """One error event, after what was said before it; nothing follows but `[DONE]` where that is the form."""
    (error,) = errors_in(events)
    if form.last is None:
        assert form.is_whole(events) and events[-2][1] == {"error": error}
    else:
        assert events[-1][0] == "error" and events[-1][1]["error"] == error
        assert not [name for name, _ in events if name == form.last]
    assert form.streamed_text(events).startswith("tiny heard:")
    return error


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a14_an_error_of_the_engine_in_a_stream_is_the_routes_error_event(failing: Server, form: Form) -> None:
    before = failing.metric("hotshoe_requests_total", model="tiny", outcome="failed")
    error = check_failed(form, stream(failing, form))
    assert error["type"] in ("server_error", "overloaded_error", "api_error") and error["message"]
    eventually(lambda: failing.metric("hotshoe_requests_total", model="tiny", outcome="failed") == before + 1)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a14_an_engine_that_dies_in_a_stream_ends_it_with_an_error_event(slow: Server, form: Form) -> None:
    crash = threading.Timer(0.7, lambda: slow.call(slow.engine.crash()))
    crash.start()
    try:
        error = check_failed(form, stream(slow, form))
    finally:
        crash.join()
    assert error["type"] == "overloaded_error" and "restarted" in error["message"]
    deadline = time.monotonic() + 10
    while slow.http.get("/ready").status_code != 200:
        assert time.monotonic() < deadline


SDK_STREAMS: dict[str, Callable[[Server], object]] = {
    "/v1/chat/completions": lambda s: list(s.openai.chat.completions.create(model="tiny", messages=HELLO, stream=True)),
    "/v1/completions": lambda s: list(s.openai.completions.create(model="tiny", prompt="one two", stream=True)),
    "/v1/responses": lambda s: list(s.openai.responses.create(model="tiny", input="one two", stream=True)),
}


@pytest.mark.parametrize("call", SDK_STREAMS.values(), ids=SDK_STREAMS)
def test_a13_the_official_library_raises_what_broke_a_stream(failing: Server, call: Callable[[Server], object]) -> None:
    with pytest.raises(openai.APIError) as caught:
        call(failing)
    assert type(caught.value) is openai.APIError and caught.value.code in ("engine_failed", "engine_unavailable")


def test_a13_anthropics_library_raises_what_broke_a_stream(failing: Server) -> None:
    with (
        anthropic.Anthropic(base_url=failing.url, api_key=KEY, max_retries=0) as client,
        pytest.raises(anthropic.APIStatusError) as caught,
        client.messages.stream(model="tiny", max_tokens=8, messages=HELLO) as open_stream,
    ):
        open_stream.get_final_message()
    assert isinstance(caught.value.body, dict) and caught.value.body["error"]["type"] == "api_error"


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_usage_of_each_route_adds_up_whole_and_streamed(server: Server, form: Form) -> None:
    def counted() -> Counter[str]:
        found: Counter[str] = Counter()
        for row in server.http.get("/v1/usage", params={"model": "tiny"}).json()["data"]:
            found.update({name: row[name] for name in ("requests", "prompt_tokens", "completion_tokens")})
        return found

    before = counted()
    whole = server.http.post(form.path, json=form.body("tiny", "a b c", 2)).json()
    assert form.usage_of(whole) == (3, 2)
    assert form.is_whole(stream(server, form))  # 4 words heard, 6 said
    assert counted() - before == Counter(requests=2, prompt_tokens=3 + 4, completion_tokens=2 + 6)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_shared_adapter_has_its_owners_name_in_every_event_of_each_route(keyed: Server, form: Form) -> None:
    keyed.http.put("/v1/tenants/friend", json={})
    if "shared" not in [row["name"] for row in keyed.http.get("/v1/adapters").json()["data"]]:
        keyed.pushed("shared")
        assert keyed.http.put("/v1/tenants/default/grants/shared/friend").status_code == 200
    made = keyed.http.post("/v1/keys", json={"tenant": "friend", "scopes": ["infer"]}).json()
    with httpx.Client(base_url=keyed.url, headers={"authorization": f"Bearer {made['key']}"}) as http:
        answer = http.post(form.path, json=form.body("default/shared")).json()
        events = stream(keyed, form, "default/shared", http)
    named = [data.get("message") or data.get("response") or data for _, data in events if isinstance(data, dict)]
    assert {answer["model"], *(one["model"] for one in named if "model" in one)} == {"default/shared@1"}
