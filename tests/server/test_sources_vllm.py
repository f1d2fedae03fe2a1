"""vLLM's load and unload calls: its bodies, texts and status, with a version behind each name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.source_settings import SourceSettings
from tests.fixtures.adapters import write_adapter
from tests.fixtures.service import Server, error_of, eventually

Maker = Callable[..., Server]
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


@pytest.fixture
def server(make_server: Maker, root: Path) -> Server:
    return make_server(sources=(SourceSettings(name="shared", url=f"file://{root}", every_seconds=None),))


def load(server: Server, name: str, path: Path, **body: Any) -> httpx.Response:
    return server.http.post(LOAD, json={"lora_name": name, "lora_path": str(path), **body})


def models(server: Server) -> list[str]:
    return [row["id"] for row in server.http.get("/v1/models").json()["data"]]


def test_a_loaded_path_answers_at_once_and_an_unloaded_name_no_more(server: Server, root: Path) -> None:
    folder = write_adapter(root / "policy-v1", server.base, config={"base_model_name_or_path": "some/other-name"})
    answer = load(server, "policy-v1", folder, load_inplace=False)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'policy-v1' added successfully.")
    assert models(server) == [server.base.id, "policy-v1"]
    assert server.say("policy-v1").json()["model"] == "policy-v1@1"
    [event] = [
        one for one in server.http.get("/v1/adapters/policy-v1/events").json()["data"] if one["kind"] == "version_added"
    ]
    assert event["detail"]["source"]["location"] == f"file://{folder}"
    answer = server.http.post(UNLOAD, json={"lora_name": "policy-v1"})
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'policy-v1' removed successfully.")
    assert models(server) == [server.base.id] and server.say("policy-v1").status_code == 404
    eventually(lambda: server.call(server.engine.loaded()) == [])
    row = server.http.get("/v1/adapters/policy-v1/versions/1").json()
    assert (row["status"], row["is_warm"]) == ("ready", False), "the version stays"
    answer = server.http.post(UNLOAD, json={"lora_name": "policy-v1"})
    assert answer.status_code == 404
    assert error_of(answer)["message"] == "The lora adapter 'policy-v1' cannot be found."
    assert load(server, "policy-v1", folder).status_code == 200
    assert server.say("policy-v1").json()["model"] == "policy-v1@1", "the same bytes, the same version"


def test_a_name_that_is_loaded_is_replaced_only_in_place(server: Server, root: Path) -> None:
    first, second = (write_adapter(root / f"v{seed}", server.base, seed=seed) for seed in (1, 2))
    assert load(server, "router", first).status_code == 200
    assert load(server, "router", first).status_code == 200, "a call that is sent again"
    answer = load(server, "router", second)
    assert answer.status_code == 400
    assert "The lora adapter 'router' has already been loaded." in error_of(answer)["message"]
    assert [row["version"] for row in server.http.get("/v1/adapters/router/versions").json()["data"]] == [1]
    assert load(server, "router", second, load_inplace=True).status_code == 200
    assert server.say("router").json()["model"] == "router@2"
    assert server.http.post("/v1/adapters/router/rollback").status_code == 200
    assert server.say("router").json()["model"] == "router@1"


def test_files_changed_at_one_path_are_a_new_version(server: Server, root: Path) -> None:
    folder = write_adapter(root / "router", server.base, seed=1)
    assert load(server, "router", folder).status_code == 200
    write_adapter(folder, server.base, seed=2)
    assert load(server, "router", folder, load_inplace=True).status_code == 200
    assert server.say("router").json()["model"] == "router@2"


def test_an_alias_beside_keeps_the_version_loaded(server: Server, root: Path) -> None:
    assert load(server, "router", write_adapter(root / "router", server.base)).status_code == 200
    assert server.promote("router", 1, "canary").status_code == 200
    assert server.http.post(UNLOAD, json={"lora_name": "router", "lora_int_id": 7}).status_code == 200
    assert server.say("router").status_code == 404
    assert server.say("router@canary").json()["model"] == "router@1"
    assert server.metric("hotshoe_adapter_loads_total", outcome="loaded") == 1
    assert server.http.get("/v1/adapters/router/versions/1").json()["is_warm"] is True


def test_what_cannot_be_served_is_refused_with_the_reason_and_never_answers(server: Server, root: Path) -> None:
    answer = load(server, "idle", write_adapter(root / "idle", server.base, fill=(1.0, 0.0)))
    assert (answer.status_code, error_of(answer)["code"]) == (422, "no_effect")
    answer = load(server, "other", write_adapter(root / "other", server.base, config={"peft_type": "IA3"}))
    assert answer.status_code == 422 and error_of(answer)["problems"]
    answer = load(server, "whole", write_adapter(root / "whole", server.base, config={"bias": "all"}))
    assert answer.status_code in (409, 422)
    answer = load(server, "absent", root / "absent")
    assert answer.status_code == 404
    assert models(server) == [server.base.id]


def test_a_path_outside_every_source_is_403_whether_or_not_it_is_there(server: Server, root: Path) -> None:
    outside = write_adapter(server.scratch / "outside", server.base)
    (root / "link").symlink_to(outside)
    answers = [
        load(server, "x", path) for path in (outside, Path("/no/such"), Path("relative"), root / ".." / "outside")
    ]
    assert {(one.status_code, one.text) for one in answers} == {(403, answers[0].text)}
    assert "HOTSHOE_SOURCES" in error_of(answers[0])["message"]
    assert load(server, "x", root / "link").status_code == 422
    assert load(server, "x", Path("acme/router-on-the-hub")).status_code == 403


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"lora_name": "", "lora_path": "/x"}, 400),
        ({"lora_name": "x", "lora_path": ""}, 400),
        ({"lora_name": "x"}, 422),
        ({"lora_name": "tiny", "lora_path": "{root}/router"}, 400),
        ({"lora_name": "a/b", "lora_path": "{root}/router"}, 400),
        ({"lora_name": "x", "lora_path": "{root}/router", "is_3d_lora_weight": True}, 400),
        ({"lora_name": "x", "lora_path": "{root}/router", "load_inplace": "yes"}, 422),
        ({"lora_name": "x", "lora_path": "{root}/router", "unheard_of": 1}, 422),
        ({"lora_name": "x", "lora_path": "{root}/router", "base_model_name": "what a syncer sends"}, 200),
    ],
)
def test_bodies_are_vllms(server: Server, root: Path, body: dict[str, Any], status: int) -> None:
    write_adapter(root / "router", server.base)
    body = {key: value.replace("{root}", str(root)) if isinstance(value, str) else value for key, value in body.items()}
    answer = server.http.post(LOAD, json=body)
    assert answer.status_code == status, answer.text
    if status != 200:
        error_of(answer)


def test_without_a_source_the_two_calls_are_off_as_in_vllm(make_server: Maker) -> None:
    server = make_server()
    for path, body in ((LOAD, {"lora_name": "x", "lora_path": "/x"}), (UNLOAD, {"lora_name": "x"})):
        answer = server.http.post(path, json=body)
        assert (answer.status_code, error_of(answer)["code"]) == (404, "route_not_found")
        assert "HOTSHOE_SOURCES" in error_of(answer)["message"]


def test_keys_need_both_scopes_and_a_foreign_name_is_an_absent_one(make_server: Maker, root: Path) -> None:
    sources = tuple(
        SourceSettings(name=tenant, url=f"file://{root}", tenant=tenant, every_seconds=None)
        for tenant in ("acme", "other")
    )
    server = make_server(api_key="the-operators-own-key", sources=sources)
    folder = write_adapter(root / "router", server.base)

    def key(tenant: str, *scopes: str) -> dict[str, str]:
        row = server.http.post("/v1/keys", json={"tenant": tenant, "scopes": list(scopes)}).json()
        return {"authorization": f"Bearer {row['key']}"}

    body = {"lora_name": "router", "lora_path": str(folder)}
    for scopes in (("upload",), ("promote",), ("infer",)):
        assert server.http.post(LOAD, json=body, headers=key("acme", *scopes)).status_code == 403
    both, foreign = key("acme", "upload", "promote", "infer"), key("other", "upload", "promote")
    assert server.http.post(LOAD, json=body, headers=both).status_code == 200
    answers = [
        server.http.post(UNLOAD, json={"lora_name": name}, headers=foreign).text.replace(name, "NAME")
        for name in ("router", "nobody")
    ]
    assert answers[0] == answers[1]
    assert server.http.post(UNLOAD, json={"lora_name": "router"}, headers=both).status_code == 200
