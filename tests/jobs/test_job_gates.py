"""What stands before a job's training and between its run and a version, and its checkpoints as versions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob
from safetensors.numpy import load_file

from adapters.canonical import WEIGHTS_FILE
from adapters.job_rows import JobRow
from server.job_folders import JobFolders, folder_bytes
from server.job_order import settings_of, wandb_of
from tests.fixtures.jobs import created, ended, messages, rows, sent, weights
from tests.fixtures.service import Server, error_of, eventually


@pytest.fixture(scope="module")
def file(server: Server) -> str:
    return sent(server, rows())


@pytest.fixture(scope="module")
def validation(server: Server) -> str:
    return sent(server, rows(60)[len(rows()) :])


@pytest.fixture(scope="module")
def done(server: Server, file: str, validation: str) -> FineTuningJob:
    made = created(server, file, suffix="lights", validation_file=validation, extra_body=ours(minimum_score=0))
    return ended(server, made)


def ours(**asked: Any) -> dict[str, Any]:
    return {"hotshoe": asked}


def figures(server: Server, job: FineTuningJob, begins: str) -> dict[str, Any]:
    """What an event says in figures."""
    events = server.openai.fine_tuning.jobs.list_events(job.id, limit=100)
    found = next(event for event in events if event.message.startswith(begins))
    data: dict[str, Any] = found.data  # type: ignore[assignment]
    return data


def checkpoint_ids(server: Server, job: FineTuningJob) -> dict[int, str]:
    return {one.step_number: one.id for one in server.openai.fine_tuning.jobs.checkpoints.list(job.id, limit=100)}


def publish(server: Server, job: FineTuningJob, checkpoint: str) -> Any:
    return server.http.post(f"/v1/fine_tuning/jobs/{job.id}/checkpoints/{checkpoint}/publish")


def test_the_base_is_asked_well_before_anything_is_trained(server: Server, done: FineTuningJob) -> None:
    said = list(reversed(messages(server, done)))
    order = ["Files validated", "Planned: 12 steps", "Baseline: ", "Fine-tuning job started", "Step 1"]
    places = [next(at for at, line in enumerate(said) if line.startswith(start)) for start in order]
    assert places == sorted(places)
    found = figures(server, done, "Baseline: ")
    assert [one["name"] for one in found["prompts"]] and found["data"]["validation"]["rows"] == 12
    assert [one["name"] for one in found["rivals"]] == ["majority", "tfidf_linear"]
    card = server.http.get("/v1/adapters/lights/versions/1/card").json()
    assert card["baseline"]["best_prompt"] == found["best_prompt"]


@pytest.mark.long
def test_a_full_baseline_has_prompts_with_examples_and_none_asks_nothing(
    server: Server, file: str, validation: str
) -> None:
    full = ended(server, created(server, file, epochs=1, validation_file=validation, extra_body=ours(baseline="full")))
    found = figures(server, full, "Baseline: ")
    assert any("examples" in one["name"] for one in found["prompts"])
    assert "linear_probe" in [one["name"] for one in found["rivals"]]
    none = ended(server, created(server, file, epochs=1, validation_file=validation, extra_body=ours(baseline="off")))
    assert not any(line.startswith("Baseline") for line in messages(server, none))


@pytest.mark.long
def test_a_validation_file_that_is_the_training_file_again_costs_the_baseline_and_not_the_job(
    server: Server, file: str
) -> None:
    job = ended(server, created(server, file, epochs=1, validation_file=file))
    assert any(line.startswith("The baseline was left out") for line in messages(server, job))


def test_below_the_minimum_score_nothing_is_published_and_no_alias_moves(
    server: Server, file: str, validation: str, done: FineTuningJob
) -> None:
    asked = ours(minimum_score=1.0, alias="stable", baseline="off")
    job = created(server, file, epochs=1, suffix="lights", validation_file=validation, extra_body=asked)
    job = ended(server, job, "failed")
    assert job.error is not None and (job.error.code, job.error.param) == ("score_too_low", "minimum_score")
    assert "below the minimum of 1" in job.error.message and job.fine_tuned_model is None
    assert server.say("lights").json()["model"] == "lights@1"
    assert checkpoint_ids(server, job)


def test_a_minimum_that_no_rows_can_show_fails_before_training(server: Server, file: str) -> None:
    job = ended(server, created(server, file, extra_body=ours(minimum_score=0.5)), "failed")
    assert job.error is not None and (job.error.code, job.error.param) == ("config_invalid", "minimum_score")
    assert "give a validation_file" in job.error.message
    assert not any(line.startswith("Step") for line in messages(server, job))


def test_what_the_gate_found_is_attached_to_the_job_that_it_blocks(server: Server) -> None:
    secret = rows(8).replace(b"number 3", b"card 4539 1488 0343 6467")
    job = ended(server, created(server, sent(server, secret)), "failed")
    assert job.error is not None and "card_number" in job.error.message and job.error.param == "training_file"
    assert not any(message.startswith("Step") for message in messages(server, job))
    report = json.loads(server.openai.files.content(job.result_files[0]).text)
    assert report["verdict"] == "block" and "card_number" in [finding["code"] for finding in report["findings"]]
    assert server.openai.files.retrieve(job.result_files[0]).filename == f"{job.id}-data-check.json"
    assert str(server.services.settings.home) not in json.dumps(report)


def test_a_checkpoint_becomes_a_version_of_its_own_once(server: Server, done: FineTuningJob) -> None:
    ids = checkpoint_ids(server, done)
    kept = server.services.jobs.folders.of(done.id) / "checkpoints"
    first = min(int(path.name) for path in kept.iterdir())
    made = publish(server, done, ids[first])
    assert made.status_code == 200, made.text
    version = made.json()
    assert (version["name"], version["status"] in ("quarantined", "ready")) == ("lights", True)
    assert publish(server, done, ids[first]).json()["version"] == version["version"]
    found = {
        one.step_number: one.fine_tuned_model_checkpoint
        for one in server.openai.fine_tuning.jobs.checkpoints.list(done.id, limit=100)
    }
    model = f"lights@{version['version']}"
    assert found[first] == model and found[12].startswith("lights:ckpt-step-")
    eventually(lambda: server.say(model).status_code == 200)
    card = server.http.get(f"/v1/adapters/lights/versions/{version['version']}/card").json()
    assert card["checkpoint"]["step"] == first and card["checkpoint"]["job"] == done.id
    page = server.http.get(f"/v1/adapters/lights/versions/{version['version']}/card", params={"form": "html"})
    assert page.status_code == 200


def test_the_last_checkpoint_has_the_weights_that_were_published(
    server: Server, done: FineTuningJob, tmp_path: Path
) -> None:
    (tmp_path / "published").write_bytes(weights(server, done))
    kept = server.services.jobs.folders.of(done.id) / "checkpoints"
    names = sorted(kept.iterdir(), key=lambda path: int(path.name))
    assert len(names) == 3  # the newest; of older ones the figures alone
    best, last = load_file(tmp_path / "published"), load_file(names[-1] / WEIGHTS_FILE)
    assert {name: value.shape for name, value in best.items()} == {name: value.shape for name, value in last.items()}


def test_a_checkpoint_whose_files_are_gone_is_refused(server: Server, file: str, done: FineTuningJob) -> None:
    job = ended(server, created(server, file, epochs=1, suffix="short"))
    step, one = max(checkpoint_ids(server, job).items())
    path = f"/v1/fine_tuning/jobs/{job.id}/checkpoints/{one}"
    assert server.http.delete(path).json() == {"id": one, "object": "fine_tuning.job.checkpoint", "deleted": True}
    refused = publish(server, job, one)
    assert refused.status_code == 409 and refused.headers["x-should-retry"] == "false"
    assert error_of(refused)["param"] == "checkpoint_id"
    assert publish(server, job, "ftckpt_none").status_code == 404
    assert publish(server, done, one).status_code == 404  # another job's
    assert step in checkpoint_ids(server, job)


@pytest.mark.long
def test_when_their_time_is_over_the_checkpoints_of_an_ended_job_go(server: Server, file: str) -> None:
    job = ended(server, created(server, file, epochs=1, suffix="passing"))
    folders = server.services.jobs.folders
    eventually(lambda: [path.name for path in folders.of(job.id).iterdir()] == ["checkpoints"])
    row = server.services.registry.get_job("default", job.id)
    eventually(lambda: server.services.registry.get_job("default", job.id).stored_bytes > 0)
    assert folder_bytes(folders.of(job.id)) >= row.stored_bytes > 0
    JobFolders(folders.root, folders.registry, 0.0).sweep()
    assert not folders.of(job.id).exists()
    assert server.services.registry.get_job("default", job.id).stored_bytes == 0
    listed = server.openai.fine_tuning.jobs.checkpoints.list(job.id)
    assert not any(one.model_dump()["hotshoe"]["is_kept"] for one in listed)


def test_a_jobs_process_alone_knows_where_and_as_whom_it_reports(tmp_path: Path) -> None:
    wandb = {"type": "wandb", "wandb": {"project": "lights", "name": "first", "tags": ["a", "b"]}}
    request = {"hyperparameters": {}, "hotshoe": {}, "integrations": [wandb]}
    job = JobRow("ftjob-1", "default", "a", "lights", "t", "f", request=request)
    server = {"WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": "https://wandb.internal"}
    found = wandb_of(job, server, tmp_path)
    assert found == {
        **server,
        "WANDB_PROJECT": "lights",
        "WANDB_NAME": "first",
        "WANDB_TAGS": "a,b",
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",  # what the process tells has paths of ours
    }
    assert settings_of(job)["report_to"] == ["tensorboard", "wandb"]
    other = replace(job, request={**request, "integrations": []})
    assert wandb_of(other, server, tmp_path) == {} and "report_to" not in settings_of(other)


def test_weights_and_biases_are_refused_where_the_server_has_no_key(server: Server, file: str) -> None:
    wandb: Any = [{"type": "wandb", "wandb": {"project": "lights"}}]
    with pytest.raises(openai.BadRequestError, match="HOTSHOE_WANDB_API_KEY"):
        created(server, file, integrations=wandb)
