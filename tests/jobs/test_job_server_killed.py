"""SIGKILL of a server while it trains: the process that trains ends with it, and the job goes on when it is back."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from openai.types.fine_tuning import FineTuningJob

from adapters.canonical import WEIGHTS_FILE
from tests.fixtures.bases import tiny_qwen2
from tests.fixtures.jobs import SECONDS, rows, words_of
from tests.fixtures.processes import Served
from tests.fixtures.service import eventually


def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def created(server: Served, suffix: str) -> FineTuningJob:
    with client(server) as asked:
        file = asked.files.create(file=("rows.jsonl", rows()), purpose="fine-tune")
        return asked.fine_tuning.jobs.create(
            model="base",
            training_file=file.id,
            suffix=suffix,
            seed=5,
            hyperparameters={"n_epochs": 60, "batch_size": 8},
        )


def ended(server: Served, job: FineTuningJob) -> FineTuningJob:
    deadline = time.monotonic() + SECONDS
    with client(server) as asked:
        while (found := asked.fine_tuning.jobs.retrieve(job.id)).status in ("validating_files", "queued", "running"):
            assert time.monotonic() < deadline, found
            time.sleep(0.2)
    assert found.status == "succeeded", found.error
    return found


def has_saved(server: Served, job: FineTuningJob) -> bool:
    return bool(httpx.get(f"{server.url}/v1/fine_tuning/jobs/{job.id}/checkpoints").json()["data"])


def weights(server: Served, name: str) -> bytes:
    return httpx.get(f"{server.url}/v1/adapters/{name}/versions/1/files/{WEIGHTS_FILE}").content


@pytest.mark.long
def test_a_killed_servers_job_goes_on_from_its_checkpoint_and_ends_in_the_same_weights(tmp_path: Path) -> None:
    base = tiny_qwen2(tmp_path / "base")
    server = Served(tmp_path / "home", "--engine", "scripted", "--base", str(base))
    try:
        job = created(server, "killed")
        eventually(lambda: has_saved(server, job), SECONDS)
        trainers = [one for one in psutil.Process(server.process.pid).children(recursive=True) if words_of(one)]
        trainers = [one for one in trainers if "training.jobs" in words_of(one)]
        assert trainers
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        eventually(lambda: not any(one.is_running() and words_of(one) for one in trainers))
        server.start()
        ended(server, job)
        said = [
            row["message"]
            for row in httpx.get(f"{server.url}/v1/fine_tuning/jobs/{job.id}/events?limit=100").json()["data"]
        ]
        assert "Going on from the last checkpoint" in said
        assert "The worker of this job is gone; another goes on" in said
        assert len(httpx.get(f"{server.url}/v1/adapters/killed").json()["versions"]) == 1
        ended(server, created(server, "whole"))
        assert weights(server, "killed") == weights(server, "whole")
    finally:
        server.process.terminate()
        server.process.wait(30)
