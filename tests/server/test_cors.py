"""Pages of listed origins may call the server, and read what it answers, also when it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from adapters.bases import BaseModel
from adapters.errors import ConfigInvalid
from server.edge_settings import check_origin
from server.settings import Settings, load_settings
from tests.fixtures.service import Server, error_of, running

KEY = "a-key-of-the-pages"
PAGE, STRANGER = "https://chat.example.org", "https://evil.example"
# What OpenAI's and Anthropic's JavaScript clients send from a page, with one header that they have not invented yet.
ASKED = (
    "authorization,content-type,idempotency-key,if-match,range,x-hotshoe-session,x-api-key,anthropic-version,user-agent,"
    "anthropic-dangerous-direct-browser-access,openai-organization,openai-project,x-stainless-arch,x-stainless-lang,"
    "x-stainless-os,x-stainless-package-version,x-stainless-retry-count,x-stainless-runtime,x-stainless-timeout,"
    "x-stainless-of-tomorrow"
)


@pytest.fixture(scope="module")
def listed(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_base, tmp_path_factory.mktemp("cors"), api_key=KEY, cors_origins=(PAGE,)) as one:
        yield one


def preflight(
    server: Server, origin: str, method: str = "POST", asked: str | None = ASKED, **more: str
) -> httpx.Response:
    headers = {"origin": origin, "access-control-request-method": method, **more}
    headers |= {"access-control-request-headers": asked} if asked is not None else {}
    return httpx.options(f"{server.url}/v1/chat/completions", headers=headers)


def words(answer: httpx.Response, name: str) -> set[str]:
    return {word.strip().lower() for word in answer.headers.get(name, "").split(",")}


def test_a_listed_pages_preflight_is_answered_without_a_key(listed: Server) -> None:
    answer = preflight(listed, PAGE)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "access-control-allow-credentials" not in answer.headers
    assert words(answer, "access-control-allow-methods") == {"get", "post", "put", "delete"}
    assert set(ASKED.split(",")) <= words(answer, "access-control-allow-headers")
    assert "origin" in words(answer, "vary") and answer.headers["x-request-id"].startswith("req_")
    assert preflight(listed, PAGE, asked=None).status_code == 200


@pytest.mark.parametrize(
    ("method", "asked"),
    [("PATCH", None), ("POST", "x-other"), ("POST", "cookie"), ("POST", "x-stainless-a b"), ("TRACE", "authorization")],
)
def test_a_preflight_for_what_no_route_takes_is_refused(listed: Server, method: str, asked: str | None) -> None:
    answer = preflight(listed, PAGE, method, asked)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_request")


@pytest.mark.parametrize(
    "origin", [STRANGER, "null", f"{PAGE}.evil.example", f"{PAGE}:444", PAGE.upper(), "https://example.org"]
)
def test_a_strangers_preflight_is_an_ordinary_request_without_a_key(listed: Server, origin: str) -> None:
    answer = preflight(listed, origin)
    assert answer.status_code == 401 and words(answer, "vary") == {"origin"}
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_a_listed_page_reads_answers_errors_and_streams(listed: Server) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
    http, origin = listed.http, {"origin": PAGE}
    answers = [
        http.get("/v1/models", headers=origin),
        http.post("/v1/chat/completions", json=body, headers=origin),
        http.post("/v1/chat/completions", json={**body, "stream": True}, headers=origin),
        http.get("/nothing", headers=origin),
        http.post("/v1/chat/completions", content=b"{", headers=origin),
        httpx.get(f"{listed.url}/v1/models", headers=origin),
        http.put("/v1/adapters/none/aliases/stable", json={"version": 1}, headers=origin),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 404, 400, 401, 404]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == PAGE and "origin" in words(answer, "vary")
        assert {"x-request-id", "etag", "retry-after", "x-ratelimit-reset-tokens"} <= words(
            answer, "access-control-expose-headers"
        )


def test_a_stranger_and_a_program_get_no_permission(listed: Server) -> None:
    answer = listed.http.get("/v1/models", headers={"origin": STRANGER})
    assert answer.status_code == 200 and words(answer, "vary") == {"origin"}
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert "access-control-allow-origin" not in listed.http.get("/v1/models").headers


def test_with_no_origin_listed_nothing_is_said(server: Server) -> None:
    answer = server.http.get("/v1/models", headers={"origin": "http://localhost:3000"})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control-") or name == "vary"]
    assert preflight(server, "http://localhost:3000").status_code == 405


def test_without_keys_a_listed_page_may_post_and_no_other(make_server: Callable[..., Server]) -> None:
    server = make_server(cors_origins=(PAGE,))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
    assert preflight(server, PAGE).status_code == 200
    answer = server.http.post("/v1/chat/completions", json=body, headers={"origin": PAGE})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == PAGE
    assert preflight(server, STRANGER).status_code == 403
    assert server.http.post("/v1/chat/completions", json=body, headers={"origin": STRANGER}).status_code == 403
    assert server.http.get("/v1/models", headers={"origin": PAGE, "host": "evil.example"}).status_code == 403


def test_any_origin_wants_a_key(
    make_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"HOTSHOE_{name.upper()}", raising=False)
    with pytest.raises(ConfigInvalid, match="no API key is set"):
        load_settings(cors_origins=("*",), home=tmp_path / "none")
    server = make_server(api_key=KEY, cors_origins=("*",))
    assert preflight(server, STRANGER).headers["access-control-allow-origin"] == "*"
    answer = server.http.get("/v1/models", headers={"origin": STRANGER})
    assert answer.headers["access-control-allow-origin"] == "*"
    assert httpx.get(f"{server.url}/v1/models", headers={"origin": STRANGER}).status_code == 401
    private = {"access-control-request-private-network": "true"}
    assert preflight(server, STRANGER, **private).status_code == 400


def test_a_listed_page_of_the_internet_may_ask_a_server_in_the_house(listed: Server) -> None:
    answer = preflight(listed, PAGE, **{"access-control-request-private-network": "true"})
    assert answer.headers["access-control-allow-private-network"] == "true"


def test_a_keyless_server_never_lets_any_origin_in(make_server: Callable[..., Server]) -> None:
    """Settings are refused before; should they not be, the check of a foreign Origin still stands."""
    server = make_server(cors_origins=("*",))
    assert server.http.get("/v1/models", headers={"origin": STRANGER}).status_code == 403


@pytest.mark.parametrize(
    "origin", ["https://a.example", "http://localhost:3000", "app://obsidian.md", "http://[::1]:8080"]
)
def test_what_browsers_send_as_origin_can_be_listed(origin: str) -> None:
    check_origin(origin)


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "example.org",
        "https://Example.org",
        "https://example.org/",
        "https://example.org/page",
        "https://*.example.org",
        "https://example.org:443",
        "http://example.org:80",
        "https://user@example.org",
        "https://ex ample.org",
        "https://a.example\r\nx: y",
        "https://münchen.example",
        "https://a.example:0",
        "file://",
    ],
)
def test_what_no_browser_would_send_is_named_at_the_start(origin: str) -> None:
    with pytest.raises(ConfigInvalid, match="cors_origins"):
        check_origin(origin)
