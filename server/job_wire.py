"""Fine-tuning jobs on the wire: OpenAI's own types, with what they lack here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.fine_tuning_job import Error, Hyperparameters, Method
from openai.types.fine_tuning.fine_tuning_job_wandb_integration_object import FineTuningJobWandbIntegrationObject
from openai.types.fine_tuning.jobs.fine_tuning_job_checkpoint import FineTuningJobCheckpoint, Metrics
from openai.types.fine_tuning.supervised_hyperparameters import SupervisedHyperparameters
from openai.types.fine_tuning.supervised_method import SupervisedMethod
from pydantic import BaseModel, Field

from adapters.job_history import JobCheckpoint, JobEvent, event_id
from adapters.job_rows import JobRow, JobStatus, Phase
from server.job_order import AUTO, BOUNDS

ORGANISATION = "org-hotshoe"


class Problems(Error):
    """Why a job failed; `problems` has each bad line of its data, as file:line."""

    problems: list[dict[str, Any]] = Field(default_factory=list)


class OurPart(BaseModel):
    """What OpenAI's job has no field for."""

    status: str  # paused, too, which theirs has no word for
    phase: str
    is_working: bool  # its process is there; a job that was paused or cancelled may still be saving
    attempts: int
    run_seconds: float  # of its processes
    stored_bytes: int  # of its folder
    progress: Mapping[str, Any] | None
    settings: Mapping[str, Any] | None
    asked: Mapping[str, Any]
    adapter: str
    card: str | None  # where the report card of its version is


class Job(FineTuningJob):
    """A job; `hotshoe` is ours."""

    error: Problems | None = None
    hotshoe: OurPart


class JobList(BaseModel):
    """A page of jobs."""

    object: Literal["list"] = "list"
    data: list[Job]
    has_more: bool


class EventList(BaseModel):
    """A page of what a job said, newest first."""

    object: Literal["list"] = "list"
    data: list[FineTuningJobEvent]
    has_more: bool


class OurCheckpoint(BaseModel):
    """What OpenAI's checkpoint has no field for."""

    is_kept: bool  # its files are there, to be published
    is_published: bool  # as the version that fine_tuned_model_checkpoint names


class Checkpoint(FineTuningJobCheckpoint):
    """A checkpoint; `hotshoe` is ours."""

    hotshoe: OurCheckpoint


class CheckpointList(BaseModel):
    """A page of a job's checkpoints, newest first."""

    object: Literal["list"] = "list"
    data: list[Checkpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool


def job_of(job: JobRow, *, is_working: bool) -> Job:
    """One job on the wire."""
    is_done = job.status is JobStatus.SUCCEEDED
    hyperparameters = hyperparameters_of(job)
    supervised = SupervisedMethod(hyperparameters=SupervisedHyperparameters(**hyperparameters))
    return Job(
        id=job.id,
        object="fine_tuning.job",
        created_at=int(job.created_at),
        finished_at=_whole(job.finished_at),
        estimated_finish=_estimate(job),
        status=_status(job),
        model=job.model,
        fine_tuned_model=f"{job.adapter}@{job.number}" if is_done else None,
        organization_id=ORGANISATION,
        training_file=job.training_file,
        validation_file=job.validation_file,
        result_files=[job.result_file] if job.status.is_final and job.result_file else [],
        trained_tokens=job.trained_tokens if is_done else None,
        seed=job.seed,
        error=Problems(**job.error) if job.error else None,
        hyperparameters=Hyperparameters(**hyperparameters),
        method=Method(type="supervised", supervised=supervised),
        integrations=[FineTuningJobWandbIntegrationObject(**one) for one in job.request.get("integrations") or ()],
        metadata=job.request.get("metadata"),
        hotshoe=OurPart(
            status=job.status,
            phase=job.phase,
            is_working=is_working,
            attempts=job.attempts,
            run_seconds=round(job.run_seconds, 1),
            stored_bytes=job.stored_bytes,
            progress=job.progress,
            settings=job.settings,
            asked=job.request.get("hotshoe", {}),
            adapter=job.adapter,
            card=f"/v1/adapters/{job.adapter}/versions/{job.number}/card" if is_done else None,
        ),
    )


def hyperparameters_of(job: JobRow) -> dict[str, Any]:
    """As asked until they are known; then what was used, "auto" resolved."""
    asked = {**dict.fromkeys(BOUNDS, AUTO), **job.request["hyperparameters"]}
    if job.settings is None:
        return asked
    rate = asked["learning_rate_multiplier"]
    return {
        "n_epochs": round(job.settings["epochs"]),
        "batch_size": job.settings["batch_size"],
        "learning_rate_multiplier": 1.0 if rate == AUTO else rate,
    }


def event_of(event: JobEvent) -> FineTuningJobEvent:
    """One event on the wire."""
    return FineTuningJobEvent(
        id=event_id(event.id),
        object="fine_tuning.job.event",
        created_at=int(event.at),
        level=event.level,  # type: ignore[arg-type]  # the rows have no other
        message=event.message,
        type="message" if event.data is None else "metrics",
        data=dict(event.data) if event.data is not None else None,
    )


def checkpoint_of(checkpoint: JobCheckpoint, job: JobRow) -> Checkpoint:
    """One checkpoint on the wire."""
    found, number = checkpoint.metrics, checkpoint.number
    return Checkpoint(
        id=checkpoint.id,
        object="fine_tuning.job.checkpoint",
        created_at=int(checkpoint.created_at),
        fine_tuning_job_id=job.id,
        fine_tuned_model_checkpoint=f"{job.adapter}@{number}"
        if number
        else f"{job.adapter}:ckpt-step-{checkpoint.step}",
        metrics=Metrics(
            step=checkpoint.step, train_loss=found.get("loss"), full_valid_loss=found.get("validation_loss")
        ),
        step_number=checkpoint.step,
        hotshoe=OurCheckpoint(is_kept=checkpoint.is_kept, is_published=number is not None),
    )


def _status(job: JobRow) -> Any:
    """OpenAI knows no paused job: it waits, as a queued one does, until it is resumed."""
    if job.status is JobStatus.PAUSED:
        return "queued"
    if job.status is JobStatus.RUNNING and job.phase in (Phase.NEW, Phase.VALIDATING):
        return "validating_files"
    return str(job.status)


def _estimate(job: JobRow) -> int | None:
    left = (job.progress or {}).get("ends_at")
    return int(left) if left and job.status is JobStatus.RUNNING else None


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
