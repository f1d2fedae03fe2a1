"""The key that a first start prints: once, to whoever started the server, and no end of the keyless time by itself."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from adapters.bases import BaseModel
from adapters.errors import ConfigInvalid
from adapters.keys import BOOTSTRAP_ID, NewKey, home_has_keys, key_digest, load_pepper
from adapters.registry import Registry
from server.settings import load_settings
from tests.fixtures.processes import Served


def printed_key(served: Served) -> str | None:
    lines = [line.split("first key: ")[1] for line in served.out.read_text().splitlines() if "first key: " in line]
    return lines[0] if lines else None


def status(served: Served, key: str | None = None, path: str = "/v1/keys") -> int:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.get(f"{served.url}{path}", headers=headers).status_code


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def scripted(base: BaseModel, home: Path, *flags: str, **env: str) -> Served:
    return Served(home, "--engine", "scripted", "--base", str(base.folder), *flags, HOTSHOE_LOG_LEVEL="debug", **env)


def test_the_first_start_prints_a_key_once_and_stores_only_its_keyed_hash(tiny_base: BaseModel, home: Path) -> None:
    served = scripted(tiny_base, home)
    try:
        key = printed_key(served)
        assert key is not None and key.startswith("hs-") and len(key) == 51
        assert status(served) == 200, "keyless as before: the printed key alone turns nothing off"
        assert status(served, "a wrong one") == 200
        served.stop()
        served.start()
        assert printed_key(served) is None
        assert status(served) == 200
        made = httpx.post(f"{served.url}/v1/keys", json={"scopes": ["infer"]}).json()
        assert status(served) == 401 and status(served, made["key"]) == 403
        assert status(served, key) == 200, "from the first key of the operator's on it is the way back in"
        assert (
            httpx.delete(f"{served.url}/v1/keys/{BOOTSTRAP_ID}", headers={"authorization": f"Bearer {key}"}).json()[
                "id"
            ]
            == BOOTSTRAP_ID
        )
        assert status(served, key) == 401
    finally:
        served.end()
    for path in (served.err, *(file for file in home.rglob("*") if file.is_file())):
        assert key.encode() not in path.read_bytes(), f"{path} holds the key"


def test_none_is_made_where_the_operator_has_given_or_made_one(tiny_base: BaseModel, home: Path) -> None:
    served = scripted(tiny_base, home, HOTSHOE_API_KEY="a-key-of-the-operator")
    try:
        assert printed_key(served) is None
        assert (
            httpx.get(f"{served.url}/v1/keys", headers={"authorization": "Bearer a-key-of-the-operator"}).json()["data"]
            == []
        )
    finally:
        served.end()
    registry = Registry.open(home)
    registry.add_key(NewKey("default", ["infer"]), load_pepper(home), actor="me")
    assert registry.add_bootstrap_key(load_pepper(home)) is None
    registry.close()


def test_it_is_an_admin_key_of_the_default_tenant_and_does_not_count_as_one_of_the_operators(tmp_path: Path) -> None:
    registry, pepper = Registry.open(tmp_path), load_pepper(tmp_path)
    secret = registry.add_bootstrap_key(pepper)
    assert secret is not None and registry.add_bootstrap_key(pepper) is None
    (row,) = registry.keys()
    assert (row.id, row.tenant, row.scopes, row.name) == (BOOTSTRAP_ID, "default", ("admin",), "bootstrap")
    assert registry.find_key(key_digest(pepper, secret.encode())) == row
    assert not registry.has_keys() and not home_has_keys(tmp_path)
    with pytest.raises(ConfigInvalid, match="hotshoe keys create"):
        load_settings(home=tmp_path, host="0.0.0.0")  # noqa: S104 - nothing listens
    registry.revoke_key(BOOTSTRAP_ID, actor="me")
    assert registry.add_bootstrap_key(pepper) is None, "not a second one"
    assert not registry.has_keys()
    registry.add_key(NewKey("default", ["infer"], name="bootstrap"), pepper, actor="me")
    assert registry.has_keys() and home_has_keys(tmp_path), "by its id, not by a name that anybody may take"
    registry.close()
