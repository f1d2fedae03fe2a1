"""Keys, tenants, grants, quotas and usage as rows."""

from __future__ import annotations

import stat
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from adapters import database
from adapters.database import Database
from adapters.errors import (
    ConfigInvalid,
    InvalidRequest,
    ModelNotFound,
    NameInvalid,
    NotFound,
    PayloadTooLarge,
    QuotaExceeded,
)
from adapters.keys import NewKey, home_has_keys, key_digest, load_pepper
from adapters.limits import UseLimits
from adapters.registry import NewVersion, Registry
from adapters.types import AdapterVersion, VersionStatus
from adapters.usage import COUNTS, UsageRow

PEPPER = b"p" * 32


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry.open(tmp_path)


def add(registry: Registry, tenant: str, name: str, number: int = 1, size_bytes: int = 100) -> AdapterVersion:
    digest = f"sha256:{tenant}{name}{number}".ljust(71, "0")[:71]
    return registry.add_version(NewVersion(name, tenant=tenant, digest=digest, base_digest="b", size_bytes=size_bytes))


def test_a_key_is_nowhere_in_the_registry_and_found_by_its_keyed_hash(registry: Registry, tmp_path: Path) -> None:
    row, secret = registry.add_key(NewKey("acme", ["upload"], name="ci"), PEPPER, actor="me")
    assert secret.startswith("hs-") and len(secret) == 51 and row.prefix == secret[:11]
    assert registry.find_key(key_digest(PEPPER, secret.encode())) == row
    assert registry.find_key(key_digest(b"q" * 32, secret.encode())) is None
    stored = (tmp_path / database.FILE).read_bytes()
    assert secret.encode() not in stored and secret[11:].encode() not in stored
    assert row.all_scopes == {"upload", "read"}
    assert registry.keys("acme") == [row] and registry.keys("other") == []


def test_a_key_ends_when_it_expires_or_is_revoked(registry: Registry) -> None:
    row, _ = registry.add_key(NewKey("acme", ["infer"], expires_at=time.time() + 60), PEPPER, actor="me")
    assert row.is_valid(time.time()) and not row.is_valid(time.time() + 61)
    revoked = registry.revoke_key(row.id, actor="me")
    assert not revoked.is_valid(time.time())
    assert registry.revoke_key(row.id, actor="me") == revoked
    with pytest.raises(NotFound):
        registry.revoke_key("key_none", actor="me")
    assert [event.kind for event in registry.events("acme")] == ["key_revoked", "key_added"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"scopes": []},
        {"scopes": ["everything"]},
        {"scopes": ["admin"]},
        {"scopes": ["infer", "metrics"]},
        {"scopes": ["infer"], "adapters": []},
        {"scopes": ["infer"], "adapters": ["../x"]},
        {"scopes": ["infer"], "limits": UseLimits(versions=1)},
        {"scopes": ["infer"], "name": "a b"},
    ],
)
def test_a_key_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises((InvalidRequest, NameInvalid)):
        NewKey("acme", **wrong)  # type: ignore[arg-type]


def test_only_the_operators_keys_see_every_tenant() -> None:
    assert NewKey("default", ["admin", "metrics"])


def test_a_registry_has_keys_from_the_first_on_also_when_all_are_revoked(registry: Registry, tmp_path: Path) -> None:
    assert not registry.has_keys() and not home_has_keys(tmp_path) and not home_has_keys(tmp_path / "nowhere")
    row, _ = registry.add_key(NewKey("default", ["admin"]), PEPPER, actor="me")
    registry.revoke_key(row.id, actor="me")
    assert registry.has_keys() and home_has_keys(tmp_path)


