from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from adapters.errors import EngineBusy
from adapters.types import AdapterVersion
from server.residency import Residency
from tests.fixtures.service import Server, eventually


def version(server: Server, name: str, number: int = 1) -> AdapterVersion:
    return server.services.registry.get("default", name, number)


def loaded(server: Server) -> set[str]:
    return {one.engine_name for one in server.call(server.engine.loaded())}


def test_the_idle_version_whose_return_costs_least_makes_room(make_server: Callable[..., Server]) -> None:
    server = make_server(slots=2, staged_limit=2)
    for name in ("one", "two"):
        server.pushed(name)
    server.say("one")
    server.pushed("three")
    assert loaded(server) == {"one@1", "three@1"}
    assert not version(server, "two").is_warm and version(server, "three").is_warm
    assert server.metric("hotshoe_adapter_evictions_total") == 1
    server.say("three")
    server.say("three")
    assert server.say("two").json()["model"] == "two@1"  # loaded again by the request
    assert loaded(server) == {"two@1", "three@1"}, "three was asked for twice, and one but once and before"


def test_a_version_in_use_is_never_evicted_and_who_needs_its_place_waits(
    make_server: Callable[..., Server],
) -> None:
    server = make_server(slots=1, staged_limit=1)
    server.pushed("held")
    server.push("later", wait=0)
    eventually(lambda: version(server, "later").status == "ready")
    server.say("held")

    async def hold_and_ask() -> None:
        async with server.services.residents.holding(version(server, "held")):
            await server.services.residents.warm(version(server, "later"))

    with pytest.raises(EngineBusy):
        server.call(hold_and_ask())
    server.script.seconds_per_token = 0.05
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(server.events, "held", "w " * 40)
        eventually(lambda: server.services.door.admission.running == 1)
        server.script.seconds_per_token = 0.0
        assert server.say("later").status_code == 200
        assert held.done() and len(held.result()) > 40, "it was not cut short"
    assert loaded(server) == {"later@1"}


def test_who_asks_for_a_version_that_makes_room_has_it_back(
    make_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server(slots=2, staged_limit=2)
    names = ("one", "two", "three")
    for name in names:
        server.pushed(name)
    unload, may_leave = server.engine.unload, threading.Event()

    async def slow_unload(name: str) -> None:
        await asyncio.to_thread(may_leave.wait)
        await unload(name)

    def where(state: Residency) -> list[str]:
        return [name for name in names if server.services.residents.state_of(version(server, name)) is state]

    monkeypatch.setattr(server.engine, "unload", slow_unload)
    with ThreadPoolExecutor(2) as pool:
        try:
            comes = pool.submit(server.say, *where(Residency.ABSENT))
            eventually(lambda: where(Residency.DRAINING))
            [leaving] = where(Residency.DRAINING)
            returns = pool.submit(server.say, leaving)
            eventually(lambda: server.services.door.admission.running == 2)
            assert not returns.done(), "it waits for the version, which is told from one that nobody may use"
        finally:
            may_leave.set()
        assert [comes.result().status_code, returns.result().status_code] == [200, 200]
    assert f"{leaving}@1" in loaded(server) and version(server, leaving).is_warm


def test_requests_for_one_absent_version_share_its_load(make_server: Callable[..., Server]) -> None:
    server = make_server()
    server.pushed("cold")
    before = server.metric("hotshoe_adapter_loads_total", outcome="loaded")
    server.call(server.services.residents._leave(version(server, "cold")))
    assert loaded(server) == set()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: server.say("cold").status_code, range(8)))
    assert answers == [200] * 8
    assert server.metric("hotshoe_adapter_loads_total", outcome="loaded") == before + 1


def test_warm_loads_and_the_warm_set_is_desired_state(make_server: Callable[..., Server]) -> None:
    server = make_server()
    server.pushed("wanted")
    residents = server.services.residents
    server.call(residents._leave(version(server, "wanted")))
    assert residents.state_of(version(server, "wanted")) is Residency.ABSENT
    row = server.http.post("/v1/adapters/wanted/versions/1/warm").json()
    assert (row["residency"], row["is_warm"]) == ("resident", True) and row["load_seconds"] > 0


def test_a_version_whose_files_do_not_load_is_rejected_and_its_id_burnt(make_server: Callable[..., Server]) -> None:
    server = make_server()
    registry = server.services.registry
    server.engine.options = replace(server.engine.options, max_rank=2)
    server.call(server.engine.crash())
    eventually(lambda: server.http.get("/ready").status_code == 200)
    row = server.push("heavy", server.adapter(rank=4)).json()
    assert (row["status"], row["reasons"][0]["code"], row["residency"]) == ("rejected", "load_failed", "absent")
    assert registry.engine_id("default", "heavy", 1) > 1
    assert server.say(server.base.id).status_code == 200


def test_every_slot_busy_a_cold_adapter_is_served_in_its_turn(make_server: Callable[..., Server]) -> None:
    server = make_server(slots=1, staged_limit=4, patience_seconds=0.2)
    server.pushed("hot")
    server.pushed("cold")
    server.script.seconds_per_token = 0.02
    is_over = threading.Event()

    def keep_busy() -> None:
        while not is_over.is_set():
            server.say("hot", "w " * 10)

    threads = [threading.Thread(target=keep_busy) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
        eventually(lambda: server.services.door.admission.running > 0)
        answer = server.say("cold")
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert answer.json()["model"] == "cold@1"
    assert answer.elapsed.total_seconds() < 5


def test_system_tells_each_adapters_place_and_bytes(make_server: Callable[..., Server]) -> None:
    server = make_server(slots=1, staged_limit=4)
    for name in ("a", "b", "c"):
        server.pushed(name)
    server.call(server.services.residents._leave(version(server, "a")))
    rows = {row["id"]: row for row in server.http.get("/v1/system").json()["adapters"]}
    assert rows["a@1"]["place"] == "absent"
    assert {rows["b@1"]["place"], rows["c@1"]["place"]} <= {"staged", "resident"}
    assert all(row["size_bytes"] > 0 for row in rows.values())


def test_an_engine_that_dies_again_while_it_is_filled_is_brought_back_all_the_same(
    make_server: Callable[..., Server],
) -> None:
    server = make_server()
    for name in ("one", "two", "three"):
        server.pushed(name)
    for _ in range(2):  # the second while one of them is in hand; twice with the same one, it would be quarantined
        server.call(server.engine.crash(down_seconds=0.0))
        eventually(server.engine.is_ready)
    eventually(lambda: server.http.get("/ready").status_code == 200)
    eventually(lambda: loaded(server) == {"one@1", "two@1", "three@1"})
    assert [server.say(name).json()["model"] for name in ("one", "two", "three")] == ["one@1", "two@1", "three@1"]
