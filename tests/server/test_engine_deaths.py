"""F15: an engine that dies twice in a row with one version in hand is not given it again, whatever restarts between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from server.engine.base import EngineOptions
from server.engine.scripted import ScriptedEngine
from server.engine.scripted_models import Script
from tests.fixtures.service import Server, error_of, eventually

MakeServer = Callable[..., Server]


def crash_while_it_loads(server: Server, model: str) -> None:
    """Have the engine die while the version is being loaded."""
    server.script.seconds_to_load = 5.0
    row = "/v1/adapters/{}/versions/{}".format(*model.split("@"))
    server.call(warm(server, model))
    eventually(lambda: server.http.get(row).json()["residency"] == "staging")
    server.call(server.engine.crash())
    eventually(
        lambda: server.http.get(row).json()["engine_deaths"] > 0 or server.http.get(row).json()["status"] != "ready"
    )
    server.script.seconds_to_load = 0.0
    eventually(lambda: server.engine.is_ready())


async def warm(server: Server, model: str) -> None:
    name, _, number = model.partition("@")
    version = server.services.registry.get("default", name, int(number))
    server.services.lifecycle.spawn(server.services.residents.warm(version))


def cold(server: Server, model: str) -> None:
    """Out of the engine, and not wanted back by itself."""
    name, _, number = model.partition("@")
    server.services.registry.set_warm("default", name, int(number), False)
    server.call(server.services.residents._leave(server.services.registry.get("default", name, int(number))))


def test_deaths_while_it_is_proven_are_remembered_over_a_restart_of_the_server(make_server: MakeServer) -> None:
    server = make_server()
    server.script.seconds_to_first_token = 5.0
    server.push("deadly", wait=0)
    eventually(lambda: server.call(server.engine.usage()).running > 0)
    server.call(server.engine.crash())
    eventually(lambda: server.http.get("/v1/adapters/deadly/versions/1").json()["engine_deaths"] == 1)
    home = server.services.settings.home
    server.stop()
    options = EngineOptions(server.base.folder, server.base.id, home / "run")
    again = make_server(home=home, on=ScriptedEngine(options, Script(seconds_to_first_token=5.0)))
    eventually(lambda: again.call(again.engine.usage()).running > 0)
    again.call(again.engine.crash())
    row = again.http.get("/v1/adapters/deadly/versions/1", params={"wait": 10}).json()
    assert (row["status"], row["reasons"][0]["code"], row["engine_deaths"]) == ("rejected", "engine_died", 2)
    kinds = [event["kind"] for event in again.http.get("/v1/adapters/deadly/events").json()["data"]]
    assert kinds.count("engine_died") == 2


def test_a_ready_version_that_the_engine_dies_of_twice_is_quarantined_and_its_alias_rolled_back(
    make_server: MakeServer,
) -> None:
    server = make_server()
    server.pushed("router")
    server.pushed("router")
    server.promote("router", 2)
    cold(server, "router@2")
    crash_while_it_loads(server, "router@2")
    assert server.http.get("/v1/adapters/router/versions/2").json()["status"] == "ready"
    home = server.services.settings.home
    server.stop()
    again = make_server(home=home)
    crash_while_it_loads(again, "router@2")
    eventually(lambda: again.http.get("/ready").status_code == 200)
    row = again.http.get("/v1/adapters/router/versions/2").json()
    assert (row["status"], row["reasons"][0]["code"], row["engine_deaths"]) == ("quarantined", "engine_died", 2)
    assert again.say("router").json()["model"] == "router@1"
    answer = again.say("router@2")
    assert (answer.status_code, error_of(answer)["code"]) == (409, "not_servable")
    again.stop()
    last = make_server(home=home)  # and no restart proves it again
    assert last.push("router", wait=0).status_code == 201
    eventually(lambda: last.http.get("/v1/adapters/router/versions/3").json()["status"] == "ready")
    assert last.http.get("/v1/adapters/router/versions/2").json()["status"] == "quarantined"


def test_a_load_that_works_makes_an_earlier_death_forgotten(make_server: MakeServer) -> None:
    server = make_server()
    server.pushed("router")
    cold(server, "router@1")
    crash_while_it_loads(server, "router@1")
    assert server.http.get("/v1/adapters/router/versions/1").json()["engine_deaths"] == 1
    assert server.say("router").status_code == 200
    assert server.http.get("/v1/adapters/router/versions/1").json()["engine_deaths"] == 0


def test_a_server_that_stops_during_a_load_counts_no_death(make_server: MakeServer) -> None:
    server = make_server()
    server.pushed("router")
    cold(server, "router@1")
    server.script.seconds_to_load = 5.0
    server.call(warm(server, "router@1"))
    eventually(lambda: server.http.get("/v1/adapters/router/versions/1").json()["residency"] == "staging")
    home: Path = server.services.settings.home
    server.stop()
    again = make_server(home=home)
    assert again.http.get("/v1/adapters/router/versions/1").json()["engine_deaths"] == 0