def test_the_pepper_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    found = [b""] * 8

    def make(i: int) -> None:
        found[i] = load_pepper(tmp_path)

    threads = [threading.Thread(target=make, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found[0]) == 64
    path = tmp_path / "pepper"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [item.name for item in tmp_path.iterdir()] == ["pepper"]
    path.chmod(0o640)
    with pytest.raises(ConfigInvalid, match="chmod 600"):
        load_pepper(tmp_path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(ConfigInvalid, match="32 or more"):
        load_pepper(tmp_path)


def test_i1_a_foreign_adapter_has_the_words_of_an_absent_one(registry: Registry) -> None:
    add(registry, "acme", "router")

    def said(tenant: str, name: str) -> list[str]:
        calls = (
            lambda: registry.get(tenant, name, 1),
            lambda: registry.versions(tenant, name),
            lambda: registry.retire(tenant, name, 1),
            lambda: registry.rollback(tenant, name, actor="x"),
            lambda: registry.move_alias(tenant, name, "stable", 1, expected_generation=None, actor="x"),
        )
        messages = []
        for call in calls:
            with pytest.raises(ModelNotFound) as found:
                call()
            messages.append(found.value.message)
        return messages

    foreign = said("other", "router")
    assert foreign == [text.replace("absent", "router") for text in said("other", "absent")]
    assert len(set(foreign)) == 1


def test_a_grant_is_explicit_named_once_and_ends(registry: Registry) -> None:
    add(registry, "acme", "router")
    with pytest.raises(NotFound):
        registry.add_grant("acme", "router", "nobody", actor="me")
    registry.add_tenant("other", actor="me")
    with pytest.raises(ModelNotFound):
        registry.add_grant("acme", "absent", "other", actor="me")
    with pytest.raises(InvalidRequest):
        registry.add_grant("acme", "router", "acme", actor="me")
    grant = registry.add_grant("acme", "router", "other", actor="me")
    assert registry.add_grant("acme", "router", "other", actor="me") == grant
    assert registry.grants(grantee="other") == [grant] == registry.grants(tenant="acme")
    assert registry.is_granted("acme", "router", "other") and not registry.is_granted("other", "router", "acme")
    registry.remove_grant("acme", "router", "other", actor="me")
    assert not registry.is_granted("acme", "router", "other")
    with pytest.raises(NotFound):
        registry.remove_grant("acme", "router", "other", actor="me")


def test_tenants_are_unique_regardless_of_case(registry: Registry) -> None:
    registry.add_tenant("acme", actor="me")
    with pytest.raises(InvalidRequest, match="only in case"):
        registry.add_tenant("Acme", actor="me")


def test_a_tenant_gets_exactly_the_versions_and_bytes_it_may_have(registry: Registry) -> None:
    registry.add_tenant("acme", UseLimits(versions=2, stored_bytes=250), actor="me")
    add(registry, "acme", "a", 1)
    with pytest.raises(PayloadTooLarge, match="100 bytes of at most 250"):
        add(registry, "acme", "b", 1, size_bytes=151)
    second = add(registry, "acme", "b", 1, size_bytes=150)
    with pytest.raises(QuotaExceeded):
        add(registry, "acme", "c", 1, size_bytes=0)
    assert add(registry, "acme", "b", 1, size_bytes=150).number == second.number, "the same files again cost nothing"
    add(registry, "other", "c", 1)
    registry.set_status("acme", "b", 1, VersionStatus.READY)
    registry.remove_alias("acme", "b", "stable", actor="me")
    registry.retire("acme", "b", 1)
    add(registry, "acme", "c", 1, size_bytes=150)
    found = registry.get_tenant("acme")
    assert (found.versions, found.stored_bytes, found.adapters) == (2, 250, 3)


@pytest.mark.parametrize("wrong", [{"speed": 1}, {"versions": -1}, {"versions": True}, {"versions": 1.5}])
def test_limits_are_whole_numbers_with_known_names(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        UseLimits.read(wrong)


def test_a_registry_of_the_first_schema_keeps_its_rows(tmp_path: Path) -> None:
    old = Database(tmp_path / database.FILE)
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).with_name("migrations")))
    config.set_main_option("path_separator", "os")
    with old.writing() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(text("INSERT INTO tenants VALUES ('default', 1.0), ('acme', 2.0)"))
        connection.execute(text("INSERT INTO adapters VALUES (1, 'acme', 'Router', 'router', 3.0)"))
        connection.execute(
            text(
                "INSERT INTO versions VALUES (1, 'acme', 1, 1, 'ready', 'sha256:a', 'sha256:b', 8, 100, NULL, 4.0, "
                "'[]', '[]', NULL, NULL, 1, NULL)"
            )
        )
        connection.execute(text("INSERT INTO aliases VALUES ('acme', 1, 'stable', 'stable', 1, 3, '[]')"))
        connection.execute(
            text("INSERT INTO events VALUES (7, 'acme', 5.0, 'promoted', 'Router', 1, NULL, 'me', '{}')")
        )
    assert not home_has_keys(tmp_path)
    old.close()
    registry = Registry.open(tmp_path)
    with registry.database.reading() as connection:
        assert database.revision(connection) == database.HEAD
    assert registry.get("acme", "Router", 1).size_bytes == 100
    assert registry.aliases("acme")[0].generation == 3
    assert [event.id for event in registry.events("acme")] == [7]
    assert registry.get_tenant("acme").limits == UseLimits() and registry.get_tenant("acme").versions == 1
    assert registry.keys() == [] and registry.usage() == []


ROWS = st.builds(
    UsageRow,
    tenant=st.sampled_from(["acme", "other"]),
    day=st.sampled_from(["2026-01-01", "2026-01-02"]),
    model=st.sampled_from(["a@1", "base"]),
    requests=st.integers(0, 5),
    prompt_tokens=st.integers(0, 2**40),
    completion_tokens=st.integers(0, 2**40),
    partial_requests=st.integers(0, 5),
    partial_completion_tokens=st.integers(0, 100),
)


@settings(max_examples=25, deadline=None)
@given(batches=st.lists(st.lists(ROWS, max_size=6), max_size=4))
def test_usage_adds_up_however_it_is_batched(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[UsageRow]]
) -> None:
    registry = Registry.open(tmp_path_factory.mktemp("usage"))
    expected: Counter[tuple[str, str, str, str]] = Counter()
    for batch in batches:
        registry.add_usage(batch)
        for row in batch:
            for name in COUNTS:
                expected[row.tenant, row.day, row.model, name] += getattr(row, name)
    found = {(row.tenant, row.day, row.model, name): getattr(row, name) for row in registry.usage() for name in COUNTS}
    assert found == expected
    assert registry.usage("acme", start="2026-01-02", end="2026-01-02", model="a@1") == [
        row for row in registry.usage() if (row.tenant, row.day, row.model) == ("acme", "2026-01-02", "a@1")
    ]
    registry.close()
