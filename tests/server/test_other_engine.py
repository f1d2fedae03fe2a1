"""The same state under another base, number format, largest rank or engine version.

Nothing is lost, nothing is answered by what was not proven here, and every refusal says why and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adapters.bases import BaseModel
from adapters.doctor import run_doctor
from adapters.registry import Registry
from adapters.types import DEFAULT_TENANT, STABLE, Candidate
from server.app import build_engine
from server.engine.scripted import ScriptedEngine
from server.engine.scripted_models import Script
from server.settings import Settings
from tests.fixtures.adapters import shape_only_base
from tests.fixtures.service import Server, error_of, eventually, running

WHERE = (DEFAULT_TENANT, "router")


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A base of another size, under another name."""
    return shape_only_base(tmp_path_factory.mktemp("base") / "Other-3B", hidden_size=32)


@contextmanager
def engine_of(base: BaseModel, scratch: Path, script: Script | None = None, **settings: Any) -> Iterator[Server]:
    """A server on the state in `scratch`/home whose engine behaves as the script says from its start on."""
    values: dict[str, Any] = {"home": scratch / "home", "base": str(base.folder), "engine": "scripted", **settings}
    engine = build_engine(Settings(**values), base)
    assert isinstance(engine, ScriptedEngine)
    engine.script = script or Script()
    with running(base, scratch, on=engine, **settings) as server:
        yield server


