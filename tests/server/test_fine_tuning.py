"""Fine-tuning as OpenAI's own client does it, with real training of a tiny base in the worker's process."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob
from typer.testing import CliRunner

from adapters.bases import load_base
from adapters.job_rows import JobRow
from adapters.limits import UseLimits
from server.cli.client import ServerRefused
from server.cli.main import build_app
from server.cli.output import EXIT_FAILED
from server.job_results import COLUMNS
from server.job_worker import NICE
from tests.fixtures.bases import tiny_qwen2
from tests.fixtures.jobs import SECONDS, created, ended, messages, rows, sent, steps, trainers, weights
from tests.fixtures.service import Server, eventually, running


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fine-tuning")


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Server]:
    with running(load_base(tiny_qwen2(home / "base")), home) as one:
        yield one


@pytest.fixture(scope="module")
def file(server: Server) -> str:
    return sent(server, rows())


@pytest.fixture(scope="module")
def first(server: Server, file: str) -> FineTuningJob:
    """A job that was carried out."""
    validation = sent(server, rows(12))
    made = created(server, file, suffix="lights", validation_file=validation, metadata={"team": "home"})
    assert (made.status, made.fine_tuned_model, made.result_files, made.error) == ("queued", None, [], None)
    assert (made.hyperparameters.n_epochs, made.hyperparameters.learning_rate_multiplier) == (2, "auto")
    return ended(server, made)


def test_a_file_becomes_a_model_that_answers_at_once(server: Server, first: FineTuningJob, file: str) -> None:
    assert first.fine_tuned_model == "lights@1"
    assert (first.training_file, first.seed, first.metadata) == (file, 5, {"team": "home"})
    assert first.finished_at is not None and first.finished_at >= first.created_at and first.estimated_finish is None
    assert first.trained_tokens is not None and first.trained_tokens > 48 * 10
    assert first.method is not None and first.method.supervised is not None
    used = first.hyperparameters
    assert (used.n_epochs, used.batch_size, used.learning_rate_multiplier) == (2, 8, 1.0)
    answer = server.openai.chat.completions.create(model="lights@1", messages=[{"role": "user", "content": "hello"}])
    assert answer.model == "lights@1" and server.say("lights").json()["model"] == "lights@1"
    assert "lights" in [model.id for model in server.openai.models.list()]
    card = server.http.get(first.model_dump()["hotshoe"]["card"]).json()
    assert card["settings"]["epochs"] == 2 and card["settings"]["seed"] == 5 and card["gate"]["verdict"] == "warn"


def test_the_job_says_what_it_did(server: Server, first: FineTuningJob) -> None:
    said = list(reversed(messages(server, first)))
    assert said[0] == f"Created fine-tuning job: {first.id}"
    assert said[-1].endswith("the fine-tuned model is lights@1")
    wanted = ["Validating training file", "Files validated", "Fine-tuning job started", "Step ", "Training has ended"]
    places = [next(at for at, line in enumerate(said) if line.startswith(start)) for start in [*wanted, "Publishing"]]
    assert places == sorted(places)
    events = list(server.openai.fine_tuning.jobs.list_events(first.id, limit=2))
    assert [event.message for event in events] == list(reversed(said))  # the client goes on by `after`
    figures = [event for event in events if event.type == "metrics" and "train_loss" in (event.data or {})]  # type: ignore[operator]
    assert figures and all(event.object == "fine_tuning.job.event" for event in events)


def test_its_checkpoints_are_listed_newest_first(server: Server, first: FineTuningJob) -> None:
    listed = list(server.openai.fine_tuning.jobs.checkpoints.list(first.id, limit=1))
    assert [one.step_number for one in listed] == sorted((one.step_number for one in listed), reverse=True)
    assert listed[0].step_number == 12 and listed[0].fine_tuning_job_id == first.id
    assert listed[0].metrics.train_loss is not None and listed[0].metrics.full_valid_loss is not None


def test_the_metrics_are_a_file_in_openais_columns(server: Server, first: FineTuningJob) -> None:
    content = server.openai.files.content(first.result_files[0]).text
    table = list(csv.DictReader(io.StringIO(content)))
    assert tuple(table[0]) == COLUMNS and [row["step"] for row in table] == [str(step) for step in range(1, 13)]
    assert float(table[-1]["train_loss"]) < float(table[0]["train_loss"]) and table[-1]["valid_loss"]
    assert server.openai.files.retrieve(first.result_files[0]).purpose == "fine-tune-results"


def test_jobs_are_listed_and_found_by_their_metadata(server: Server, first: FineTuningJob) -> None:
    assert first.id in [job.id for job in server.openai.fine_tuning.jobs.list(limit=1)]
    found = server.openai.fine_tuning.jobs.list(metadata={"team": "home"})
    assert [job.id for job in found] == [first.id]
    assert list(server.openai.fine_tuning.jobs.list(metadata={"team": "other"})) == []


def test_a_job_goes_on_from_the_model_of_another(server: Server, first: FineTuningJob, file: str) -> None:
    model = str(first.fine_tuned_model)
    job = ended(server, created(server, file, model=model, suffix="lights", extra_body={"hotshoe": {"alias": "new"}}))
    assert (job.model, job.fine_tuned_model) == ("lights@1", "lights@2")
    row = server.http.get("/v1/adapters/lights/versions/2").json()
    assert row["parent"] == "lights@1" and row["aliases"] == ["new"]  # and stable stays where it was
    assert "No baseline is measured: there is no validation file" in messages(server, job)


def test_what_is_wrong_with_the_data_is_said_line_by_line(server: Server) -> None:
    bad = rows(4) + b'{"messages": [{"role": "user", "content": "no answer"}]}\nnot json\n'
    job = ended(server, created(server, sent(server, bad)), "failed")
    assert job.error is not None and (job.error.code, job.error.param) == ("data_invalid", "training_file")
    problems = job.error.model_dump()["problems"]
    assert [problem["path"] for problem in problems] == [f"{job.training_file}:5", f"{job.training_file}:6"]
    told = json.dumps([job.model_dump(), messages(server, job)])
    assert str(server.services.settings.home) not in told
    assert job.fine_tuned_model is None and job.result_files == [] and job.finished_at is not None


@pytest.mark.long
def test_paused_it_leaves_the_memory_and_resumed_it_ends_in_the_same_weights(server: Server, file: str) -> None:
    whole = ended(server, created(server, file, epochs=30, suffix="whole"))
    job = created(server, file, epochs=30, suffix="rested")
    eventually(lambda: bool(steps(server, job)), SECONDS)
    paused = server.openai.fine_tuning.jobs.pause(job.id)
    assert paused.status == "queued" and paused.model_dump()["hotshoe"]["status"] == "paused"
    eventually(lambda: not trainers())
    assert server.openai.fine_tuning.jobs.retrieve(job.id).status == "queued"
    server.openai.fine_tuning.jobs.resume(job.id)
    job = ended(server, job)
    assert "Going on from the last checkpoint" in messages(server, job)
    assert weights(server, job) == weights(server, whole)


@pytest.mark.long
def test_a_process_that_is_killed_is_tried_again_and_ends_in_the_same_weights(server: Server, file: str) -> None:
    job = created(server, file, epochs=30, suffix="killed")
    eventually(lambda: bool(steps(server, job)), SECONDS)
    for process in trainers():
        process.send_signal(signal.SIGKILL)
    job = ended(server, job)
    assert any("was killed; it is tried again" in message for message in messages(server, job))
    whole = ended(server, created(server, file, epochs=30, suffix="unbroken"))
    assert weights(server, job) == weights(server, whole)


def test_cancelled_it_is_gone_within_two_seconds_and_its_checkpoints_stay(server: Server, file: str) -> None:
    job = created(server, file, epochs=500, suffix="cancelled")
    eventually(lambda: bool(steps(server, job)), SECONDS)
    began = time.monotonic()
    assert server.openai.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    eventually(lambda: not trainers(), 2.0)
    assert time.monotonic() - began < 2.0
    assert steps(server, job) and ended(server, job, "cancelled").fine_tuned_model is None
    assert server.http.get("/v1/adapters/cancelled").status_code == 404
    with pytest.raises(openai.ConflictError, match="is cancelled"):
        server.openai.fine_tuning.jobs.resume(job.id)


def refusals(file: str, other: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "method.type", {"method": {"type": "dpo"}}
    yield "method.type", {"method": {"type": "reinforcement"}}
    yield "training_file", {"training_file": "file-nowhere"}
    yield "training_file", {"training_file": other}
    yield "validation_file", {"validation_file": "file-nowhere"}
    yield "suffix", {"suffix": "no spaces here"}
    yield "n_epochs", {"hyperparameters": {"n_epochs": 10**400}}
    yield "n_epochs", {"hyperparameters": {"n_epochs": 0}}
    yield "batch_size", {"hyperparameters": {"batch_size": "many"}}
    yield "learning_rate_multiplier", {"hyperparameters": {"learning_rate_multiplier": -1}}
    yield "alias", {"extra_body": {"hotshoe": {"alias": "3"}}}
    yield "rank", {"extra_body": {"hotshoe": {"rank": 65}}}
    yield "integrations", {"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}
    yield "hotshoe.rank", {"extra_body": {"hotshoe": {"rank": 4096}}}
    yield "method", {"extra_body": {"hotshoe": {"method": "full"}}}
    yield "rules", {"extra_body": {"hotshoe": {"rules": ["no_such_rule=warn"]}}}
    yield "hotshoe.minimum_score", {"extra_body": {"hotshoe": {"minimum_score": 2}}}
    yield "hotshoe.magic", {"extra_body": {"hotshoe": {"magic": 1}}}
    yield "metadata", {"metadata": {"key": "v" * 600}}


def test_what_cannot_be_a_job_is_refused_with_its_parameter(server: Server, file: str) -> None:
    other = sent(server, b"hello", "user_data", "hello.txt")
    before = len(list(server.openai.fine_tuning.jobs.list()))
    for param, change in refusals(file, other):
        with pytest.raises(openai.APIStatusError) as refused:
            server.openai.fine_tuning.jobs.create(**{"model": server.base.id, "training_file": file, **change})
        assert refused.value.status_code in (400, 422), refused.value
        assert refused.value.param == param, refused.value
    with pytest.raises(openai.NotFoundError):
        server.openai.fine_tuning.jobs.create(model="nobody", training_file=file)
    with pytest.raises(openai.NotFoundError):
        server.openai.fine_tuning.jobs.retrieve("ftjob-none")
    assert len(list(server.openai.fine_tuning.jobs.list())) == before


@pytest.mark.long
def test_a_server_that_ends_in_the_middle_goes_on_with_the_job_when_it_is_back(tmp_path: Path) -> None:
    base = load_base(tiny_qwen2(tmp_path / "base"))
    with ExitStack() as stack:
        server = stack.enter_context(running(base, tmp_path))
        job = created(server, sent(server, rows()), epochs=30, suffix="survivor")
        eventually(lambda: bool(steps(server, job)), SECONDS)
        server.stop()
        assert not trainers()
        left = tmp_path / "home" / "jobs" / "ftjob-of-long-ago"
        left.mkdir()
        server = stack.enter_context(running(base, tmp_path))
        job = ended(server, job)
        assert job.fine_tuned_model == "survivor@1"
        assert not left.exists()
        eventually(lambda: [path.name for path in (left.parent / job.id).iterdir()] == ["checkpoints"])
        assert "The server stops; the job goes on when it is back" in messages(server, job)


@pytest.mark.long
def test_the_process_that_trains_has_no_secret_of_ours(
    server: Server, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOTSHOE_API_KEY", "sk-not-for-training")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not for training either")
    job = created(server, file, epochs=500, suffix="watched")
    eventually(lambda: bool(trainers()), SECONDS)
    process = trainers()[0]
    found = process.environ()
    assert not [name for name in found if "KEY" in name or "SECRET" in name]
    eventually(lambda: process.nice() >= NICE)
    apart = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode == 0
    ours, its = (Path(f"/proc/{pid}/ns/net").readlink() for pid in ("self", process.pid))
    assert (ours != its) or not apart
    server.openai.fine_tuning.jobs.cancel(job.id)


def test_jobs_of_a_tenant_that_may_run_none_wait_and_nobody_claims_them_over_and_over(
    make_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server()
    registry, claims = server.services.registry, []
    claim = registry.claim_job
    monkeypatch.setattr(registry, "claim_job", lambda: claims.append(claim()))
    registry.add_tenant("default", UseLimits(running_jobs=0), actor="operator")
    registry.add_job(JobRow("", "default", "a", "router", "tiny", "file-1"))
    server.services.jobs.poke()
    time.sleep(1.0)
    assert claims in ([], [None], [None, None])


TURNS: dict[str, Callable[[Server, str], Any]] = {
    "retrieve": lambda server, job: server.openai.fine_tuning.jobs.retrieve(job),
    "cancel": lambda server, job: server.openai.fine_tuning.jobs.cancel(job),
    "pause": lambda server, job: server.openai.fine_tuning.jobs.pause(job),
    "events": lambda server, job: server.openai.fine_tuning.jobs.list_events(job),
    "checkpoints": lambda server, job: server.openai.fine_tuning.jobs.checkpoints.list(job),
}


@pytest.mark.parametrize("turn", list(TURNS))
def test_a_job_that_is_not_there_is_not_found(server: Server, turn: str) -> None:
    with pytest.raises(openai.NotFoundError, match="no fine-tuning job"):
        TURNS[turn](server, "ftjob-none")


def test_events_come_as_a_stream_until_the_job_has_ended(server: Server, first: FineTuningJob) -> None:
    path = f"/v1/fine_tuning/jobs/{first.id}/events"
    with server.http.stream("GET", path, params={"stream": "true"}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert [event["message"] for event in events] == list(reversed(messages(server, first)))
    params = {"stream": "true", "after": events[-2]["id"]}
    rest = server.http.get(path, params=params).text.split("\n\n")
    assert [json.loads(rest[0].removeprefix("data: "))["id"], *rest[1:]] == [events[-1]["id"], "data: [DONE]", ""]


@pytest.mark.long
def test_the_command_sends_data_watches_the_job_and_says_how_it_ended(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOTSHOE_URL", server.url)
    data = tmp_path / "rows.jsonl"
    data.write_bytes(rows())
    words = ["jobs", "create", str(data), "--name", "spoken", "--epochs", "1", "--alias", "new", "--watch"]
    done = CliRunner().invoke(build_app(), words)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "Files validated" in done.stderr and "succeeded, spoken@1" in done.stdout
    listed = CliRunner().invoke(build_app(), ["jobs", "ls"]).stdout
    assert "spoken@1" in listed and "succeeded" in listed
    job = next(iter(server.openai.fine_tuning.jobs.list())).id
    assert "spoken@1" in CliRunner().invoke(build_app(), ["jobs", "show", job]).stdout
    published = CliRunner().invoke(build_app(), ["jobs", "publish", job])
    assert published.exit_code == 0 and "spoken@1 is step " in published.stdout, published.output
    assert "no checkpoint of step 999" in str(
        CliRunner().invoke(build_app(), ["jobs", "publish", job, "--step", "999"]).exception
    )
    refused = CliRunner().invoke(build_app(), ["jobs", "pause", job])
    assert isinstance(refused.exception, ServerRefused) and "is succeeded" in str(refused.exception)
    data.write_text("not json\n")
    more = ["--rules", "rows_few=off", "--baseline", "off", "--watch"]
    failed = CliRunner().invoke(build_app(), [*words[:4], "wrong", *more])
    assert failed.exit_code == EXIT_FAILED and "data_invalid" in failed.stdout and ":1:" in failed.stdout
