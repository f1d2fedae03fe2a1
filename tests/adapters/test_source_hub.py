"""The Hub, at commits only: three requests for one adapter, each file bounded and held to its digest."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.bases import BaseModel
from adapters.errors import InvalidRequest, NotFound, PayloadTooLarge, SourceUnavailable
from adapters.sources.found import check_fetchable
from adapters.sources.hub import HubOrganisation
from tests.fixtures.adapters import CONFIG_FILE, WEIGHTS_FILE, write_adapter
from tests.fixtures.remotes import Hub, Remote, remote

COMMIT = "a09a35458c702b33eeacc393d103063234e8bc28"
STOP = threading.Event()


@pytest.fixture
def hub(tiny: BaseModel, tmp_path: Path) -> Iterator[Remote]:
    with remote(Hub) as one:
        one.commit = COMMIT
        one.put("acme/router-lora", write_adapter(tmp_path / "made", tiny))
        one.objects["acme/router-lora/README.md"] = b"# Router"
        one.objects["acme/router-lora/training_args.bin"] = b"a pickle"
        yield one


@pytest.fixture
def taken(tmp_path: Path) -> Path:
    (tmp_path / "taken").mkdir()
    return tmp_path / "taken"


def test_only_the_files_of_an_adapter_are_fetched_at_the_commit(hub: Remote, taken: Path) -> None:
    source = HubOrganisation("hf://acme", hub.url, "the-token")
    assert source.look() == []
    inner = source.inner(f"hf://acme/router-lora@{COMMIT}")
    assert inner == f"router-lora@{COMMIT}"
    found = source.find(inner)
    assert (found.name, found.location) == ("router-lora", f"hf://acme/router-lora@{COMMIT}")
    source.fetch(found, taken, STOP)
    assert sorted(path.name for path in taken.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    assert (taken / WEIGHTS_FILE).read_bytes() == hub.objects[f"acme/router-lora/{WEIGHTS_FILE}"]
    paths = [path.partition("?")[0] for _, path, _ in hub.asked]
    assert not [path for path in paths if "README" in path or "training_args" in path]


def test_the_token_stays_at_the_endpoint(hub: Remote, taken: Path) -> None:
    source = HubOrganisation(f"hf://acme/router-lora@{COMMIT}", hub.url, "the-token")
    source.fetch(source.look()[0], taken, STOP)
    for _, path, headers in hub.asked:
        is_elsewhere = path.startswith("/cdn/")
        assert ("authorization" in headers) is not is_elsewhere, path
    assert hub.gets("/cdn/")


@pytest.mark.parametrize("revision", ["", "@main", "@v1.0", "@a09a354", "@" + COMMIT.upper(), "@" + COMMIT + "0"])
def test_a_revision_that_can_move_is_refused_with_the_reason(revision: str) -> None:
    with pytest.raises(InvalidRequest, match="moves"):
        HubOrganisation("hf://acme").inner(f"hf://acme/router-lora{revision}")
    with pytest.raises(InvalidRequest, match="moves"):
        HubOrganisation(f"hf://acme/router-lora{revision}")


def test_another_organisation_or_another_pin_is_nothing_of_the_source() -> None:
    assert HubOrganisation("hf://acme").inner(f"hf://acme2/router@{COMMIT}") is None
    pinned = HubOrganisation(f"hf://acme/router@{COMMIT}")
    assert pinned.inner(f"hf://acme/router@{COMMIT}") == f"router@{COMMIT}"
    assert pinned.inner(f"hf://acme/other@{COMMIT}") is None


def test_sizes_are_known_before_and_held_to_while_bytes_come(hub: Remote, taken: Path) -> None:
    source = HubOrganisation("hf://acme", hub.url)
    key = f"acme/router-lora/{WEIGHTS_FILE}"
    found = source.find(f"router-lora@{COMMIT}")
    with pytest.raises(PayloadTooLarge):
        check_fetchable(found, len(hub.objects[key]) - 1, 1 << 20)
    hub.objects[key] += b"more than was said"
    with pytest.raises(SourceUnavailable, match="longer"):
        source.fetch(found, taken, STOP)


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_bytes_that_are_not_what_the_listing_says_are_not_taken(hub: Remote, taken: Path, file: str) -> None:
    source = HubOrganisation("hf://acme", hub.url)
    found = source.find(f"router-lora@{COMMIT}")
    content = hub.objects[f"acme/router-lora/{file}"]
    hub.objects[f"acme/router-lora/{file}"] = bytes([content[0] ^ 1]) + content[1:]
    with pytest.raises(SourceUnavailable, match="did not come whole"):
        source.fetch(found, taken, STOP)


def test_what_is_not_there_what_refuses_and_what_fails_are_told_apart(hub: Remote) -> None:
    source = HubOrganisation("hf://acme", hub.url, "the-token")
    with pytest.raises(NotFound):
        source.find("router-lora@" + "1" * 40)
    for status, says in ((401, "check the token"), (403, "check the token"), (500, "answers 500")):
        hub.status = status
        with pytest.raises(SourceUnavailable, match=says) as caught:
            source.find(f"router-lora@{COMMIT}")
        assert "the-token" not in caught.value.message
    with pytest.raises(SourceUnavailable, match="cannot be reached"):
        HubOrganisation("hf://acme", "http://127.0.0.1:9").find(f"router-lora@{COMMIT}")


def test_an_answer_that_is_not_the_hubs_is_told_as_that(hub: Remote) -> None:
    hub.status = 200  # and nothing else
    with pytest.raises(SourceUnavailable, match="does not answer as the Hub does"):
        HubOrganisation("hf://acme", hub.url).find(f"router-lora@{COMMIT}")
