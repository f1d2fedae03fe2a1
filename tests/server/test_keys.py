"""Keys over HTTP: made, used, limited, revoked; and what every wrong one gets."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from adapters.bases import BaseModel
from adapters.errors import ConfigInvalid
from adapters.keys import NewKey, load_pepper
from adapters.registry import Registry
from server.keyring import MAX_KEY_BYTES, Keyring
from server.settings import load_settings
from tests.fixtures.service import Server, error_of, running

KEY = "the-operators-own-key"


@pytest.fixture(scope="module")
def keyed(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_base, tmp_path_factory.mktemp("keys"), api_key=KEY) as one:
        yield one


def make(server: Server, *scopes: str, **more: Any) -> dict[str, Any]:
    answer = server.http.post("/v1/keys", json={"scopes": list(scopes), **more})
    assert answer.status_code == 201, answer.text
    row: dict[str, Any] = answer.json()
    return row


def models_with(server: Server, *headers: tuple[str, str]) -> httpx.Response:
    with httpx.Client(base_url=server.url) as bare:
        return bare.get("/v1/models", headers=list(headers))


def test_a_key_is_shown_once(keyed: Server) -> None:
    row = make(keyed, "infer", name="ci", tenant="acme")
    assert models_with(keyed, ("authorization", f"Bearer {row['key']}")).status_code == 200
    listed = keyed.http.get("/v1/keys?tenant=acme")
    assert row["key"] not in listed.text
    shown = listed.json()["data"][-1]
    assert shown == {name: value for name, value in row.items() if name != "key"}
    assert row["key"].startswith(shown["prefix"]) and "digest" not in shown


def test_a_revoked_key_is_out_with_the_answer_that_says_so(keyed: Server) -> None:
    row = make(keyed, "infer")
    header = ("authorization", f"Bearer {row['key']}")
    for _ in range(3):
        assert models_with(keyed, header).status_code == 200
    assert keyed.http.delete(f"/v1/keys/{row['id']}").json()["is_valid"] is False
    answer = models_with(keyed, header)
    assert answer.status_code == 401 and error_of(answer)["code"] == "invalid_api_key"
    assert error_of(keyed.http.delete("/v1/keys/key_none"))["code"] == "not_found"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "")],
        [("authorization", "Bearer")],
        [("authorization", "Basic aGk6aGk=")],
        [("authorization", f"Bearer {KEY}x")],
        [("authorization", "Bearer hs-" + "0" * 48)],
        [("authorization", "Bearer " + "x" * 30_000)],
        [("authorization", "Bearer \u00e9")],
        [("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {KEY}")],
        [("x-api-key", KEY)],
    ],
)
def test_a2_every_wrong_key_gets_one_answer(keyed: Server, headers: list[tuple[str, str]]) -> None:
    answer = models_with(keyed, *[(name, value.encode("latin-1")) for name, value in headers])  # type: ignore[misc]
    assert answer.status_code == 401
    error = error_of(answer)
    assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert KEY not in answer.text


def test_a2_a_key_of_a_megabyte_never_gets_in(keyed: Server) -> None:
    with socket.create_connection(("127.0.0.1", keyed.port), timeout=10) as connection:
        head = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer "
        try:
            connection.sendall(head + b"x" * 1_000_000 + b"\r\n\r\n")
            answer = connection.recv(4096)
        except OSError:
            answer = b""
    assert not answer.startswith(b"HTTP/1.1 2")
    assert keyed.http.get("/health").status_code == 200


def test_a2_an_expired_key_is_like_none(tmp_path: Path) -> None:
    registry = Registry.open(tmp_path)
    pepper = load_pepper(tmp_path)
    now = [1000.0]
    keyring = Keyring(registry, pepper, None, clock=lambda: now[0])
    _, secret = registry.add_key(NewKey("acme", ["infer"], expires_at=1060.0), pepper, actor="me")

    async def found() -> bool:
        return await keyring.find(secret.encode()) is not None

    import asyncio

    assert asyncio.run(found())
    now[0] = 1059.9
    assert asyncio.run(found())
    now[0] = 1060.0
    assert not asyncio.run(found())
    assert asyncio.run(keyring.find(b"x" * (MAX_KEY_BYTES + 1))) is None
    registry.close()


def test_a2_anthropics_header_works_where_its_clients_call(keyed: Server) -> None:
    row = make(keyed, "infer")
    with httpx.Client(base_url=keyed.url, headers={"x-api-key": row["key"]}) as http:
        assert http.post("/v1/messages", json={}).status_code == 400
        assert http.get("/v1/models").status_code == 401


def test_the_openai_sdk_has_its_own_classes_for_keys(keyed: Server) -> None:
    row = make(keyed, "upload")
    for key, kind in (("wrong-key-here", openai.AuthenticationError), (row["key"], openai.PermissionDeniedError)):
        with openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=key, max_retries=0) as client, pytest.raises(kind):
            client.models.list()


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 422, "unprocessable"),
        ({"scopes": []}, 400, "invalid_request"),
        ({"scopes": ["root"]}, 400, "invalid_request"),
        ({"scopes": ["admin"], "tenant": "acme"}, 400, "invalid_request"),
        ({"scopes": ["infer"], "tenant": "../x"}, 400, "name_invalid"),
        ({"scopes": ["infer"], "limits": {"versions": 1}}, 400, "invalid_request"),
        ({"scopes": ["infer"], "limits": {"requests_per_minute": -1}}, 400, "invalid_request"),
        ({"scopes": ["infer"], "expires_in_seconds": 0}, 422, "unprocessable"),
        ({"scopes": ["infer"], "colour": "red"}, 422, "unprocessable"),
    ],
)
def test_a_key_that_cannot_be_is_refused(keyed: Server, body: dict[str, object], status: int, code: str) -> None:
    answer = keyed.http.post("/v1/keys", json=body)
    assert (answer.status_code, error_of(answer)["code"]) == (status, code)


def test_without_keys_any_key_is_ignored_until_an_operator_makes_one(make_server: Callable[..., Server]) -> None:
    server = make_server()
    wrong = ("authorization", "Bearer whatever")
    assert models_with(server, wrong).status_code == 200
    row = make(server, "admin")
    assert models_with(server, wrong).status_code == 401
    assert models_with(server).status_code == 401
    assert models_with(server, ("authorization", f"Bearer {row['key']}")).status_code == 200
    server.http.delete(f"/v1/keys/{row['id']}", headers={"authorization": f"Bearer {row['key']}"})
    assert models_with(server).status_code == 401, "revoking the last key opens nothing"


def test_a_server_with_keys_may_be_reached_from_other_machines(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="hotshoe keys create"):
        load_settings(home=tmp_path, host="0.0.0.0")  # noqa: S104 - nothing listens
    registry = Registry.open(tmp_path)
    registry.add_key(NewKey("default", ["admin"]), load_pepper(tmp_path), actor="me")
    registry.close()
    assert load_settings(home=tmp_path, host="0.0.0.0").is_keyless  # noqa: S104 - nothing listens
