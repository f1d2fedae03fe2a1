"""With vLLM itself: what a stop of its core and a kill of everything leave whole. Four starts of the engine."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import httpx
import psutil
import pytest

from adapters.bases import BaseModel
from tests.fixtures.adapters import write_adapter
from tests.fixtures.processes import Served
from tests.fixtures.service import eventually
from tests.fixtures.standing import is_alive

pytestmark = [pytest.mark.model, pytest.mark.long, pytest.mark.timeout(1800)]
START_SECONDS = 400
NAMES = ("one", "two")


@pytest.fixture(scope="module")
def served(embedded_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    one = Served(tmp_path_factory.mktemp("vllm") / "home", "--slots", "2", seconds=START_SECONDS)
    try:
        for seed, name in enumerate(NAMES):
            folder = write_adapter(one.home.parent / name, embedded_base, seed=seed, rank=8, scale=0.2)
            assert one.verb("push", str(folder), "--name", name).returncode == 0
        yield one
    finally:
        one.end()


def processes(served: Served) -> list[int]:
    """The engine's: its API process, its core, which holds the weights, and the others."""
    leader = next(p for p in psutil.Process(served.process.pid).children() if "vllm_plugin" in " ".join(p.cmdline()))
    below = {" ".join(process.cmdline()): process.pid for process in leader.children(recursive=True)}
    assert not [title for title in below if "::Worker" in title], "one process holds the weights"
    core = next(pid for title, pid in below.items() if "::EngineCore" in title)
    return [leader.pid, core, *(pid for pid in below.values() if pid != core)]


def answers(served: Served) -> dict[str, str]:
    body = {"messages": [{"role": "user", "content": "Say hello."}], "temperature": 0, "max_tokens": 12}
    found = {}
    for name in NAMES:
        answer = httpx.post(f"{served.url}/v1/chat/completions", json={"model": name, **body}, timeout=120).json()
        assert answer["model"] == f"{name}@1"
        found[name] = answer["choices"][0]["message"]["content"]
    return found


def ready_status(served: Served) -> int:
    return httpx.get(f"{served.url}/ready", timeout=10).status_code


def stream_over(served: Served, pid: int, signals: tuple[int, ...]) -> list[str]:
    """The data of a stream in whose middle a process of the engine gets the first signal, and the second, where there
    is one, once the server is not ready."""
    body = {"model": "one", "stream": True, "max_tokens": 64, "ignore_eos": True}
    body["messages"] = [{"role": "user", "content": "Tell me a story."}]
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=300) as response:
        events = (line[6:] for line in response.iter_lines() if line.startswith("data: "))
        begun = [next(events), next(events)]
        os.kill(pid, signals[0])
        eventually(lambda: ready_status(served) == 503, 3)
        refused = httpx.post(f"{served.url}/v1/chat/completions", json={**body, "stream": False}, timeout=60)
        assert refused.status_code == 503 and "retry-after" in refused.headers
        for number in signals[1:]:
            os.kill(pid, number)
        return [*begun, *events]


@pytest.mark.parametrize("which", [0, 1], ids=["API process", "core"])
def test_a_process_that_is_stopped_and_goes_on_loses_nothing(served: Served, which: int) -> None:
    before = processes(served)
    streamed = stream_over(served, before[which], (signal.SIGSTOP, signal.SIGCONT))
    assert streamed[-1] == "[DONE]" and not any('"error"' in event for event in streamed)
    eventually(lambda: ready_status(served) == 200, 10)
    assert processes(served) == before


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_core_that_is_stopped_for_good_or_out_of_memory_is_replaced_and_the_adapters_are_back(
    served: Served, number: signal.Signals
) -> None:
    expected, before = answers(served), processes(served)
    *_, error, done = stream_over(served, before[1], (number,))
    assert "error" in json.loads(error) and done == "[DONE]"
    eventually(lambda: not any(map(is_alive, before)), 10)
    eventually(lambda: ready_status(served) == 200, START_SECONDS)
    rows = httpx.get(f"{served.url}/v1/system", timeout=30).json()["adapters"]
    assert {row["place"] for row in rows} <= {"resident", "staged"} and len(rows) == len(NAMES)
    assert answers(served) == expected


def test_a_killed_server_takes_its_engine_with_it_and_comes_back_as_it_was(served: Served) -> None:
    expected, before = answers(served), processes(served)
    served.stop(signal.SIGKILL)
    eventually(lambda: not any(map(is_alive, before)), 30)
    served.start(START_SECONDS)
    rows = httpx.get(f"{served.url}/v1/system", timeout=30).json()["adapters"]
    assert {row["place"] for row in rows} <= {"resident", "staged"} and len(rows) == len(NAMES)
    assert answers(served) == expected
