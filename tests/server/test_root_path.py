"""Behind a proxy that shows the server under a prefix, and strips it or not."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from adapters.bases import BaseModel
from adapters.errors import ConfigInvalid
from server.access import ROUTES
from server.edge_settings import OWN_FIRST_SEGMENTS, check_root_path
from tests.fixtures.service import Server, error_of, running

KEY = "a-key-of-the-prefix"


@pytest.fixture(scope="module")
def prefixed(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_base, tmp_path_factory.mktemp("prefixed"), api_key=KEY, root_path="/llm") as one:
        yield one


def test_every_route_answers_with_the_prefix_as_without_it(prefixed: Server) -> None:
    for route in ROUTES:
        path = route.path.replace("{", "").replace("}", "")
        bare, under = (prefixed.http.request(route.method, at, json={}) for at in (path, f"/llm{path}"))
        assert bare.status_code == under.status_code, route
        if route.path not in ("/metrics", "/openapi.json", "/v1/system"):
            assert bare.content == under.content, route
        assert httpx.request(route.method, f"{prefixed.url}/llm{path}").status_code in (200, 401, 503)


def test_openais_client_pushes_and_streams_under_the_prefix(prefixed: Server) -> None:
    prefixed.pushed("under")
    with openai.OpenAI(base_url=f"{prefixed.url}/llm/v1", api_key=KEY, max_retries=0) as client:
        assert [row.id for row in client.models.list()] == ["tiny", "under"]
        stream = client.chat.completions.create(
            model="under", messages=[{"role": "user", "content": "hello"}], stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "under@1 heard: hello"
        file = client.files.create(file=("rows.jsonl", b"{}\n"), purpose="evals")
        assert client.files.content(file.id).read() == b"{}\n"
        assert [row.id for row in client.files.list(limit=1)] == [file.id]


def test_the_api_document_names_the_prefix_as_its_server(prefixed: Server, server: Server) -> None:
    for path in ("/llm/openapi.json", "/openapi.json"):
        assert prefixed.http.get(path).json()["servers"] == [{"url": "/llm"}]
    assert "servers" not in server.http.get("/openapi.json").json()


@pytest.mark.parametrize(
    "path",
    [
        "/llm",
        "/llm/",
        "/llm/llm/v1/models",
        "/llmx/v1/models",
        "/xllm/v1/models",
        "/LLM/v1/models",
        "//llm/v1/models",
        "/llm//v1/models",
        "/llm/../v1/models",
        "/v1/llm/models",
        "/llm/health/../v1/models",
        "/llm;x/v1/models",
        "/llm%00/v1/models",
        "/%2Fllm/v1/models",
    ],
)
def test_a_prefix_that_is_not_exactly_there_once_is_no_route(prefixed: Server, path: str) -> None:
    text = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n\r\n"
    answer = prefixed.raw(text)
    assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400")), answer[:200]


def test_a_scope_is_held_under_the_prefix_too(prefixed: Server) -> None:
    made = prefixed.http.post("/llm/v1/keys", json={"scopes": ["infer"]}).json()
    headers = {"authorization": f"Bearer {made['key']}"}
    for path in ("/llm/v1/keys", "/v1/keys", "/llm/v1/system"):
        answer = httpx.get(f"{prefixed.url}{path}", headers=headers)
        assert (answer.status_code, error_of(answer)["code"]) == (403, "forbidden"), path
    assert httpx.get(f"{prefixed.url}/llm/v1/models", headers=headers).status_code == 200
    assert httpx.get(f"{prefixed.url}/llm/health").status_code == 200


@pytest.mark.parametrize(
    "value", ["llm", "/", "/llm/", "//llm", "/a//b", "/..", "/a/../b", "/a b", "/a%2Fb", "/a?b", "/v1"]
)
def test_a_prefix_that_cannot_be_told_from_a_route_is_no_setting(value: str) -> None:
    with pytest.raises(ConfigInvalid, match="root_path"):
        check_root_path(value)


def test_no_route_can_hide_behind_a_prefix() -> None:
    assert {route.path.split("/")[1] for route in ROUTES} == OWN_FIRST_SEGMENTS
    check_root_path("/llm/eu-1")
