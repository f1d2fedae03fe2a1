"""What a client asks of a fine-tuning job, in the words of OpenAI's client, checked and made a row."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from adapters.errors import ConfigInvalid, InvalidRequest
from adapters.file_rows import new_id
from adapters.job_rows import JobRow
from adapters.types import check_name
from server.services import Caller
from training.config import PROJECTIONS

MOST_METADATA, LONGEST_KEY, LONGEST_VALUE = 16, 64, 512
MAX_SEED = 2**31 - 1
ID_LETTERS = 8  # of a job's id that name its adapter where nobody named it
Auto = Literal["auto"]
STRICT = ConfigDict(extra="forbid", strict=True)


class Hyperparameters(BaseModel):
    """OpenAI's three; `auto` is what the planner chooses."""

    model_config = STRICT
    n_epochs: Auto | int = Field("auto")
    batch_size: Auto | int = Field("auto")
    learning_rate_multiplier: Auto | float | int = Field("auto")


class Supervised(BaseModel):
    model_config = STRICT
    hyperparameters: Hyperparameters | None = None


class Method(BaseModel):
    """How it is trained; of OpenAI's kinds only the supervised one."""

    model_config = STRICT
    type: str
    supervised: Supervised | None = None
    dpo: Mapping[str, Any] | None = None
    reinforcement: Mapping[str, Any] | None = None


class Wandb(BaseModel):
    model_config = STRICT
    project: str = Field(min_length=1, max_length=128)
    name: str | None = Field(None, max_length=128)
    entity: str | None = Field(None, max_length=128)
    tags: list[str] | None = Field(None, max_length=64)


class Integration(BaseModel):
    model_config = STRICT
    type: Literal["wandb"]
    wandb: Wandb


class Ours(BaseModel):
    """What OpenAI's client has no field for; it sends it in `extra_body`."""

    model_config = STRICT
    method: Literal["qlora", "lora"] | None = None
    rank: int | None = Field(None, ge=1, le=512)
    alpha: float | int | None = Field(None, gt=0)
    target_modules: list[str] | None = Field(None, min_length=1, max_length=len(PROJECTIONS))
    alias: str | None = None  # moved to the version once it is ready


class JobBody(BaseModel):
    """The body of `fine_tuning.jobs.create`."""

    model_config = STRICT
    model: str = Field(min_length=1, max_length=255)
    training_file: str = Field(max_length=64)
    validation_file: str | None = Field(None, max_length=64)
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    suffix: str | None = Field(None, max_length=64)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    metadata: dict[str, str] | None = None
    integrations: list[Integration] | None = Field(None, max_length=1)
    hotshoe: Ours = Ours()


def order_of(body: JobBody, caller: Caller) -> JobRow:
    """The job that is asked for; raises InvalidRequest or NameInvalid for what cannot be one."""
    _check_method(body)
    _check_metadata(body.metadata or {})
    job_id = new_id("ftjob-")
    adapter = body.suffix or job_id.removeprefix("ftjob-")[:ID_LETTERS]
    check_name(adapter, "suffix")
    if body.hotshoe.alias is not None:
        check_name(body.hotshoe.alias, "alias")
    request = {
        "hyperparameters": _hyperparameters(body),
        "hotshoe": body.hotshoe.model_dump(exclude_none=True),
        "metadata": body.metadata,
        "integrations": [one.model_dump(exclude_none=True) for one in body.integrations or ()],
    }
    return JobRow(
        id=job_id,
        tenant=caller.tenant,
        actor=caller.actor,
        adapter=adapter,
        model=body.model,
        training_file=body.training_file,
        validation_file=body.validation_file,
        seed=secrets.randbelow(MAX_SEED) if body.seed is None else body.seed,
        request=request,
    )


def settings_of(job: JobRow) -> dict[str, Any]:
    """What the job asks for as a TrainingConfig has it; what is left open is left out."""
    asked = {key: value for key, value in job.request["hyperparameters"].items() if value != "auto"}
    names = {"n_epochs": "epochs", "batch_size": "batch_size", "learning_rate_multiplier": "learning_rate_multiplier"}
    ours = job.request["hotshoe"]
    values = {names[key]: float(value) if key != "batch_size" else value for key, value in asked.items()}
    values |= {key: ours[key] for key in ("method", "rank", "alpha", "target_modules") if key in ours}
    return {**values, "seed": job.seed, "name": job.adapter}


def check_settings(job: JobRow) -> None:
    """Raises InvalidRequest for a value that no run can have."""
    from training.job import config_of

    try:
        config_of({**settings_of(job), "data": "data"})
    except ConfigInvalid as error:
        raise InvalidRequest(error.message, param=error.param) from error


def _check_method(body: JobBody) -> None:
    kind = body.method.type if body.method is not None else "supervised"
    if kind != "supervised":
        raise InvalidRequest(
            f"method.type is {kind[:40]!r}; this server trains supervised jobs only, not by preference (dpo) or "
            "reinforcement.",
            param="method.type",
        )
    if body.method is not None and (body.method.dpo or body.method.reinforcement):
        raise InvalidRequest("method has settings of another type than supervised.", param="method")


def _hyperparameters(body: JobBody) -> dict[str, Any]:
    """Those of the method; else the older ones beside it."""
    inner = body.method.supervised.hyperparameters if body.method and body.method.supervised else None
    return (inner or body.hyperparameters or Hyperparameters()).model_dump()


def _check_metadata(metadata: Mapping[str, str]) -> None:
    if len(metadata) > MOST_METADATA:
        raise InvalidRequest(f"metadata has {len(metadata)} keys; at most {MOST_METADATA} are taken.", param="metadata")
    for key, value in metadata.items():
        if len(key) > LONGEST_KEY or len(value) > LONGEST_VALUE:
            raise InvalidRequest(
                f"metadata takes keys of at most {LONGEST_KEY} letters and values of at most {LONGEST_VALUE}; "
                f"{key[:20]!r} has {len(key)} and {len(value)}.",
                param="metadata",
            )
