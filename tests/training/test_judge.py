"""The judge over real HTTP: a small OpenAI-compatible app that votes as each test says, through the openai client."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from adapters.errors import EngineUnavailable
from training.evaluation.figures import Grouping
from training.evaluation.judge import Endpoint, Pair, judged, question, vote
from training.sample import evenly

Reply = Callable[[str, str], str | int]


@contextmanager
def judge(reply: Reply) -> Iterator[str]:
    """A judge's URL; `reply` takes the two answers and gives what is said, or the status of an error."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Any:
        body = await request.json()
        asked = body["messages"][-1]["content"]
        first, second = (re.search(rf"<answer {name}>\n(.*?)\n</answer", asked, re.S) for name in "AB")
        assert first and second and body["temperature"] == 0
        said = reply(first.group(1), second.group(1))
        if isinstance(said, int):
            return JSONResponse({"error": {"message": "no", "type": "x", "code": "y"}}, said)
        message = {"role": "assistant", "content": said}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]}

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def pairs(rows: int = 24, better: int = 16) -> list[Pair]:
    """The model's answer is the longer one in the first `better` rows."""
    return [Pair(f"question {row}", "right", "long" * (1 + (row < better)), "longer") for row in range(rows)]


def grouping(rows: int = 24) -> Grouping:
    return Grouping([str(row) for row in range(rows)])


def test_a_fair_judge_has_a_win_rate_with_its_interval_and_no_position_bias() -> None:
    with judge(lambda first, second: "A" if len(first) > len(second) else "**B**") as url:
        report = judged(Endpoint(f"{url}/v1", "judge", "key"), pairs()).report(grouping())
    assert report["win_rate"]["estimate"] == pytest.approx(16 / 24)
    assert report["win_rate"]["low"] < 16 / 24 < report["win_rate"]["high"]
    assert (report["wins"], report["losses"], report["ties"], report["undecided"]) == (16, 8, 0, 0)
    assert (report["position_bias"], report["consistent_share"]) == (0.0, 1.0)
    assert (report["errors"], report["invalid_replies"]) == (0, 0)


def test_a_judge_that_takes_the_first_place_wins_nobody_anything_and_is_found_out() -> None:
    with judge(lambda first, second: "A is better.") as url:
        report = judged(Endpoint(url, "judge"), pairs()).report(grouping())
    assert report["win_rate"]["estimate"] == 0.5
    assert (report["position_bias"], report["undecided"], report["consistent_share"]) == (0.5, 24, 0.0)


def test_nonsense_and_errors_leave_their_rows_out_and_are_counted() -> None:
    def reply(first: str, second: str) -> str | int:
        if first == "longlong":
            return "As a language model I find both lovely" if second == "longer" else "T"
        return 400 if second == "longer" else "B"

    with judge(reply) as url:
        report = judged(Endpoint(url, "judge"), pairs()).report(grouping())
    assert (report["invalid_replies"], report["errors"]) == (16, 8)
    assert report["win_rate"] == {"estimate": None, "items": 0, "clusters": 0, "left_out": 24}
    assert report["position_bias"] is None and report["consistent_share"] is None
    assert "400" in report["first_error"]


def test_a_judge_that_never_answers_is_an_error_with_its_first_words() -> None:
    with judge(lambda first, second: 401) as url, pytest.raises(EngineUnavailable, match="none of 4 requests"):
        judged(Endpoint(url, "judge"), pairs(2))
    with pytest.raises(EngineUnavailable, match="answered none of 2"):
        judged(Endpoint("http://127.0.0.1:9", "judge"), pairs(1))


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        *(("A", "first"), ("b.", "second"), ("T", "tie"), ("Tie", "tie"), ("**A**", "first"), ("[[B]]", "second")),
        ("<think>A or B? B.</think>\n\nA", "first"),
        ("Answer B", "second"),
        ("First I compared them at length, and in the end my verdict is this: [[T]]", "tie"),
        *(("", None), ("Both are fine", None), ("C", None), ("\x00", None), ("{}", None)),
        ("A long comparison of both answers shows that neither of them is right", None),
    ],
)
def test_a_vote_is_one_letter_and_prose_that_begins_with_an_article_is_none(reply: str, wanted: str | None) -> None:
    assert vote(reply) == wanted


def test_the_judge_sees_each_pair_in_both_orders_with_the_reference() -> None:
    pair = Pair("q?", "the reference", "mine", "theirs")
    assert question(pair, False).index("mine") < question(pair, False).index("theirs")
    assert question(pair, True).index("theirs") < question(pair, True).index("mine")
    assert "the reference" in question(pair, True)
    assert (evenly(range(5), 10), len(evenly(range(1000), 200)), evenly(range(1000), 200)[-1]) == (
        [0, 1, 2, 3, 4],
        200,
        995,
    )
