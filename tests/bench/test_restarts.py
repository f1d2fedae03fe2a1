"""How the bench of restarts tells what became of a request: outcomes from a real server, and whose words it heard."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.bases import BaseModel
from bench.client import Target
from bench.load import Load, Outcome, Request, verdict
from bench.restarts import Kill, outcome_row, pauses, share_out
from tests.fixtures.service import Server, eventually, running

MODELS = {"tiny": "tiny", "light": "light@1"}
KNOWN = {("tiny", "hello"): "tiny heard: hello", ("light", "hello"): "light@1 heard: hello"}


def ask(server: Server, *requests: Request, meanwhile: Callable[[], object] | None = None) -> list[Request]:
    """Ask all at once; `meanwhile` runs in a thread once the first has begun."""
    load = Load(Target("gateway", server.url), MODELS, ("hello",), max_tokens=400)

    async def all_of_them() -> list[Request]:
        async with load.target.session() as session:
            asked = asyncio.gather(*(load.ask(session, request) for request in requests))
            if meanwhile is not None:
                while not requests[0].events:  # noqa: ASYNC110 - that is how the bench itself sees it
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(meanwhile)
            return list(await asked)

    return asyncio.run(all_of_them())


def test_each_outcome_is_told_from_the_others(tiny_base: BaseModel, tmp_path: Path) -> None:
    with running(tiny_base, tmp_path) as server:
        server.pushed("light")
        stream, whole, absent = ask(
            server, Request("light", "hello", True), Request("tiny", "hello", False), Request("nobody", "hello", True)
        )
        assert (stream.outcome, stream.answered_by) == (Outcome.WHOLE, "light@1")
        assert stream.text.startswith(KNOWN["light", "hello"])
        assert whole.outcome is Outcome.WHOLE and whole.text.startswith(KNOWN["tiny", "hello"])
        assert absent.outcome is Outcome.FAILED and absent.detail.startswith("404")
        assert {verdict(request, MODELS, KNOWN) for request in (stream, whole)} == {"right"}
        server.script.seconds_per_token = 0.05
        (cut,) = ask(
            server,
            Request("light", "w " * 300, True),
            meanwhile=lambda: server.call(server.engine.crash(down_seconds=5)),
        )
        (refused,) = ask(server, Request("tiny", "hello", True))
        assert (cut.outcome, refused.outcome) == (Outcome.ERROR_EVENT, Outcome.REFUSED)
        assert cut.ended_at > 0 and "restarted" in cut.detail
    gone = Request("tiny", "hello", True)
    ask(server, gone)
    eventually(lambda: gone.outcome is Outcome.LOST)


@pytest.mark.parametrize(
    ("answered_by", "text", "expected"),
    [
        ("light@1", "light@1 heard: hello", "right"),
        ("light@1", "light", "right"),
        (None, "", "right"),
        ("light@2", "light@1 heard: hello", "wrong"),
        ("light@1", "tiny heard: hello", "wrong"),
        ("light@1", "something else", "unknown"),
    ],
)
def test_an_answer_is_judged_by_its_name_and_its_first_words(answered_by: str | None, text: str, expected: str) -> None:
    request = Request("light", "hello", True, events=1, text=text, answered_by=answered_by)
    assert verdict(request, MODELS, KNOWN) == expected


def test_each_request_belongs_to_the_last_kill_before_its_end(tmp_path: Path) -> None:
    kills = [Kill("core only", 10.0, 2, adapters_back=4), Kill("core only", 20.0, 1, adapters_back=4)]
    ended = [(5.0, Outcome.WHOLE), (10.5, Outcome.ERROR_EVENT), (15.0, Outcome.REFUSED), (25.0, Outcome.ERROR_EVENT)]
    share_out(kills, [Request("tiny", "x", True, outcome=outcome, ended_at=at) for at, outcome in ended])
    assert [len(kill.requests) for kill in kills] == [2, 1]
    row = outcome_row("core only", kills)
    assert (row["ended with an error event"], row["503 with Retry-After"], row["ended silently"]) == (2, 1, 0)
    assert row["adapters back at ready"] == "8 of 8"
    log = tmp_path / "log"
    log.write_text('hotshoe serves\n{"event": "engine died", "restart_in_seconds": 0.5}\n{"event": "ready"}\n')
    assert pauses(log) == [0.5]
