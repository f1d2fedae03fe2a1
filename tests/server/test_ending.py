"""A version that does not end its turns is served with a warning in its proof; one that does has none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adapters.errors import EngineUnavailable
from server.cli.main import build_app
from server.ending import QUESTIONS, Ending, judge
from tests.fixtures.service import Server


def answers(*choices: tuple[str, str | None]) -> list[tuple[int, bytes]]:
    return [
        (200, json.dumps({"choices": [{"finish_reason": reason, "message": {"content": text}}]}).encode())
        for reason, text in choices
    ]


def test_a_version_that_ends_its_answers_has_no_warning(server: Server) -> None:
    assert server.pushed("ends")["proof"]["warnings"] == []


def test_a_version_that_never_reaches_its_end_of_turn_is_ready_and_warned_of(
    make_server: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server(probe_answer_tokens=2)  # the double's answers are longer than two words
    (warning,) = server.pushed("runs-on")["proof"]["warnings"]
    assert (warning["code"], warning["path"]) == ("no_end_of_turn", "proof")
    assert f"none of {len(QUESTIONS)} short questions was answered to an end within 2 tokens" in warning["message"]
    assert server.say("runs-on").status_code == 200
    monkeypatch.setenv("HOTSHOE_URL", str(server.http.base_url))
    result = CliRunner().invoke(build_app(), ["push", str(server.adapter()), "--name", "runs-on"])
    assert result.exit_code == 0
    assert "warning: none of 2 short questions" in result.stdout


def test_an_engine_that_is_too_slow_keeps_no_version_waiting_and_one_that_went_away_is_told_of(server: Server) -> None:
    row = server.pushed("slow")
    version = server.services.registry.get("default", "slow", row["version"])

    async def slow(path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        await asyncio.sleep(60)
        return 200, b"{}"

    async def gone(path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        raise EngineUnavailable("gone")

    asked, lost = (Ending(ask, 8, may_bring_templates=False, patience_seconds=0.05) for ask in (slow, gone))
    assert asyncio.run(asked.warnings(version, "slow@1")) == []
    with pytest.raises(EngineUnavailable):  # or a version that kills the engine as it answers were tried for ever
        asyncio.run(lost.warnings(version, "slow@1"))


def test_an_operator_may_leave_the_question_out(make_server: Callable[..., Server]) -> None:
    assert make_server(probe_answer_tokens=0).pushed("unasked")["proof"]["warnings"] == []


@pytest.mark.parametrize(
    "found",
    [
        answers(("length", "x"), ("stop", "x")),
        answers(("length", "<think> and"), ("length", "x")),  # a thought is no answer yet
        answers(("length", None), ("length", "x")),  # with a reasoning parser
        [(400, b"{}"), *answers(("length", "x"))],  # a base without a chat template
    ],
)
def test_one_answer_that_ended_or_cannot_be_judged_is_no_warning(found: list[tuple[int, bytes]]) -> None:
    assert judge(found, 8) is None
    cut: Any = judge(answers(("length", "x"), ("length", "<think>a</think> b")), 8)
    assert cut is not None and cut.code == "no_end_of_turn"
