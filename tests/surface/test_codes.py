"""A13: each refusal is the official library's own exception, with the code that clients branch on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from server.errors import STATUS, to_wire
from tests.fixtures.service import Server
from tests.surface.conftest import KEY

HELLO: list[Any] = [{"role": "user", "content": "hi"}]
Ask = Callable[[openai.OpenAI], object]


def ask(client: openai.OpenAI, **fields: Any) -> object:
    return client.chat.completions.create(**{"model": "tiny", "messages": HELLO, **fields})


CASES: list[tuple[Ask, type[openai.APIStatusError], str, str | None]] = [
    (lambda c: ask(c, model="nobody"), openai.NotFoundError, "model_not_found", "model"),
    (lambda c: c.models.retrieve("nobody@canary"), openai.NotFoundError, "model_not_found", "model"),
    (lambda c: c.models.delete("nobody@1"), openai.NotFoundError, "model_not_found", "model"),
    (lambda c: ask(c.with_options(api_key="wrong")), openai.AuthenticationError, "invalid_api_key", None),
    (lambda c: ask(c, max_tokens=99_999), openai.BadRequestError, "context_length_exceeded", None),
    (lambda c: ask(c, messages=[{"role": "user", "content": "w " * 9999}]), openai.BadRequestError, "", None),
    (lambda c: ask(c, extra_body={"top_kk": 1}), openai.BadRequestError, "unknown_parameter", "top_kk"),
    (lambda c: ask(c, n=1000), openai.BadRequestError, "invalid_request", "n"),
    (lambda c: ask(c, store=True), openai.BadRequestError, "invalid_request", "store"),
    (lambda c: ask(c, service_tier="priority"), openai.BadRequestError, "invalid_request", "service_tier"),
    (lambda c: c.post("/chat/completions", content=b"{", cast_to=object), openai.BadRequestError, "json_invalid", None),
    (lambda c: c.embeddings.create(model="tiny", input="x"), openai.NotFoundError, "route_not_found", None),
    (lambda c: c.get("/adapters/a/versions/x", cast_to=object), openai.UnprocessableEntityError, "unprocessable", ""),
    (lambda c: c.delete("/models/tiny", cast_to=object), openai.ConflictError, "conflict", "model"),
]


@pytest.mark.parametrize(("call", "kind", "code", "param"), CASES)
def test_a13_each_refusal_is_the_librarys_own_exception_with_its_code(
    keyed: Server, call: Ask, kind: type[openai.APIStatusError], code: str, param: str | None
) -> None:
    with pytest.raises(kind) as caught:
        call(keyed.openai)
    assert type(caught.value) is kind
    assert caught.value.code == (code or "context_length_exceeded")
    assert caught.value.param == param or param == ""
    assert caught.value.request_id is not None and caught.value.request_id.startswith("req_")


def test_a13_a_key_over_its_limit_is_a_rate_limit_error_with_openais_code(keyed: Server) -> None:
    made = keyed.http.post("/v1/keys", json={"scopes": ["infer"], "limits": {"requests_per_minute": 1}})
    assert made.status_code in (200, 201), made.text
    with openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=made.json()["key"], max_retries=0) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            for _ in range(3):
                ask(client)
        assert caught.value.code == "rate_limit_exceeded"
        assert int(caught.value.response.headers["retry-after"]) >= 1


def test_a13_a_key_without_the_scope_is_a_permission_error(keyed: Server) -> None:
    made = keyed.http.post("/v1/keys", json={"scopes": ["read"]})
    with (
        openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=made.json()["key"], max_retries=0) as client,
        pytest.raises(openai.PermissionDeniedError) as caught,
    ):
        ask(client)
    assert caught.value.code == "forbidden" and KEY not in str(caught.value)


CLASSES: dict[int, type[openai.APIStatusError]] = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
}
PLAIN = {405, 408, 412, 413, 415, 416, 431}  # statuses for which the library has no class of its own


@pytest.mark.parametrize("kind", STATUS, ids=lambda kind: kind.__name__)
def test_a13_every_error_of_ours_becomes_the_librarys_class_for_its_status(kind: Any) -> None:
    """The library itself reads the answer that the table makes of each class; nothing else is between them."""
    wire = to_wire(kind("what happened", param="model"))

    def answer(_: httpx.Request) -> httpx.Response:
        headers = {**wire.headers, "content-type": "application/json", "x-request-id": "req_1"}
        return httpx.Response(wire.status, content=wire.as_json(), headers=headers)

    with (
        httpx.Client(transport=httpx.MockTransport(answer)) as http,
        openai.OpenAI(base_url="http://server/v1", api_key="x", max_retries=0, http_client=http) as client,
        pytest.raises(openai.APIStatusError) as caught,
    ):
        ask(client)
    expected = openai.InternalServerError if wire.status >= 500 else CLASSES.get(wire.status, openai.APIStatusError)
    assert type(caught.value) is expected
    assert (expected is openai.APIStatusError) == (wire.status in PLAIN)
    assert (caught.value.code, caught.value.param, caught.value.type) == (kind.code, "model", STATUS[kind][1])
    assert caught.value.request_id == "req_1" and "what happened" in caught.value.message
    assert wire.status != 503 or int(caught.value.response.headers["retry-after"]) >= 1
