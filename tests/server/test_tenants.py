"""Tenants beside each other on one server: whatever is not yours looks as if it were not there."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from adapters.bases import BaseModel
from adapters.export_rows import NewExport
from adapters.keys import SCOPES
from server.access import PUBLIC, ROUTES, Kind, Route
from server.services import ALL_SCOPES
from tests.fixtures.service import Server, chunks_of, error_of, eventually, running

KEY = "the-operators-own-key"
NAME = "router"
ABSENT = "nobody"  # as long as NAME, so that lengths too may be compared
CHAT = [{"role": "user", "content": "hello there"}]


class Keyed:
    """A server's own client, with another key on each request."""

    def __init__(self, server: Server, key: str) -> None:
        self.server = server
        self.headers = {"authorization": f"Bearer {key}"}

    def request(self, method: str, path: str, headers: dict[str, str] | None = None, **options: Any) -> httpx.Response:
        return self.server.http.request(method, path, headers={**self.headers, **(headers or {})}, **options)

    def stream(self, path: str, body: dict[str, Any]) -> list[str]:
        with self.server.http.stream("POST", path, json=body, headers=self.headers) as stream:
            return [line[6:] for line in stream.iter_lines() if line.startswith("data: ")]

    def get(self, path: str) -> httpx.Response:
        return self.request("GET", path)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)

    def put(self, path: str, **options: Any) -> httpx.Response:
        return self.request("PUT", path, **options)

    def delete(self, path: str) -> httpx.Response:
        return self.request("DELETE", path)


class Team:
    """One tenant's way to the server, with a key of the given scopes."""

    def __init__(self, server: Server, tenant: str, *scopes: str, **more: Any) -> None:
        body = {"tenant": tenant, "scopes": list(scopes), **more}
        answer = server.http.post("/v1/keys", json=body)
        assert answer.status_code == 201, answer.text
        self.row = answer.json()
        self.http = Keyed(server, self.row["key"])

    def say(self, model: str, **body: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json={"model": model, "messages": CHAT, **body})

    def push(self, server: Server, name: str, **spec: Any) -> httpx.Response:
        folder = server.adapter(**spec)
        parts = {
            "config": ("adapter_config.json", (folder / "adapter_config.json").read_bytes()),
            "weights": ("adapter_model.safetensors", (folder / "adapter_model.safetensors").read_bytes()),
        }
        return self.http.post("/v1/adapters", data={"name": name}, files=parts, params={"wait": 20})

    def models(self) -> list[str]:
        return [row["id"] for row in self.http.get("/v1/models").json()["data"]]


EVERYTHING = ("infer", "upload", "promote", "export")


@pytest.fixture(scope="module")
def keyed(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_base, tmp_path_factory.mktemp("tenants"), api_key=KEY) as one:
        yield one


@pytest.fixture(scope="module")
def acme(keyed: Server) -> Team:
    """The owner of `router`, with two versions of it."""
    team = Team(keyed, "acme", *EVERYTHING)
    for _ in range(2):
        assert team.push(keyed, NAME).json()["status"] == "ready"
    return team


@pytest.fixture(scope="module")
def other(keyed: Server, acme: Team) -> Team:
    """Another tenant, with an adapter of its own."""
    team = Team(keyed, "other", *EVERYTHING)
    assert team.push(keyed, "theirs").json()["status"] == "ready"
    return team


@pytest.fixture(scope="module")
def export_id(keyed: Server, acme: Team) -> str:
    registry = keyed.services.registry
    row = registry.add_export(NewExport("acme", f"{NAME}@1", "export-" + "1" * 24, actor="test"))
    return registry.cancel_export("acme", row.id).id


