"""`serve --merged`: one version in the engine's own weights, under its own names, and nothing else beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.bases import BaseModel, load_base
from adapters.errors import ConfigInvalid, Conflict, NotServable
from server.app import build_services
from server.engine.base import EngineAdapter
from server.settings import Settings
from tests.fixtures.bases import tiny_qwen2
from tests.fixtures.service import Server, chunks_of, error_of, eventually, running


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base(tiny_qwen2(tmp_path_factory.mktemp("base") / "tiny-qwen2"))


@pytest.fixture(scope="module")
def state(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state folder with router@1 (stable), router@2 and other@1, all ready; and a cache of its own."""
    scratch = tmp_path_factory.mktemp("merged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOTSHOE_CACHE", str(scratch / "cache"))
        with running(base, scratch) as server:
            for name in ("router", "router", "other"):
                server.pushed(name)
            assert server.promote("router", 1, "canary").status_code == 200
        yield scratch


@pytest.fixture
def server(base: BaseModel, state: Path) -> Iterator[Server]:
    with running(base, state, merged="router@1") as one:
        yield one


def refused(answer: httpx.Response) -> str:
    """The words of a 409 `not_servable`."""
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (409, "not_servable", "model"), answer.text
    return str(error["message"])


def start(base: BaseModel, state: Path, merged: str) -> None:
    """As far as a start goes before its engine."""
    values: dict[str, Any] = {"home": state / "home", "base": str(base.folder), "engine": "scripted"}
    build_services(Settings(**values, merged=merged))


def test_every_name_of_the_version_answers_as_it_and_counts_as_it(server: Server) -> None:
    for name in ("router", "router@1", "router@canary"):
        answer = server.say(name).json()
        assert answer["model"] == "router@1"
        assert answer["choices"][0]["message"]["content"].startswith("router@1 heard")
    chunks = chunks_of(server.events("router"))
    assert {chunk["model"] for chunk in chunks} == {"router@1"}
    labels = {"model": "router@1", "outcome": "completed"}
    eventually(lambda: server.metric("hotshoe_requests_total", **labels) == 4)


def test_the_base_and_every_other_version_say_what_to_start_instead(server: Server, base: BaseModel) -> None:
    assert "without --merged" in refused(server.say(base.id))
    sibling = refused(server.say("router@2"))
    assert "--merged router@2" in sibling and "runs router@1" in sibling
    stranger = refused(server.say("other"))
    assert "--merged other@1" in stranger and "router" not in stranger


def test_tokens_are_counted_with_no_model_named(server: Server) -> None:
    """The tokenizer is the base's: the engine is asked under the name that it has for its own weights."""
    answer = server.http.post("/tokenize", json={"prompt": "hello"})
    assert answer.status_code != 409, answer.text


def test_the_lists_show_what_answers_and_where_it_is(server: Server, base: BaseModel) -> None:
    assert [row["id"] for row in server.http.get("/v1/models").json()["data"]] == ["router"]
    full = server.http.get("/v1/models", params={"view": "all"}).json()["data"]
    assert full[0]["id"] == base.id
    system = server.http.get("/v1/system").json()
    assert (system["engine"]["slots"], system["engine"]["staged_limit"]) == (0, 0)
    absent = ("absent", "absent")
    with pytest.raises(Conflict, match="takes no adapters"):
        server.call(server.engine.load(EngineAdapter("other@1", Path("/nowhere"), 77)))
    places = {row["id"]: (row["place"], row["residency"]) for row in system["adapters"]}
    assert places == {"router@1": ("merged", "resident"), "router@2": absent, "other@1": absent}


def test_an_engine_that_died_comes_back_with_the_version_in_it(server: Server) -> None:
    server.call(server.engine.crash())
    eventually(lambda: server.http.get("/ready").status_code == 200 and server.say("router").status_code == 200)
    assert server.say("router").json()["model"] == "router@1"


def test_what_is_pushed_waits_and_no_alias_moves_to_what_is_not_here(server: Server) -> None:
    row = server.push("router", wait=1).json()
    assert row["status"] == "quarantined"
    assert "--merged router@2" in refused(server.promote("router", 2))
    assert server.promote("router", 1, "canary").status_code == 200
    assert server.say("router").json()["model"] == "router@1"
    warm = server.http.post("/v1/adapters/router/versions/2/warm")
    assert "--merged router@2" in refused(warm)
    assert server.say("router").json()["model"] == "router@1"


def test_a_version_that_cannot_answer_is_refused_before_anything_is_started(base: BaseModel, state: Path) -> None:
    for name in ("nobody@1", "router@99", "../etc", "other-tenant/router@1"):
        with pytest.raises(ConfigInvalid, match="merged names"):
            start(base, state, name)
    with pytest.raises(NotServable, match="quarantined"):
        start(base, state, "router@3")


def test_a_retired_version_stops_answering(base: BaseModel, state: Path, tmp_path: Path) -> None:
    with running(base, state) as server:
        server.pushed("short-lived")
    with running(base, state, merged="short-lived@1") as server:
        assert server.say("short-lived").json()["model"] == "short-lived@1"
        assert server.http.delete("/v1/models/short-lived@1").status_code == 200
        assert "retired" in refused(server.say("short-lived@1"))
        server.call(server.engine.crash())
        eventually(lambda: server.http.get("/ready").status_code == 200)
        assert "retired" in refused(server.say("short-lived@1"))
    with pytest.raises(NotServable, match="retired"):
        start(base, state, "short-lived@1")


def test_another_tenants_version_answers_to_that_tenant_alone(base: BaseModel, state: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"api_key": "operator-key"}
    with running(base, tmp_path, **settings) as server:
        made = server.http.post("/v1/keys", json={"tenant": "acme", "name": "theirs", "scopes": ["infer", "upload"]})
        assert made.status_code == 201, made.text
        theirs = {"authorization": f"Bearer {made.json()['key']}"}
        assert server.push("router", headers=theirs).json()["status"] == "ready"
        assert server.push("router").json()["status"] == "ready"
    body = {"model": "router", "messages": [{"role": "user", "content": "hello"}]}
    with running(base, tmp_path, merged="acme/router@1", **settings) as server:
        answer = server.http.post("/v1/chat/completions", json=body, headers=theirs)
        assert answer.json()["model"] == "router@1", answer.text
        words = refused(server.say("router"))
        assert "acme" not in words and "runs one version" in words
        assert server.metric("hotshoe_requests_total", model="acme/router@1", outcome="completed") == 1
