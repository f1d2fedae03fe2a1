"""Popularity, and loads ahead of requests: only where the engine is idle and nothing has to make room."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from server.popularity import MOST_KEYS, Popularity
from server.residency import Residency
from tests.fixtures.service import Server, eventually

ONE, TWO = ("default", "one", 1), ("default", "two", 1)


def test_half_of_a_score_is_forgotten_after_a_half_life() -> None:
    popularity = Popularity(half_life_seconds=10.0)
    for _ in range(4):
        popularity.note(ONE, 0.0)
    popularity.note(TWO, 20.0)
    assert popularity.score(ONE, 20.0) == pytest.approx(1.0)
    popularity.note(ONE, 20.0)
    assert popularity.score(ONE, 30.0) == pytest.approx(1.0)
    assert popularity.ranking(20.0) == [ONE, TWO]
    assert popularity.ranking(20.0, least=1.5) == [ONE]
    popularity.forget(ONE)
    assert popularity.ranking(20.0) == [TWO]


def test_more_versions_than_are_remembered_leave_the_popular_ones() -> None:
    popularity = Popularity(10.0)
    popularity.note(ONE, 0.0)
    popularity.note(ONE, 0.0)
    for number in range(MOST_KEYS):
        popularity.note(("default", "many", number), 0.0)
    assert popularity.ranking(0.0)[0] == ONE
    assert len(popularity.ranking(0.0)) <= MOST_KEYS


def asked(server: Server, name: str, times: int) -> None:
    for _ in range(times):
        assert server.say(name).status_code == 200


def cold(server: Server, name: str) -> None:
    server.call(server.services.residents._leave(server.services.registry.get("default", name, 1)))


def residency(server: Server, name: str) -> str:
    return str(server.http.get(f"/v1/adapters/{name}/versions/1").json()["residency"])


def test_the_most_popular_absent_version_is_loaded_while_nothing_else_happens(
    make_server: Callable[..., Server],
) -> None:
    server = make_server(slots=2, staged_limit=2)
    for name, times in (("rare", 1), ("liked", 2), ("loved", 3)):
        server.pushed(name)
        asked(server, name, times)
    look = server.services.warm_ahead.look
    assert server.call(look()) is None, "there is no room, and none is made"
    for name in ("rare", "liked", "loved"):
        cold(server, name)
    assert [version and version.name for version in (server.call(look()) for _ in range(3))] == ["loved", "liked", None]
    assert [residency(server, name) for name in ("rare", "liked", "loved")] == ["absent", "resident", "resident"]


def test_what_cannot_be_loaded_is_not_tried_again_until_it_is_asked_for(make_server: Callable[..., Server]) -> None:
    server = make_server()
    server.pushed("damaged")
    asked(server, "damaged", 2)
    cold(server, "damaged")
    version = server.services.registry.get("default", "damaged", 1)
    assert version.digest is not None
    weights = server.services.store.folder(version.digest) / "adapter_model.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(weights.read_bytes()[:-4])
    before = server.metric("hotshoe_adapter_loads_total", outcome="damaged") or 0
    assert [server.call(server.services.warm_ahead.look()) for _ in range(2)] == [None, None]
    assert server.metric("hotshoe_adapter_loads_total", outcome="damaged") == before + 1


def test_it_is_off_unless_it_is_set(make_server: Callable[..., Server]) -> None:
    assert make_server().services.warm_ahead._task is None


def test_a_server_with_it_loads_by_itself(make_server: Callable[..., Server]) -> None:
    server = make_server(warm_ahead=True)
    server.pushed("liked")
    asked(server, "liked", 2)
    cold(server, "liked")
    assert server.services.residents.state_of(server.services.registry.get("default", "liked", 1)) is Residency.ABSENT
    eventually(lambda: residency(server, "liked") == "resident", 15)
