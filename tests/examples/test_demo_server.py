"""The demo's serving steps and `eval` against a real server over the scripted engine, through the OpenAI SDK."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.errors import InvalidRequest
from examples.agent_routing.console import Console, StepFailed
from examples.agent_routing.learn import Results
from examples.agent_routing.summary import summary
from examples.agent_routing.swapping import swap
from examples.agent_routing.workshop import Workshop
from tests.fixtures.adapters import shape_only_base
from tests.fixtures.service import Server, running
from training.evaluate import generate_http


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running(shape_only_base(tmp_path / "base", max_position_embeddings=2048), tmp_path) as one:
        one.pushed("router-en")
        one.pushed("router-en")
        yield one


@pytest.fixture
def shop(server: Server, tmp_path: Path) -> Workshop:
    made = Workshop(tmp_path / "demo", Console())
    made.clear()
    made.url = made.env["HOTSHOE_URL"] = server.url
    return made


def test_the_swap_step_promotes_under_a_stream_rolls_back_and_promotes_again(server: Server, shop: Workshop) -> None:
    server.script.seconds_per_token = 0.01
    results = Results()
    swap(shop, results)
    assert server.http.get("/v1/adapters/router-en").json()["aliases"][0]["version"] == 2
    assert set(results.facts["background_requests"]) == {"router-en@1", "router-en@2"}


def test_the_swap_step_fails_when_the_stream_ended_before_the_promote(server: Server, shop: Workshop) -> None:
    with pytest.raises(StepFailed, match="it shows nothing"):
        swap(shop, Results())


def test_answers_come_in_the_order_of_the_prompts_with_their_times(server: Server) -> None:
    server.script.seconds_per_token = 0.002
    prompts = [[{"role": "user", "content": f"sentence number {number}"}] for number in range(20)]
    answers = generate_http(server.url, "router-en", prompts, concurrency=5)
    assert all(f"number {number}" in answer.text for number, answer in enumerate(answers))
    assert {answer.model for answer in answers} == {"router-en@1"}
    assert all(answer.completion_tokens == len(answer.text.split()) for answer in answers)
    assert all(answer.ttft_seconds > 0 and answer.tpot_seconds is not None for answer in answers)


def test_a_model_that_is_not_there_is_the_servers_refusal(server: Server) -> None:
    with pytest.raises(InvalidRequest, match="absent"):
        generate_http(f"{server.url}/v1", "absent", [[{"role": "user", "content": "a"}]])


def test_eval_scores_a_served_model_and_writes_its_answers(server: Server, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": '{"intent": "A"}'}]}]
    data, out = tmp_path / "data.jsonl", tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["eval", str(data), "--model", "router-en@2", "--url", server.url, "--out", str(out), "--json"]
    command = [str(Path(sys.executable).with_name("hotshoe")), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = json.loads(result.stdout)
    assert (found["rows"], found["json_valid"], found["answered_by"]) == (1, 0.0, ["router-en@2"])
    assert json.loads(out.read_text())["expected"] == '{"intent": "A"}'


def test_the_table_shows_every_adapter_with_bytes_and_load_seconds(server: Server, shop: Workshop) -> None:
    from examples.agent_routing.data import VIETNAMESE, make

    results = Results(english=make(VIETNAMESE))
    results.facts["system"] = shop.get("/v1/system")
    text = summary(results, {"1. Prepare": 61.0})
    assert "router-en@1" in text
    assert "router-en@2" in text
    assert "1:01" in text
