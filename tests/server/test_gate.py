"""The gate of an adapter: a version answers its rows, through the engine, before it becomes `stable`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from server.cli.client import ServerRefused
from server.cli.main import build_app
from server.cli.output import exit_code_of
from server.gate import Gate, shortfalls
from tests.fixtures.service import Server, error_of

runner = CliRunner()


def row(expected: str, asked: str = "hello") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}], "expected": expected}


def set_gate(server: Server, name: str, rows: list[dict[str, Any]], **wants: Any) -> httpx.Response:
    return server.http.put(f"/v1/adapters/{name}/gate", json={"rows": rows, **wants})


def two_versions(server: Server, name: str) -> None:
    server.pushed(name)
    server.pushed(name)


def kinds(server: Server, name: str) -> list[str]:
    return [event["kind"] for event in server.http.get(f"/v1/adapters/{name}/events").json()["data"]]


def test_a_promote_below_the_minimum_is_refused_with_both_figures_and_nothing_moves(server: Server) -> None:
    """The double answers `NAME@N heard: TEXT`, so that rows can ask for what one version alone says."""
    two_versions(server, "low")
    rows = [row("low@1 heard: hello"), row("low@1 heard: you", "you"), row("low@2 heard: hello"), row("neither")]
    about = set_gate(server, "low", rows, minimum=0.5, margin=0.1).json()
    assert (about["metric"], about["rows"], about["minimum"], about["margin"]) == ("exact_match", 4, 0.5, 0.1)
    assert "messages" not in json.dumps(server.http.get("/v1/adapters/low/gate").json())
    answer = server.promote("low", 2)
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (409, "gate_not_passed")
    assert "low@2 0.25, low@1 (stable) 0.5" in error["message"]
    assert "at least 0.5 is wanted and at most 0.1 below stable is allowed" in error["message"]
    assert server.say("low").json()["model"] == "low@1"
    proof = server.http.get("/v1/adapters/low/versions/2").json()["proof"]
    assert (proof["is_proven"], proof["gate"]["score"], proof["gate"]["unanswered"]) == (True, 0.25, 0)
    found = kinds(server, "low")
    assert "gate_refused" in found and found.count("gate_scored") == 2 and "promoted" in found


def test_a_promote_that_passes_says_its_figures_and_a_score_is_asked_for_once(server: Server) -> None:
    two_versions(server, "good")
    rows = [row("good@2 heard: hello")]
    set_gate(server, "good", rows, minimum=0.9, margin=0.0)
    moved = server.promote("good", 2).json()
    assert moved["version"] == 2
    assert (moved["gate"]["score"], moved["gate"]["stable_score"], moved["gate"]["stable"]) == (1.0, 0.0, "good@1")
    set_gate(server, "good", rows, margin=1.0)
    assert server.promote("good", 1).status_code == 200
    assert kinds(server, "good").count("gate_scored") == 2  # other thresholds, the same rows
    assert "gate" not in server.promote("good", 1).json()  # it is that already
    set_gate(server, "good", [row("good@2 heard: a", "a")], margin=1.0)
    server.promote("good", 2)
    assert kinds(server, "good").count("gate_scored") == 4


def test_the_first_version_a_share_another_alias_and_a_roll_back_are_free_of_it(server: Server) -> None:
    two_versions(server, "free")
    set_gate(server, "free", [row("nobody says this")], minimum=1.0)
    assert server.promote("free", 2, "canary").status_code == 200
    tried = server.http.put("/v1/adapters/free/aliases/stable", json={"candidate": 2, "share": 0.5})
    assert tried.status_code == 200
    assert server.promote("free", 2).status_code == server.promote("free", 2, "Stable").status_code == 409
    assert server.http.delete("/v1/adapters/free/gate").json()["deleted"]
    assert server.promote("free", 2).status_code == 200
    set_gate(server, "free", [row("nobody says this")], minimum=1.0)
    assert server.http.post("/v1/adapters/free/rollback").json()["version"] == 1
    assert kinds(server, "free").count("gate_removed") == 1


def test_answers_are_the_versions_own_with_its_defaults_and_rows_that_do_not_fit_are_wrong(server: Server) -> None:
    files = {
        name: (server.adapter() / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    parts = {"config": files["adapter_config.json"], "weights": files["adapter_model.safetensors"]}
    server.pushed("own")
    server.push("own", files=parts | {"serving": b'{"max_tokens": 1, "temperature": 0.9}'})
    set_gate(server, "own", [row("own@2 heard: hello"), row("x", "long " * 5000)], minimum=0.5)
    moved = server.promote("own", 2).json()
    assert moved["gate"]["score"] == 0.5
    gate = server.http.get("/v1/adapters/own/versions/2").json()["proof"]["gate"]
    assert gate["unanswered"] == 1


@pytest.mark.parametrize(
    "body",
    [
        {"rows": [row("x")]},
        {"rows": [], "minimum": 0.5},
        {"rows": [row("x")], "minimum": 1.5},
        {"rows": [row("x")] * 501, "minimum": 0.5},
        {"rows": [row("x")], "minimum": 0.5, "metric": "bleu"},
        {"rows": [row("x")], "minimum": 0.5, "metric": "json_valid"},
        {"rows": [{"messages": [], "expected": "x"}], "minimum": 0.5},
        {"rows": [{**row("x"), "seed": 1}], "minimum": 0.5},
        {"rows": [row("x" * 600_000)] * 2, "minimum": 0.5},
        {"rows": [{"messages": [{"role": "user", "content": [{"type": "image_url"}]}], "expected": "x"}], "minimum": 1},
    ],
)
def test_a_gate_that_could_not_decide_is_refused(server: Server, body: dict[str, Any]) -> None:
    if server.http.get("/v1/adapters/held").status_code == 404:
        server.pushed("held")
    assert server.http.put("/v1/adapters/held/gate", json=body).status_code in (400, 422)
    assert error_of(server.http.get("/v1/adapters/held/gate"))["code"] == "not_found"


def send(server: Server, content: bytes, purpose: str = "evals") -> str:
    files = {"file": ("rows.jsonl", content)}
    return str(server.http.post("/v1/files", data={"purpose": purpose}, files=files).json()["id"])


def test_rows_may_come_from_a_file_that_was_sent_before(server: Server) -> None:
    two_versions(server, "filed")
    call = {"function": {"name": "track", "arguments": '{"id": 1}'}}
    question = {"role": "user", "content": "hello"}
    rows = [
        {"messages": [question, {"role": "assistant", "content": "filed@2 heard: hello"}]},
        {"messages": [question, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": []},
    ]
    sent = send(server, b"".join(json.dumps(one).encode() + b"\n" for one in rows) + b"\n")
    answer = server.http.put("/v1/adapters/filed/gate", json={"file": sent, "minimum": 0.5})
    assert answer.json()["rows"] == 2, answer.text
    server.http.delete(f"/v1/files/{sent}")
    assert server.promote("filed", 2).json()["gate"]["score"] == 0.5
    kept = server.services.registry.gate("default", "filed") or {}
    assert kept["rows"][1]["expected"] == '<tool_call>\n{"name": "track", "arguments": {"id": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", ["line 1"]),
        (b'{"messages": []}\n\n[1]\n{"prompt": "x"}\nnonsense\n', ["line 1", "line 3", "line 4", "line 5"]),
        (b'{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "x"}]}', ["line 1"]),
        (b'{"messages": [{}, {"role": "assistant", "tool_calls": [7]}]}', ["line 1"]),
    ],
)
def test_a_file_whose_lines_are_no_rows_is_refused_with_the_lines(
    server: Server, content: bytes, lines: list[str]
) -> None:
    if server.http.get("/v1/adapters/lines").status_code == 404:
        server.pushed("lines")
    sent = send(server, content) if content else send(server, b"\n")
    answer = server.http.put("/v1/adapters/lines/gate", json={"file": sent, "minimum": 0.5})
    assert answer.status_code == 422
    assert [problem["path"] for problem in error_of(answer)["problems"]] == lines


def test_a_file_of_another_purpose_or_none_at_all_is_refused(server: Server) -> None:
    server.pushed("purpose")
    body = {"minimum": 0.5}
    for file_id, status in ((send(server, b"x", "user_data"), 400), ("file-" + "0" * 24, 404)):
        answer = server.http.put("/v1/adapters/purpose/gate", json={**body, "file": file_id})
        assert answer.status_code == status, answer.text
    both = {**body, "file": "file-x", "rows": [row("x")]}
    assert server.http.put("/v1/adapters/purpose/gate", json=both).status_code == 400


def test_an_adapter_that_is_not_there_has_no_gate(server: Server) -> None:
    for method in ("GET", "DELETE"):
        assert server.http.request(method, "/v1/adapters/nowhere/gate").status_code == 404
    assert set_gate(server, "nowhere", [row("x")], minimum=1.0).status_code == 404


@pytest.mark.parametrize(
    ("score", "stable", "minimum", "margin", "count"),
    [
        (0.8, 0.9, 0.8, None, 0), (0.79, None, 0.8, None, 1), (0.8, 0.9, None, 0.1, 0), (0.79, 0.9, None, 0.1, 1),
        (0.1, None, None, 0.1, 0), (0.7, 0.9, 0.8, 0.1, 2), (0.3, 0.1 + 0.2, None, 0.0, 0),
    ],
)  # fmt: skip
def test_what_a_score_lacks(score: float, stable: float | None, minimum: float, margin: float, count: int) -> None:
    figures = {"score": score, "stable_score": stable, "minimum": minimum, "margin": margin}
    assert len(list(shortfalls(figures))) == count


def test_a_gates_digest_is_of_what_decides_a_score() -> None:
    gate = Gate("exact_match", 0.5, None, 256, (row("x"),))
    assert gate.digest == Gate("exact_match", None, 0.1, 256, (row("x"),)).digest
    assert gate.digest != Gate("exact_match", 0.5, None, 128, (row("x"),)).digest
    assert Gate.from_row(json.loads(json.dumps(gate.as_row()))).digest == gate.digest


def test_the_command_sets_a_gate_from_training_rows_and_promote_prints_the_figures(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_versions(server, "told")
    monkeypatch.setenv("HOTSHOE_URL", server.url)
    file = tmp_path / "rows.jsonl"
    pairs = [("hello", "told@2 heard: hello"), ("you", "told@1 heard: you")]
    turns = [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in pairs]
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))

    def told(*arguments: str) -> str:
        result = runner.invoke(build_app(), [*arguments])
        assert result.exit_code == 0, result
        return result.stdout

    said = told("gate", "told", "--file", str(file), "--minimum", "0.5", "--margin", "0.1")
    assert "told: exact_match over 2 rows, at least 0.5 and at most 0.1 below stable" in said
    assert "told: exact_match over 2 rows" in told("gate", "told")
    assert "gate: exact_match over 2 rows: told@2 0.5, told@1 0.5" in told("promote", "told@2")
    told("gate", "told", "--file", str(file), "--minimum", "0.9")
    refused = runner.invoke(build_app(), ["promote", "told@1"]).exception
    assert isinstance(refused, ServerRefused) and exit_code_of(refused) == 3
    assert "told has no gate any more" in told("gate", "told", "--off")
    assert runner.invoke(build_app(), ["gate", "told", "--minimum", "0.5"]).exit_code != 0
