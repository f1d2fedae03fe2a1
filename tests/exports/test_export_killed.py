"""SIGKILL of an export's process and of its server, at moments drawn by chance: the job ends with the same files."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from adapters.bases import BaseModel, load_base
from server.exports import MOST_DEATHS
from tests.exports.test_exports import ended as ended_of
from tests.exports.test_exports import hidden, ordered, result_of
from tests.fixtures.adapters import write_adapter
from tests.fixtures.bases import tiny_qwen2
from tests.fixtures.jobs import words_of
from tests.fixtures.processes import Served
from tests.fixtures.service import eventually, running

SECONDS = 180.0
LARGER: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
}  # 37 MB: a merge that takes a while


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base(tiny_qwen2(tmp_path_factory.mktemp("base") / "larger", **LARGER))


@pytest.fixture(scope="module")
def server(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("killed")
    server = Served(folder / "home", "--engine", "scripted", "--base", str(base.folder))
    done = server.verb("push", str(write_adapter(folder / "router", base)), "--name", "router")
    assert done.returncode == 0, done.stderr
    yield server
    server.end()


def order(server: Served) -> str:
    body = {"model": "router", "parity": False}
    return str(httpx.post(f"{server.url}/v1/exports", json=body, timeout=60).json()["id"])


def ended(server: Served, export_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + SECONDS
    while True:
        row: dict[str, Any] = httpx.get(f"{server.url}/v1/exports/{export_id}", timeout=60).json()
        if row["status"] not in ("queued", "running"):
            return row
        assert time.monotonic() < deadline, row
        time.sleep(0.05)


def content(server: Served, export_id: str) -> bytes:
    return httpx.get(f"{server.url}/v1/exports/{export_id}/content", timeout=60).raise_for_status().content


def working(server: Served) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [one for one in children if "adapters.export" in words_of(one)]


def kill(server: Served, victim: str) -> None:
    """The process that exports, where there is one, or the server, which is then started again."""
    if victim == "process":
        for one in working(server):
            one.kill()
        return
    children = working(server)
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    eventually(lambda: not any(one.is_running() and words_of(one) for one in children))
    server.start()


def check_killed(server: Served, seed: int, times: int) -> None:
    whole = order(server)
    begun = time.monotonic()
    assert ended(server, whole)["status"] == "succeeded"
    took = time.monotonic() - begun
    expected = content(server, whole)
    assert httpx.delete(f"{server.url}/v1/exports/{whole}").status_code == 200
    chance = random.Random(seed)
    for number in range(times):
        one = order(server)
        time.sleep(chance.uniform(0, took))
        kill(server, "process" if number % 2 else "server")
        row = ended(server, one)
        assert row["status"] == "succeeded", row["error"]
        assert content(server, one) == expected
        assert httpx.delete(f"{server.url}/v1/exports/{one}").status_code == 200
        assert sorted((server.home / "exports").iterdir()) == []


def test_f4_a_killed_process_or_server_ends_in_the_same_files_and_leaves_no_other(server: Served) -> None:
    check_killed(server, seed=1, times=4)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_f4_kills_at_many_moments_end_in_the_same_files(server: Served) -> None:
    check_killed(server, seed=2, times=60)


def test_f4_an_order_that_is_cancelled_after_a_restart_leaves_no_work(server: Served) -> None:
    one = order(server)
    eventually(lambda: bool(working(server)), 120)
    kill(server, "server")
    assert httpx.post(f"{server.url}/v1/exports/{one}/cancel").json()["status"] == "cancelled"
    eventually(lambda: sorted((server.home / "exports").iterdir()) == [])


def test_f4_a_process_that_is_killed_again_and_again_is_a_failed_job_and_no_endless_loop(
    base: BaseModel, tmp_path: Path
) -> None:
    with running(base, tmp_path) as server:
        server.pushed("router")
        row = ordered(server)
        work = server.services.exports.results.place(result_of(server, row["id"]).name).work
        killed = set[int]()

        def is_over() -> bool:
            for one in psutil.Process().children():
                if "adapters.export" in words_of(one) and one.pid not in killed:
                    work.mkdir(exist_ok=True)  # as a process leaves it
                    killed.add(one.pid)
                    one.kill()
            return bool(server.http.get(f"/v1/exports/{row['id']}").json()["status"] == "failed")

        eventually(is_over, SECONDS)
        found = ended_of(server, row["id"])
        assert len(killed) == found["attempts"] == MOST_DEATHS
        assert found["error"]["code"] == "worker_lost" and f"{MOST_DEATHS} tries" in found["error"]["message"]
        eventually(lambda: hidden(server) == [] and not result_of(server, row["id"]).exists())
        assert ended_of(server, ordered(server)["id"])["status"] == "succeeded", "another order is another try"


def test_f4_finished_weights_stay_until_the_work_is_done_or_nobody_wants_it(base: BaseModel, tmp_path: Path) -> None:
    with running(base, tmp_path) as server:
        server.pushed("router")
        row = ordered(server)
        result = result_of(server, row["id"])
        eventually(lambda: server.http.get(f"/v1/exports/{row['id']}").json()["status"] == "running")
    work = result.with_name(f".{result.name}.work")
    work.mkdir(exist_ok=True)
    (work / "model.safetensors").write_bytes(b"")
    with running(base, tmp_path, export_days=0) as server:
        row = server.http.get(f"/v1/exports/{row['id']}").json()
        assert row["status"] in ("queued", "running") and work.exists(), "kept over the restart"
        assert ended_of(server, row["id"])["status"] == "succeeded"
        eventually(lambda: not work.exists() and hidden(server) == [])