# What goes into each route, where {name} is the adapter that is asked for. A new route needs a line here.
VALUES = {"number": "1", "file": "adapter_config.json", "alias": "stable"}
BODIES: dict[tuple[str, str], Any] = {
    ("POST", "/v1/chat/completions"): {"model": "{name}", "messages": CHAT},
    ("POST", "/v1/completions"): {"model": "{name}@1", "prompt": "hello"},
    ("POST", "/v1/responses"): {"model": "{name}", "input": "hello"},
    ("POST", "/v1/messages"): {"model": "{name}", "messages": CHAT, "max_tokens": 4},
    ("POST", "/tokenize"): {"model": "{name}", "prompt": "hello"},
    ("POST", "/detokenize"): {"model": "{name}", "tokens": [1]},
    ("POST", "/v1/exports"): {"model": "{name}"},
    ("PUT", "/v1/adapters/{name}/aliases/{alias}"): {"version": 1},
    ("POST", "/v1/adapters/{name}/rollback"): {},
    ("PUT", "/v1/adapters/{name}/gate"): {"rows": [{"messages": CHAT, "expected": "x"}], "minimum": 0.5},
    ("POST", "/v1/adapters/{name}/versions/{number}/warm"): None,
    ("POST", "/v1/exports/{export_id}/cancel"): None,
}
# Routes that name nothing of a tenant's: they list, or they are the operator's.
UNNAMED = {
    ("GET", "/v1/models"),
    ("POST", "/v1/adapters"),
    ("GET", "/v1/adapters"),
    ("GET", "/v1/exports"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files"),
    ("POST", "/v1/uploads"),
    ("GET", "/v1/uploads"),
    ("GET", "/v1/usage"),
    ("POST", "/v1/sources/pull"),  # these three in tests/server/test_sources*.py, as they need a source
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("GET", "/metrics"),
    ("GET", "/v1/system"),
    ("GET", "/openapi.json"),
}
NAMED = [
    route
    for route in ROUTES
    if route.path not in PUBLIC
    and route.scope != "admin"
    and (route.method, route.path) not in UNNAMED
    and not re.match(r"/v1/(files|uploads)/", route.path)  # tests/server/test_files_isolation.py
    and not route.path.startswith("/v1/fine_tuning/")  # tests/server/test_jobs_isolation.py
]


def show(route: Route) -> str:
    return f"{route.method} {route.path}"


def ask(team: Team, route: Route, name: str, export_id: str) -> httpx.Response:
    http, path = team.http, route.path
    values = {**VALUES, "name": name, "model": f"{name}@1", "owner": "acme", "export_id": export_id}
    for field in re.findall(r"\{(\w+)\}", path):
        path = path.replace(f"{{{field}}}", values[field])
    if route.method in ("GET", "HEAD", "DELETE"):
        return http.request(route.method, path)
    body = json.dumps(BODIES[route.method, route.path]).replace("{name}", name)
    return http.request(route.method, path, content=body, headers={"content-type": "application/json"})


def code_of(answer: httpx.Response) -> str:
    """OpenAI's code of an error, or on Anthropic's route the type of theirs; a HEAD has no body to read it in."""
    if answer.request.method == "HEAD":
        return {401: "invalid_api_key", 403: "forbidden", 404: "not_found", 409: "conflict"}[answer.status_code]
    if answer.request.url.path == "/v1/messages":
        return str(answer.json()["error"]["type"])
    return str(error_of(answer)["code"])


@pytest.mark.parametrize("route", NAMED, ids=show)
def test_i1_foreign_looks_exactly_absent(route: Route, keyed: Server, acme: Team, other: Team, export_id: str) -> None:
    foreign = ask(other, route, NAME, export_id)
    absent = ask(other, route, ABSENT, "export-" + "0" * 24)
    assert foreign.status_code == absent.status_code == 404, foreign.text
    assert foreign.text.replace(NAME, ABSENT).replace(export_id, "export-" + "0" * 24) == absent.text
    assert set(foreign.headers) == set(absent.headers)


@pytest.mark.parametrize("route", [route for route in NAMED if route.method != "DELETE"], ids=show)
def test_i1_its_own_tenant_finds_what_another_does_not(route: Route, keyed: Server, acme: Team, export_id: str) -> None:
    if (route.method, route.path) == ("POST", "/v1/exports"):
        return  # ordered in tests/server/test_exports.py
    answer = ask(acme, route, NAME, export_id)
    is_shared_form = "{owner}" in route.path
    has_card = not route.path.endswith("/card")
    # The scripted engine has no /tokenize: its own 404 shows that the request came through to it.
    found = answer.status_code != 404 or code_of(answer) == "not_found" or "The engine answered" in answer.text
    assert found is not is_shared_form, answer.text
    assert answer.status_code != 403 and (has_card or "without a card" in answer.text)


@pytest.mark.parametrize("route", [route for route in ROUTES if route.scope is not None], ids=show)
def test_i1_without_the_scope_nothing_is_told(route: Route, keyed: Server, acme: Team) -> None:
    lacking = [scope for scope in SCOPES if scope != "admin" and route.scope not in (scope, *SCOPES[scope])]
    team = Team(keyed, "default", *lacking)
    path = re.sub(r"\{\w+\}", NAME, route.path)
    for name in (NAME, ABSENT):
        answer = team.http.request(route.method, path.replace(NAME, name))
        assert answer.status_code == 403 and code_of(answer) in ("forbidden", "permission_error")
        assert name not in answer.text
    with httpx.Client(base_url=keyed.url) as bare:
        answer = bare.request(route.method, path)
        assert answer.status_code == 401 and code_of(answer) in ("invalid_api_key", "authentication_error")


def test_i1_a_route_that_names_something_in_its_path_is_always_asked_for_a_foreign_one() -> None:
    assert not [route for route in UNNAMED if "{" in route[1]]
    assert {(route.method, route.path) for route in ROUTES} >= UNNAMED, "no line for a route that is gone"


def test_a4_every_route_has_a_scope_that_a_key_can_have_and_only_five_paths_may_be_public() -> None:
    assert {route.scope for route in ROUTES} - {None} <= set(ALL_SCOPES)
    assert len(PUBLIC) <= 5
    assert all(route.scope == "admin" for route in ROUTES if re.match(r"/v1/(keys|tenants)", route.path))
    assert all(route.scope == "infer" for route in ROUTES if route.kind is Kind.PROXIED)


def test_two_tenants_use_one_name_and_never_meet(keyed: Server, acme: Team, other: Team) -> None:
    mine = Team(keyed, "third", *EVERYTHING)
    pushed = mine.push(keyed, NAME)
    assert pushed.json()["status"] == "ready" and pushed.json()["version"] == 1
    digests = {team.http.get(f"/v1/adapters/{NAME}/versions/1").json()["digest"] for team in (acme, mine)}
    assert len(digests) == 2
    assert mine.http.delete(f"/v1/adapters/{NAME}/versions/1").status_code == 409, "its stable"
    assert mine.push(keyed, NAME).json()["version"] == 2
    assert mine.http.put(f"/v1/adapters/{NAME}/aliases/stable", json={"version": 2}).status_code == 200
    assert mine.say(NAME).json()["model"] == f"{NAME}@2"
    assert acme.say(NAME).json()["model"] == f"{NAME}@1"
    assert mine.http.delete(f"/v1/adapters/{NAME}/versions/1").json()["status"] == "retired"
    assert acme.http.get(f"/v1/adapters/{NAME}/versions/1").json()["status"] == "ready"


def test_i2_no_foreign_string_is_in_any_list_or_answer(keyed: Server, acme: Team, other: Team) -> None:
    acme.http.post("/v1/adapters/router/versions/1/warm")
    for path in ("/v1/models", "/v1/models?view=all", "/v1/adapters", "/v1/exports", "/v1/system", "/v1/usage"):
        text = other.http.get(path).text
        assert NAME not in text and "acme" not in text, path
        assert "theirs" in text or path in ("/v1/exports", "/v1/usage")


def test_i2_a_foreign_adapter_is_counted_and_logged_as_an_absent_one(
    keyed: Server, acme: Team, other: Team, caplog: pytest.LogCaptureFixture
) -> None:
    import structlog

    with structlog.testing.capture_logs() as lines, caplog.at_level(logging.DEBUG):
        before = keyed.metric("hotshoe_requests_total", model="none", outcome="refused")
        assert other.say(NAME).status_code == 404
        assert other.say(ABSENT).status_code == 404
        assert keyed.metric("hotshoe_requests_total", model="none", outcome="refused") == before + 2
        eventually(lambda: sum(line["event"] == "request" for line in lines) == 2)  # written behind the answer
    changing = ("request_id", "seconds")
    foreign, absent = (
        {key: line[key] for key in line if key not in changing} for line in lines if line["event"] == "request"
    )
    assert foreign == absent and foreign["model"] is None
    assert NAME not in str(foreign) + caplog.text


def test_metrics_tell_adapters_of_one_name_apart(keyed: Server, acme: Team) -> None:
    acme.say(f"{NAME}@1")
    assert keyed.metric("hotshoe_requests_total", model=f"acme/{NAME}@1", outcome="completed") >= 1
    assert keyed.metric("hotshoe_requests_total", model=f"{NAME}@1", outcome="completed") == 0


def test_idempotency_keys_belong_to_a_tenant(keyed: Server, acme: Team, other: Team) -> None:
    headers = {"idempotency-key": "one-key"}
    mine = acme.http.put(f"/v1/adapters/{NAME}/aliases/canary", json={"version": 2}, headers=headers)
    theirs = other.http.put("/v1/adapters/theirs/aliases/canary", json={"version": 1}, headers=headers)
    assert (mine.status_code, theirs.status_code) == (200, 200)
    assert mine.json()["name"] == NAME and theirs.json()["name"] == "theirs"


@pytest.fixture
def shared(keyed: Server, acme: Team, other: Team) -> Iterator[str]:
    path = f"/v1/tenants/acme/grants/{NAME}/other"
    assert keyed.http.put(path).json()["model"] == f"acme/{NAME}"
    yield f"acme/{NAME}"
    keyed.http.delete(path)


def test_a_shared_adapter_answers_by_its_owners_name_and_nothing_else_of_it_is_seen(
    keyed: Server, acme: Team, other: Team, shared: str
) -> None:
    assert shared in other.models() and shared not in acme.models()
    assert other.say(shared).json()["model"] == f"{shared}@1"
    whole = other.say(shared)
    assert int(whole.headers["content-length"]) == len(whole.content)
    body = {"model": f"{shared}@2", "messages": CHAT, "stream": True}
    events = other.http.stream("/v1/chat/completions", body)
    assert {chunk["model"] for chunk in chunks_of(events)} == {f"{shared}@2"}
    row = other.http.get(f"/v1/models/{shared}").json()
    assert row["id"] == shared and row["root"] == f"{shared}@1" and row["owned_by"] == "acme"
    assert set(row) == {"id", "object", "created", "owned_by", "root", "parent"}
    assert other.http.get(f"/v1/adapters/{NAME}").status_code == 404
    assert other.http.post("/v1/exports", json={"model": shared}).status_code == 400
    assert other.say(NAME).status_code == 404


def test_a_shared_adapters_candidate_answers_by_its_owners_name(acme: Team, other: Team, shared: str) -> None:
    path = f"/v1/adapters/{NAME}/aliases/stable"
    assert acme.http.put(path, json={"candidate": 2, "share": 0.5}).status_code == 200
    try:
        for _ in range(2):
            answers = {other.say(shared, user=f"user {i}").json()["model"] for i in range(40)}
            assert answers == {f"{shared}@1", f"{shared}@2"}
    finally:
        assert acme.http.put(path, json={"candidate": None}).status_code == 200


def test_sharing_ends_with_the_answer_that_says_so(keyed: Server, acme: Team, other: Team, shared: str) -> None:
    assert other.say(shared).status_code == 200
    keyed.http.delete(f"/v1/tenants/acme/grants/{NAME}/other")
    gone = other.say(shared)
    assert gone.status_code == 404
    assert gone.text == other.say(f"acme/{ABSENT}").text.replace(ABSENT, NAME)
    assert shared not in other.models()


def test_a_key_limited_to_adapters_sees_only_those(keyed: Server, acme: Team) -> None:
    assert acme.push(keyed, "second").json()["status"] == "ready"
    narrow = Team(keyed, "acme", *EVERYTHING, adapters=["second"])
    assert narrow.say("second").status_code == 200
    assert narrow.models() == [keyed.base.id, "second"]
    assert [row["name"] for row in narrow.http.get("/v1/adapters").json()["data"]] == ["second"]
    assert narrow.say(keyed.base.id).status_code == 404
    for route in NAMED:
        hidden, absent = (ask(narrow, route, name, "export-" + "0" * 24) for name in (NAME, ABSENT))
        assert hidden.status_code == absent.status_code == 404, show(route)
        assert hidden.text.replace(NAME, ABSENT) == absent.text
    assert narrow.push(keyed, NAME).status_code == 403
    assert NAME not in narrow.http.get("/v1/system").text


def test_i4_each_tenant_has_a_prefix_cache_of_its_own(keyed: Server, acme: Team, other: Team) -> None:
    keyed.script.reports_cached_tokens = True

    def cached(team: Team, text: str) -> int:
        body = {"model": keyed.base.id, "messages": [{"role": "user", "content": text}]}
        answer = team.http.post("/v1/chat/completions", json=body).json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    try:
        assert [cached(acme, "a b c") for _ in range(2)] == [0, 3]
        assert [cached(other, "a b c") for _ in range(2)] == [0, 3], "not the first tenant's"
        assert cached(Team(keyed, "acme", "infer"), "a b c") == 3, "by tenant, not by key"
    finally:
        keyed.script.reports_cached_tokens = False
    refused = acme.say(keyed.base.id, cache_salt="of another tenant")
    assert refused.status_code == 400 and error_of(refused)["code"] == "unknown_parameter"


def test_a_tenant_over_its_quota_is_told_and_nothing_is_kept(keyed: Server) -> None:
    assert keyed.http.put("/v1/tenants/small", json={"limits": {"versions": 1}}).status_code == 200
    team = Team(keyed, "small", *EVERYTHING)
    first = team.push(keyed, "one").json()
    refused = team.push(keyed, "one")
    assert refused.status_code == 429 and error_of(refused)["code"] == "quota_exceeded"
    limits = {"stored_bytes": first["size_bytes"] * 2 - 1}
    keyed.http.put("/v1/tenants/small", json={"limits": limits})
    refused = team.push(keyed, "one")
    assert refused.status_code == 413 and error_of(refused)["code"] == "payload_too_large"
    row = keyed.http.get("/v1/tenants/small").json()
    assert (row["versions"], row["stored_bytes"]) == (1, first["size_bytes"])
    store, registry = keyed.services.store, keyed.services.registry
    assert set(store.digests()) == registry.digests_in_use(), "nor on the disk"
    keyed.http.put("/v1/tenants/small", json={"limits": {"stored_bytes": first["size_bytes"] // 2}})
    assert error_of(team.push(keyed, "one"))["code"] == "payload_too_large", "while it comes"


def test_tenants_and_grants_refuse_what_cannot_be(keyed: Server, acme: Team, make_error: Callable[..., None]) -> None:
    make_error(keyed.http.put("/v1/tenants/a%20b", json={}), 400, "name_invalid")
    make_error(keyed.http.put("/v1/tenants/x", json={"limits": {"speed": 1}}), 400, "invalid_request")
    make_error(keyed.http.put("/v1/tenants/x", json={"limit": {}}), 422, "unprocessable")
    make_error(keyed.http.get("/v1/tenants/absent"), 404, "not_found")
    make_error(keyed.http.put(f"/v1/tenants/acme/grants/{NAME}/absent"), 404, "not_found")
    make_error(keyed.http.put("/v1/tenants/acme/grants/absent/other"), 404, "model_not_found")


@pytest.fixture
def make_error() -> Callable[[httpx.Response, int, str], None]:
    def check(answer: httpx.Response, status: int, code: str) -> None:
        assert (answer.status_code, error_of(answer)["code"]) == (status, code), answer.text

    return check
