"""Residency is desired state: what is loaded again before /ready, what is not, and where it is said."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from adapters.servable import Servable
from adapters.types import AdapterVersion, VersionStatus
from server.restoring import Key, Plan, key_of, plan_restore
from tests.fixtures.adapters import TINY, shape_only_base
from tests.fixtures.service import Server, error_of, eventually

MakeServer = Callable[..., Server]
SERVABLE = Servable("sha256:here", "tiny", max_rank=16)


def row(name: str, number: int = 1, *, rank: int = 8, base: str = "sha256:here", age: float = 0.0) -> AdapterVersion:
    return AdapterVersion(
        "default", name, number, VersionStatus.READY, "sha256:x", base, rank, 10, None, created_at=1000.0 - age
    )


def refs(plan: Plan) -> list[str]:
    return [version.ref for version in plan.wanted]


def planned(warm: Sequence[AdapterVersion], named: set[Key] | None = None) -> Plan:
    return plan_restore(warm, named or set(), 2, SERVABLE.misfit)


def test_what_has_room_is_all_wanted() -> None:
    plan = planned([row("a"), row("b")])
    assert set(refs(plan)) == {"a@1", "b@1"} and not plan.left_out


def test_where_not_all_have_room_named_ones_come_first_and_then_the_newest() -> None:
    warm = [row("old", age=30), row("named", age=40), row("new", age=10), row("middle", age=20)]
    plan = planned(warm, {key_of(warm[1])})
    assert refs(plan) == ["named@1", "new@1"]
    assert set(plan.left_out) == {key_of(warm[0]), key_of(warm[3])}
    message = plan.left_out[key_of(warm[0])].message
    assert "4 versions" in message and "2 have room" in message and "HOTSHOE_STAGED_LIMIT" in message


def test_another_base_or_a_rank_too_high_takes_no_room_and_is_said() -> None:
    warm = [row("foreign", base="sha256:there"), row("large", rank=32), row("a"), row("b")]
    plan = planned(warm)
    assert set(refs(plan)) == {"a@1", "b@1"}
    assert "sha256:there" in plan.left_out[key_of(warm[0])].message
    large = plan.left_out[key_of(warm[1])]
    assert large.code == "not_servable" and "rank 32" in large.message and "above 16" in large.message


def loaded(server: Server) -> set[str]:
    return {one.engine_name for one in server.call(server.engine.loaded())}


def why(server: Server, model: str) -> dict[str, str]:
    """What /v1/system says of a version that is not back."""
    rows = {one["id"]: one for one in server.http.get("/v1/system").json()["adapters"]}
    assert rows[model]["place"] == "absent" and rows[model]["is_warm"]
    found: dict[str, str] = rows[model]["why_not_back"]
    return found


def stopped(server: Server) -> Path:
    server.stop()
    return server.services.settings.home


def test_damaged_files_do_not_keep_the_server_from_being_ready_and_are_said(make_server: MakeServer) -> None:
    server = make_server()
    for name in ("whole", "damaged"):
        server.pushed(name)
    version = server.services.registry.get("default", "damaged", 1)
    home = stopped(server)
    weights = server.services.store.folder(str(version.digest)) / "adapter_model.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    again = make_server(home=home)
    assert loaded(again) == {"whole@1"}
    assert why(again, "damaged@1")["code"] == "storage_damaged"
    answer = again.say("damaged")
    assert (answer.status_code, error_of(answer)["code"]) == (500, "storage_damaged")
    assert again.say("whole").json()["model"] == "whole@1"


def test_files_that_are_gone_do_not_either(make_server: MakeServer) -> None:
    server = make_server()
    for name in ("whole", "gone"):
        server.pushed(name)
    version = server.services.registry.get("default", "gone", 1)
    home = stopped(server)
    server.services.store.delete(str(version.digest))
    again = make_server(home=home)
    assert loaded(again) == {"whole@1"}
    assert why(again, "gone@1")["code"] == "not_found"


def test_versions_of_another_base_wait_for_it(make_server: MakeServer, tmp_path: Path) -> None:
    server = make_server()
    server.pushed("old")
    home = stopped(server)
    other = make_server(shape_only_base(tmp_path / "other", **(TINY | {"num_hidden_layers": 3})), home=home)
    assert loaded(other) == set()
    found = why(other, "old@1")
    assert found["code"] == "not_servable" and "another base" in found["message"]
    stopped(other)
    back = make_server(home=home)
    assert loaded(back) == {"old@1"}


def test_a_rank_over_a_lowered_limit_is_left_out_unburnt_and_back_when_it_is_raised(make_server: MakeServer) -> None:
    server = make_server()
    server.pushed("small", rank=2)
    server.pushed("large", rank=8)
    engine_id = server.services.registry.engine_id("default", "large", 1)
    home = stopped(server)
    lowered = make_server(home=home, max_rank=4)
    assert loaded(lowered) == {"small@1"}
    assert "rank 8" in why(lowered, "large@1")["message"]
    stopped(lowered)
    back = make_server(home=home)
    assert loaded(back) == {"small@1", "large@1"}
    assert back.services.registry.engine_id("default", "large", 1) == engine_id


def test_a_lowered_staged_limit_brings_back_what_aliases_name(make_server: MakeServer) -> None:
    server = make_server()
    server.pushed("router")
    for _ in range(2):
        server.pushed("router")  # 2 and 3 are newer, and no alias names them
    server.pushed("other")
    home = stopped(server)
    lowered = make_server(home=home, slots=2, staged_limit=2)
    assert loaded(lowered) == {"router@1", "other@1"}
    found = why(lowered, "router@3")
    assert found["code"] == "engine_busy" and "HOTSHOE_STAGED_LIMIT" in found["message"]
    assert lowered.say("router@3").json()["model"] == "router@3"
    rows = {one["id"]: one for one in lowered.http.get("/v1/system").json()["adapters"]}
    assert rows["router@3"]["why_not_back"] is None, "it is loaded now"


def test_a_locked_registry_delays_readiness_and_does_not_end_it(make_server: MakeServer) -> None:
    server = make_server()
    server.pushed("wanted")
    lock = sqlite3.connect(server.services.settings.home / "registry.sqlite3", check_same_thread=False)
    lock.execute("BEGIN EXCLUSIVE")
    try:
        server.call(server.engine.crash())
        eventually(server.engine.is_ready)
        assert server.http.get("/ready").status_code == 503
        timer = threading.Timer(7.0, lock.rollback)  # past the five seconds that the registry waits itself
        timer.start()
        timer.join()
    finally:
        lock.close()
    eventually(lambda: server.http.get("/ready").status_code == 200, 20)
    assert loaded(server) == {"wanted@1"}