def proof(server: Server, number: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = server.http.get(f"/v1/adapters/router/versions/{number}").json()["proof"]
    return found


def kinds(server: Server) -> list[str]:
    return [event["kind"] for event in server.http.get("/v1/adapters/router/events").json()["data"]]


def ls(server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    from server.cli.remote import ls as listed

    monkeypatch.setenv("HOTSHOE_URL", server.url)
    monkeypatch.setenv("COLUMNS", "200")
    capsys.readouterr()
    listed()
    return capsys.readouterr().out


def test_a_version_of_another_base_is_listed_and_exportable_and_refused_with_both_bases_named(
    tiny_base: BaseModel,
    other_base: BaseModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with engine_of(tiny_base, tmp_path) as server:
        server.pushed("router")
        server.pushed("router")
    with engine_of(other_base, tmp_path) as server:
        for model in ("router", "router@1", "router@stable"):
            answer = server.say(model)
            error = error_of(answer)
            assert (answer.status_code, error["code"]) == (409, "not_servable")
            for word in (tiny_base.id, tiny_base.digest, other_base.id, other_base.digest, "HOTSHOE_BASE", "--base"):
                assert word in error["message"], word
        assert server.promote("router", 2).status_code == 409
        assert server.http.post("/v1/adapters/router/versions/1/warm").status_code == 409
        row = server.http.get("/v1/adapters/router/versions/1").json()
        assert (row["status"], row["is_for_served_base"]) == ("ready", False)
        assert tiny_base.id in row["not_servable"]
        assert [one["id"] for one in server.http.get("/v1/models").json()["data"]] == [other_base.id]
        assert len(server.http.get("/v1/models?view=all").json()["data"]) == 2
        assert server.http.get("/v1/adapters/router/versions/1/files/adapter_config.json").status_code == 200
        shown = ls(server, capsys, monkeypatch)
        assert shown.count("ready, not served") == 2 and "not served: router@1 was made for another base" in shown
        server.pushed("second")
        assert server.say("second").status_code == 200
    report = run_doctor(tmp_path / "home")
    assert report.is_clean and len(report.notes) == 1
    assert report.notes[0].startswith("router@stable: router@1 was made for another base")
    with engine_of(tiny_base, tmp_path) as server:
        assert server.say("router").json()["model"] == "router@1"
        assert error_of(server.say("second"))["code"] == "not_servable"
        assert row["proof"] == proof(server)  # it was never tried on the other base


def test_with_its_own_base_given_a_version_of_another_base_is_exported_by_the_server(
    tiny_base: BaseModel, other_base: BaseModel, tmp_path: Path
) -> None:
    with engine_of(tiny_base, tmp_path) as server:
        server.pushed("router")
    with engine_of(other_base, tmp_path) as server:
        refused = server.http.post("/v1/exports", json={"model": "router@1", "parity": False})
        assert (refused.status_code, error_of(refused)["code"]) == (422, "base_mismatch")
        assert "merge_base" in error_of(refused)["message"]
    with engine_of(other_base, tmp_path, merge_base=str(tiny_base.folder)) as server:
        assert server.http.post("/v1/exports", json={"model": "router@1", "parity": False}).status_code in (201, 202)


@pytest.mark.parametrize("change", ["engine_version", "dtype"])
def test_another_engine_version_or_number_format_proves_what_was_loaded_again_before_it_is_ready(
    tiny_base: BaseModel, tmp_path: Path, change: str
) -> None:
    with engine_of(tiny_base, tmp_path) as server:
        server.pushed("router")
        first = proof(server)
        assert (first["engine_version"], first["dtype"]) == ("scripted 1", "float32")
    with engine_of(tiny_base, tmp_path) as server:
        assert (proof(server), kinds(server).count("proof_renewed")) == (first, 0)  # the same engine: nothing to do
    script = Script(engine_version="scripted 2") if change == "engine_version" else Script()
    settings = {"dtype": "bfloat16"} if change == "dtype" else {}
    with engine_of(tiny_base, tmp_path, script, **settings) as server:
        renewed = proof(server)
        assert renewed[change] == ("scripted 2" if change == "engine_version" else "bfloat16")
        assert renewed["is_proven"] and renewed["proved_at"] > first["proved_at"]
        assert kinds(server).count("proof_renewed") == 1
        assert server.say("router").status_code == 200
        assert server.metric("hotshoe_adapter_proofs_total", outcome="proven") == 1


def test_a_version_that_was_not_loaded_is_proven_again_by_the_first_request_that_names_it(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    with engine_of(tiny_base, tmp_path, staged_limit=1, slots=1) as server:
        server.pushed("router")
        server.pushed("other")  # the first leaves for it
    with engine_of(tiny_base, tmp_path, Script(engine_version="scripted 2"), staged_limit=1, slots=1) as server:
        assert proof(server)["engine_version"] == "scripted 1"
        assert server.say("router").status_code == 200
        assert proof(server)["engine_version"] == "scripted 2"


def test_a_proof_that_fails_on_a_new_engine_demotes_nothing_and_nothing_is_answered_by_it(
    tiny_base: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_of(tiny_base, tmp_path) as server:
        server.pushed("router")
        server.pushed("router")
        server.http.put("/v1/adapters/router/aliases/stable", json={"candidate": 2, "share": 0.5})
        first = proof(server)
    with engine_of(tiny_base, tmp_path, Script(engine_version="scripted 2", is_inert=True)) as server:
        aliases = server.http.get("/v1/adapters/router").json()["aliases"]
        assert [(one["alias"], one["version"], one["candidate"]) for one in aliases] == [(STABLE, 1, 2)]
        answer = server.say("router")
        error = error_of(answer)
        assert (answer.status_code, error["code"]) == (409, "not_servable")
        for word in ("scripted 1 in float32", "scripted 2 in float32", "no_effect", "changes nothing", "/warm"):
            assert word in error["message"], word
        assert server.call(server.engine.loaded()) == []
        row = server.http.get("/v1/adapters/router/versions/1").json()
        assert (row["status"], row["proof"]["is_proven"], row["proof"]["before"]) == ("ready", False, first)
        assert "ready, not served" in ls(server, capsys, monkeypatch)
        assert server.say(tiny_base.id).status_code == 200
        server.script.is_inert = False  # the engine is mended: tried again, it is proven, and answers at once
        assert server.http.post("/v1/adapters/router/versions/1/warm").status_code == 200
        assert server.say("router@1").status_code == 200
        assert "before" not in proof(server)
        assert server.say("router", user="x").status_code == 200  # a candidate that may not answer gets no share
    assert run_doctor(tmp_path / "home").notes == ()


def test_back_on_the_engine_of_its_first_proof_a_version_answers_again(tiny_base: BaseModel, tmp_path: Path) -> None:
    with engine_of(tiny_base, tmp_path) as server:
        server.pushed("router")
    with engine_of(tiny_base, tmp_path, Script(engine_version="scripted 2", is_inert=True)) as server:
        assert server.say("router").status_code == 409
        assert server.promote("router", 1).status_code == 409
    (note,) = run_doctor(tmp_path / "home").notes
    assert "no_effect" in note and note.startswith("router@stable")
    with engine_of(tiny_base, tmp_path) as server:
        assert server.say("router").json()["model"] == "router@1"
        assert proof(server)["is_proven"]


def test_a_rank_above_a_lowered_limit_is_refused_with_rank_and_limit_and_serves_again_when_it_is_raised(
    tiny_base: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_of(tiny_base, tmp_path) as server:
        server.pushed("router", rank=16)
        first = proof(server)
    with engine_of(tiny_base, tmp_path, max_rank=8) as server:
        answer = server.say("router")
        error = error_of(answer)
        assert (answer.status_code, error["code"]) == (409, "not_servable")
        assert "rank 16, above 8" in error["message"] and "HOTSHOE_MAX_RANK=16" in error["message"]
        assert "rank 16, above 8" in ls(server, capsys, monkeypatch)
        assert server.http.get("/v1/adapters/router").json()["stable"] == 1
    assert "rank 16, above 8" in run_doctor(tmp_path / "home").notes[0]
    with engine_of(tiny_base, tmp_path) as server:
        assert server.say("router").status_code == 200
        assert proof(server) == first


def test_what_was_export_only_for_its_rank_alone_is_proven_once_the_limit_is_raised(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    with engine_of(tiny_base, tmp_path, max_rank=8) as server:
        kept = server.push("router", server.adapter(rank=16)).json()
        assert (kept["status"], kept["reasons"][0]["code"]) == ("export_only", "rank_too_large")
        dora = server.push("dora", server.adapter(rank=16, config={"use_dora": True})).json()
        assert dora["status"] == "export_only"
    with engine_of(tiny_base, tmp_path, max_rank=16) as server:
        eventually(lambda: server.http.get("/v1/adapters/router/versions/1").json()["status"] == "ready")
        row = server.http.get("/v1/adapters/router/versions/1").json()
        assert (row["reasons"], row["aliases"]) == ([], [STABLE])
        assert server.say("router").status_code == 200
        assert server.http.get("/v1/adapters/dora/versions/1").json()["status"] == "export_only"


def test_what_waits_for_its_proof_is_not_rejected_by_a_limit_that_was_lowered(
    tiny_base: BaseModel, other_base: BaseModel, tmp_path: Path
) -> None:
    with engine_of(tiny_base, tmp_path) as server:
        server.pushed("router")
        server.script.seconds_to_load = 30.0
        server.push("waiting", server.adapter(rank=16), wait=0)
    for base, settings in ((tiny_base, {"max_rank": 8}), (other_base, {})):
        with engine_of(base, tmp_path, **settings) as server:
            server.push("marker")  # proofs go one after the other: those of the start are over
            row = server.http.get("/v1/adapters/waiting/versions/1").json()
            assert row["status"] == "quarantined"
            assert "rank 16" in row["not_servable"] or "another base" in row["not_servable"]
    with engine_of(tiny_base, tmp_path) as server:
        eventually(lambda: server.http.get("/v1/adapters/waiting/versions/1").json()["status"] == "ready")


def test_a_candidate_that_may_not_answer_here_gets_none_of_the_requests(tiny_base: BaseModel, tmp_path: Path) -> None:
    with engine_of(tiny_base, tmp_path) as server:
        server.pushed("router")
        server.pushed("router", rank=16)
    registry = Registry.open(tmp_path / "home")
    registry.set_candidate(*WHERE, STABLE, Candidate(2, 0.99), expected_generation=None, actor="x")
    registry.close()
    with engine_of(tiny_base, tmp_path, max_rank=8) as server:
        assert {server.say("router", user=f"u{i}").json()["model"] for i in range(20)} == {"router@1"}
