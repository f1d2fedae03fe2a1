from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest
from fastapi.routing import APIRoute

from adapters.bases import BaseModel
from server.access import PUBLIC, ROUTES, Kind
from server.gateway import Gateway
from tests.fixtures.service import Server, error_of, eventually, running

KEY = "a-key-of-the-tests"


@pytest.fixture(scope="module")
def keyed(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_base, tmp_path_factory.mktemp("keyed"), api_key=KEY) as one:
        yield one


def test_every_route_of_ours_is_in_the_table_and_every_row_of_the_table_is_a_route(server: Server) -> None:
    from server.app import create_app

    app: Gateway = create_app(server.services.settings, server.services)
    ours = {
        (method, route.path)
        for route in app.app.routes  # type: ignore[attr-defined]
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    table = {(route.method, route.path) for route in ROUTES if route.kind is not Kind.PROXIED}
    assert ours | {("GET", "/openapi.json")} == table
    assert {"/health", "/ready"} == PUBLIC


def test_without_its_key_a_server_answers_nothing_but_the_public_routes(keyed: Server) -> None:
    with httpx.Client(base_url=keyed.url) as bare:
        check_without_key(keyed, bare)


def check_without_key(keyed: Server, bare: httpx.Client) -> None:
    for route in ROUTES:
        path = route.path.replace("{", "").replace("}", "")
        for headers in ({}, {"authorization": f"Bearer {KEY}x"}, {"authorization": KEY}, {"x-api-key": "nope"}):
            answer = bare.request(route.method, path, headers=headers)
            if route.path in PUBLIC:
                assert answer.status_code == 200
            else:
                assert answer.status_code == 401, (route, headers)
                if route.method == "HEAD":
                    assert answer.content == b"" and answer.headers["www-authenticate"] == "Bearer"
                elif route.path == "/v1/messages":
                    assert answer.json()["error"]["type"] == "authentication_error"
                else:
                    assert error_of(answer)["code"] == "invalid_api_key"
    assert bare.get("/nothing/here").status_code == 401
    assert keyed.http.get("/v1/models").status_code == 200
    answer = bare.post("/v1/messages", headers={"x-api-key": KEY}, json={})
    assert answer.status_code == 400


def test_two_authorization_headers_are_no_key(keyed: Server) -> None:
    answer = keyed.raw(
        f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nAuthorization: Bearer {KEY}\r\n"
        "Connection: close\r\n\r\n",
    )
    assert answer.startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize(
    "line",
    [
        "GET //v1/models HTTP/1.1",
        "GET /v1/../v1/models HTTP/1.1",
        "GET /v1%2Fmodels HTTP/1.1",
        "GET /V1/MODELS HTTP/1.1",
        "HEAD /v1/models HTTP/1.1",
        "OPTIONS /v1/models HTTP/1.1",
        "GET http://elsewhere/v1/models HTTP/1.1",
        "GET /health/../v1/models HTTP/1.1",
        "GET /v1/load_lora_adapter HTTP/1.1",
        "POST /invocations HTTP/1.1",
        "GET /v1/models?x=/health HTTP/1.1",
    ],
)
def test_no_trick_with_the_path_gets_past_the_key(keyed: Server, line: str) -> None:
    answer = keyed.raw(f"{line}\r\nHost: a/?x=\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    assert answer.split(b" ")[1] in (b"400", b"401", b"403", b"404", b"405"), answer[:200]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1:8000", "localhost@evil", ""])
