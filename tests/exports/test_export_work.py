"""Orders that would give the same files are one piece of work of their tenant; tenants take turns and have limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from adapters.bases import BaseModel, load_base
from adapters.limits import UseLimits
from tests.exports.test_exports import ended, hidden, ordered, result_of
from tests.fixtures.bases import tiny_qwen2
from tests.fixtures.jobs import words_of
from tests.fixtures.service import Server, error_of, eventually, running
from tests.server.test_tenants import Team


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base(tiny_qwen2(tmp_path_factory.mktemp("base") / "tiny-qwen2"))


@pytest.fixture(scope="module")
def server(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(base, tmp_path_factory.mktemp("server"), api_key="a-key-of-the-operator") as server:
        server.pushed("router")
        yield server


@pytest.fixture
def counted(server: Server) -> Callable[[], int]:
    """How many pieces of work were done since."""
    before = runs(server)
    return lambda: runs(server) - before


def runs(server: Server) -> int:
    return int(sum(server.metric("hotshoe_export_runs_total", outcome=one) for one in ("succeeded", "failed")))


def children() -> list[int]:
    """Processes that export now."""
    return [one.pid for one in psutil.Process().children() if "adapters.export" in words_of(one)]


def test_the_same_export_asked_many_times_at_once_is_one_piece_of_work(
    server: Server, counted: Callable[[], int]
) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = [row["id"] for row in pool.map(lambda _: ordered(server), range(8))]
    assert len(set(ids)) == 8, "each order is its own"
    rows = [ended(server, one) for one in ids]
    assert {row["status"] for row in rows} == {"succeeded"} and counted() == 1
    assert len({str(row["files"]) for row in rows}) == 1 and len({result_of(server, one) for one in ids}) == 1
    later = ordered(server, "router@stable")
    assert (later["status"], later["progress"], later["files"]) == ("succeeded", 1.0, rows[0]["files"])
    assert counted() == 1, "its result was there"
    for one in ids:
        assert server.http.delete(f"/v1/exports/{one}").status_code == 200
    assert server.http.get(f"/v1/exports/{later['id']}/content").status_code == 200, "the last one that has it"
    result = result_of(server, later["id"])
    assert server.http.delete(f"/v1/exports/{later['id']}").status_code == 200
    assert not result.exists()


def test_another_option_or_version_is_another_piece_of_work(server: Server) -> None:
    server.pushed("other")
    rows = [ordered(server), ordered(server, dtype="float16"), ordered(server, parity=True), ordered(server, "other")]
    assert len({result_of(server, row["id"]) for row in rows}) == 4
    for row in rows:
        assert server.http.post(f"/v1/exports/{row['id']}/cancel").status_code == 200


def test_cancelling_an_order_lets_the_work_go_on_for_the_others_and_the_last_one_ends_it(
    server: Server, counted: Callable[[], int]
) -> None:
    first, second = (ordered(server, dtype="bfloat16")["id"] for _ in range(2))
    eventually(lambda: bool(children()), 120)
    third = ordered(server, dtype="bfloat16")
    assert third["status"] == "running", "it joins the work under way"
    for one in (first, second):
        assert server.http.post(f"/v1/exports/{one}/cancel").json()["status"] == "cancelled"
    assert ended(server, third["id"])["status"] == "succeeded" and counted() == 1
    assert [ended(server, one)["status"] for one in (first, second)] == ["cancelled", "cancelled"]
    only = ordered(server, dtype="float16")["id"]
    eventually(lambda: bool(children()), 120)
    assert server.http.delete(f"/v1/exports/{only}").status_code == 409
    server.http.post(f"/v1/exports/{only}/cancel")
    eventually(lambda: children() == [] and hidden(server) == [] and not result_of(server, only).exists())
    assert counted() == 1


def test_another_tenants_same_bytes_are_work_of_its_own(server: Server, counted: Callable[[], int]) -> None:
    """Whether somebody else has the same adapter shows neither in an answer nor in the time that it takes."""
    one, two = (Team(server, name, "upload", "export") for name in ("acme", "rival"))
    digests, results = set(), set()
    for team, name in ((one, "acme"), (two, "rival")):
        assert team.push(server, "router", seed=4242).json()["status"] == "ready"
        digests.add(team.http.get("/v1/adapters/router/versions/1").json()["digest"])
        row = team.http.post("/v1/exports", json={"model": "router", "parity": False}).json()
        assert row["status"] == "queued"
        eventually(lambda: team.http.get(f"/v1/exports/{row['id']}").json()["status"] == "succeeded", 240)  # noqa: B023
        results.add(result_of(server, row["id"], name))
    assert len(digests) == 1 and len(results) == 2 and counted() == 2


def test_a_flood_of_one_tenant_costs_another_the_wait_for_one_export(server: Server) -> None:
    flood, quiet = (Team(server, name, "upload", "export") for name in ("flood", "quiet"))
    for team in (flood, quiet):
        assert team.push(server, "router").json()["status"] == "ready"

    def order(team: Team, **body: Any) -> str:
        return str(team.http.post("/v1/exports", json={"model": "router", "parity": False, **body}).json()["id"])

    flooded = [order(flood, dtype=dtype) for dtype in ("float32", "float16", "bfloat16", None)]
    theirs = order(quiet)

    def finished(team: Team, one: str) -> float:
        tenant = "flood" if team is flood else "quiet"
        eventually(lambda: team.http.get(f"/v1/exports/{one}").json()["status"] == "succeeded", 240)
        return server.services.registry.get_export(tenant, one).started_at or 0.0

    begun = [finished(flood, one) for one in flooded]
    assert sum(at < finished(quiet, theirs) for at in begun) <= 1


def test_a_tenant_over_its_limits_is_told_so_with_the_figures(server: Server) -> None:
    team, registry = Team(server, "small", "upload", "export"), server.services.registry
    assert team.push(server, "router").json()["status"] == "ready"
    registry.add_tenant("small", UseLimits(export_bytes=1000), actor="operator")
    refused = team.http.post("/v1/exports", json={"model": "router"})
    error = error_of(refused)
    assert (refused.status_code, error["code"], error["param"]) == (429, "quota_exceeded", "export_bytes")
    assert "of at most 1000" in error["message"] and refused.headers["x-should-retry"] == "false"
    registry.add_tenant("small", UseLimits(exports=0), actor="operator")
    assert error_of(team.http.post("/v1/exports", json={"model": "router"}))["param"] == "exports"
    registry.add_tenant("small", UseLimits(), actor="operator")
    row = team.http.post("/v1/exports", json={"model": "router", "parity": False}).json()
    eventually(lambda: team.http.get(f"/v1/exports/{row['id']}").json()["status"] == "succeeded", 240)
    (shown,) = [one for one in server.http.get("/v1/tenants").json()["data"] if one["id"] == "small"]
    size = team.http.get(f"/v1/exports/{row['id']}").json()["size_bytes"]
    assert shown["export_bytes"] == size
    estimate = registry.get_export("small", row["id"])
    assert estimate.bytes_done == estimate.bytes_total > 0


def test_an_export_says_how_far_it_is_in_stages_and_bytes(server: Server) -> None:
    row = ordered(server, model="router@1", dtype="float32")
    seen: list[dict[str, Any]] = []

    def is_over() -> bool:
        seen.append(server.http.get(f"/v1/exports/{row['id']}").json())
        return seen[-1]["status"] not in ("queued", "running")

    eventually(is_over, 240)
    assert (seen[0]["stage"], seen[-1]["stage"], seen[-1]["status"]) == (None, "done", "succeeded")
    assert [one["progress"] for one in seen] == sorted(one["progress"] for one in seen)
    assert [one["bytes_done"] for one in seen] == sorted(one["bytes_done"] for one in seen)
    assert seen[-1]["bytes_done"] == seen[-1]["bytes_total"] > 0
    text = server.http.get("/metrics").text
    assert 'hotshoe_exports{status="queued"} 0.0' in text and "hotshoe_export_bytes" in text