def test_without_keys_a_foreign_host_is_refused(server: Server, host: str) -> None:
    answer = server.raw(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
    assert answer.split(b" ")[1] in (b"403", b"400"), answer


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:8000", "LOCALHOST"])
def test_without_keys_loopback_names_are_served(server: Server, host: str) -> None:
    answer = server.raw(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200"), answer


def test_without_keys_a_page_of_another_site_cannot_post(server: Server) -> None:
    for origin in ("https://evil.example", "null", "http://localhost.evil.example"):
        answer = server.http.post("/v1/chat/completions", headers={"origin": origin}, content=b"{}")
        assert (answer.status_code, error_of(answer)["code"]) == (403, "forbidden")
    assert server.http.get("/v1/models", headers={"origin": "http://localhost:3000"}).status_code == 200


def test_without_keys_a_key_that_is_sent_is_ignored(server: Server) -> None:
    assert server.http.get("/v1/models", headers={"authorization": "Bearer whatever"}).status_code == 200


def test_paths_and_methods_that_are_not_there_answer_in_the_one_body(server: Server) -> None:
    answer = server.http.get("/nothing")
    assert (answer.status_code, error_of(answer)["code"]) == (404, "route_not_found")
    answer = server.http.delete("/health")
    assert (answer.status_code, error_of(answer)["code"]) == (405, "method_not_allowed")
    answer = server.http.get("/v1/adapters", params={"wait": "x"})
    assert answer.status_code == 200
    answer = server.http.put("/v1/adapters/x/aliases/stable", json={"version": "my secret"})
    assert (answer.status_code, error_of(answer)["code"]) == (422, "unprocessable")
    assert error_of(answer)["param"] == "version" and "secret" not in answer.text


def test_every_answer_has_a_request_id_of_the_servers(server: Server) -> None:
    answer = server.http.get("/health", headers={"x-request-id": "mine"})
    assert answer.headers["x-request-id"].startswith("req_")


def test_a_body_over_the_limit_is_refused_before_it_is_parsed(server: Server) -> None:
    limit = server.services.settings.max_body_bytes
    answer = server.http.post("/v1/chat/completions", content=b"[" * (limit + 1))
    assert (answer.status_code, error_of(answer)["code"]) == (413, "payload_too_large")

    def endless() -> object:
        for _ in range(limit // 65536 + 2):
            yield b"[" * 65536

    answer = server.http.post("/v1/chat/completions", content=endless())  # type: ignore[arg-type]
    assert answer.status_code == 413


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
def test_u29_a_compressed_body_is_refused(server: Server, encoding: str) -> None:
    for path in ("/v1/chat/completions", "/v1/adapters"):
        answer = server.http.post(path, content=b"x", headers={"content-encoding": encoding})
        assert (answer.status_code, error_of(answer)["code"]) == (415, "encoding_not_allowed")


@pytest.mark.parametrize(
    "raw_body",
    [
        b"",
        b"[]",
        b"not json",
        b'{"model": "tiny", "model": "tiny"}',
        b'{"model": "tiny", "temperature": NaN}',
        b'{"model": "tiny", "temperature": 1e999, "messages": []}',
        b'{"model": ' + b"[" * 100_000,
        b'{"model": "tiny", "n": ' + b"9" * 10_000 + b"}",
        b'{"model": "\xff"}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
)
def test_a7_a_body_that_is_not_plain_json_is_refused(server: Server, raw_body: bytes) -> None:
    answer = server.http.post("/v1/chat/completions", content=raw_body)
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["code"] in ("json_invalid", "invalid_request")


@pytest.mark.parametrize(
    "model", ["/etc/passwd", "../x", "nobody", "tenant/x", "tiny@1", "a@0", "a@01", "x" * 1000, "é"]
)
def test_a7_a_model_that_is_not_there_is_model_not_found(server: Server, model: str) -> None:
    answer = server.say(model)
    assert (answer.status_code, error_of(answer)["code"], error_of(answer)["param"]) == (
        404,
        "model_not_found",
        "model",
    )


@pytest.mark.parametrize(
    "field",
    [
        {"chat_template": "{{ x }}"},
        {"cache_salt": "s"},
        {"lora_request": {}},
        {"prompt_embeds": "x"},
        {"kv_transfer_params": {"a": 1}},
        {"priority": 1},
        {"request_id": "mine"},
        {"structured_outputs": {"regex": "(a+)+"}},
        {"guided_regex": "a"},
        {"chat_template_kwargs": {"chat_template": "x"}},
    ],
)
def test_a6_fields_that_clients_may_not_set_are_unknown_parameters(server: Server, field: dict[str, object]) -> None:
    answer = server.say("tiny", **field)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "unknown_parameter")


@pytest.mark.parametrize(
    "field",
    [
        {"n": 1_000_000},
        {"best_of": -1},
        {"max_tokens": 10**12},
        {"max_tokens": -1},
        {"top_logprobs": 1_000_000},
        {"seed": 2**63},
        {"stop": ["x"] * 10_000},
        {"logit_bias": {str(i): 1 for i in range(100_000)}},
        {"chat_template_kwargs": {"x": "y" * 10_000}},
        {"temperature": -1},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
    ],
)
def test_a5_extremes_are_refused_and_the_engine_never_sees_them(server: Server, field: dict[str, object]) -> None:
    before = server.metric("hotshoe_queue_seconds_count", model="tiny")
    answer = server.say("tiny", **field)
    assert answer.status_code == 400 and error_of(answer)["param"]
    assert server.metric("hotshoe_queue_seconds_count", model="tiny") == before


@pytest.mark.parametrize("field", [{"store": True}, {"previous_response_id": "resp_1"}, {"background": True}])
def test_responses_are_stateless_and_say_so(server: Server, field: dict[str, object]) -> None:
    answer = server.http.post("/v1/responses", json={"model": "tiny", "input": "x", **field})
    assert answer.status_code == 400 and error_of(answer)["param"] in field


def test_every_inference_request_ends_in_exactly_one_outcome(make_server: Callable[..., Server]) -> None:
    server = make_server()
    server.pushed("one")
    for model in ("tiny", "one", "nobody"):
        server.say(model)
    server.say("tiny", priority=1)
    server.http.post("/v1/chat/completions", content=b"nope")
    server.events("one")

    def counted() -> float:
        families = server.services.metrics.registry.collect()
        samples = [sample for family in families for sample in family.samples]
        return sum(sample.value for sample in samples if sample.name == "hotshoe_requests_total")

    eventually(lambda: counted() == 6)  # a stream is counted once its client has read the end
    assert server.metric("hotshoe_requests_total", model="none", outcome="refused") == 3


def test_a_full_server_refuses_quickly_and_says_when_to_come_again(make_server: Callable[..., Server]) -> None:
    server = make_server(max_running=1, max_queued=0)
    server.script.seconds_to_first_token = 1.0
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: server.say("tiny"), range(4)))
    refused = [answer for answer in answers if answer.status_code == 503]
    assert len(refused) == 3
    assert all(error_of(one)["code"] == "engine_busy" and int(one.headers["retry-after"]) >= 1 for one in refused)
    assert all(one.elapsed.total_seconds() < 0.9 for one in refused)
