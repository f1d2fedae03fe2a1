"""What a client asks of a fine-tuning job, in the words of OpenAI's client, checked and made a row."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from adapters.bases import PROJECTIONS
from adapters.errors import ConfigInvalid, InvalidRequest
from adapters.file_rows import new_id
from adapters.job_rows import JobRow
from adapters.types import check_name
from server.errors import Forbidden
from server.services import Caller

MOST_METADATA, LONGEST_KEY, LONGEST_VALUE = 16, 64, 512
MAX_SEED = 2**31 - 1
ID_LETTERS = 8  # of a job's id that name its adapter where nobody named it
AUTO = "auto"  # what the planner chooses
BOUNDS = {"n_epochs": (1, 1000), "batch_size": (1, 4096), "learning_rate_multiplier": (1e-4, 50)}
RUN_SETTINGS = ("method", "rank", "alpha", "target_modules", "max_length", "over_long", "rules")  # of ours
PRINTABLE, TAG = r"^[^\x00-\x1f\x7f]*$", r"^[^\x00-\x1f\x7f,]+$"  # a comma would part a tag in two
STRICT = ConfigDict(extra="forbid", strict=True)


class Hyperparameters(BaseModel):
    """OpenAI's three; `auto` is what the planner chooses."""

    model_config = STRICT
    n_epochs: int | str = AUTO
    batch_size: int | str = AUTO
    learning_rate_multiplier: float | int | str = AUTO

    def checked(self) -> dict[str, Any]:
        """The values; raises InvalidRequest for one that no run can have."""
        values: dict[str, Any] = self.model_dump()
        for name, (least, most) in BOUNDS.items():
            value = values[name]
            if value != AUTO and (isinstance(value, str) or not least <= value <= most):
                raise InvalidRequest(f"{name} is {value!r:.40}; it must be auto, or {least} to {most}.", param=name)
        return values


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


class Ours(BaseModel):
    """What OpenAI's client has no field for; it sends it in `extra_body`."""

    model_config = STRICT
    method: Literal["qlora", "lora", "full"] | None = None
    rank: Annotated[int, Field(ge=1, le=512)] | None = None
    alpha: Annotated[float, Field(gt=0, le=1e6)] | None = None
    target_modules: Annotated[list[str], Field(min_length=1, max_length=len(PROJECTIONS))] | None = None
    alias: str | None = None  # moved to the version once it is ready
    max_length: Annotated[int, Field(ge=2, le=10_000_000)] | None = None
    over_long: Literal["error", "cut", "drop"] | None = None
    rules: Annotated[list[str], Field(max_length=100)] | None = None  # levels of the data check's, CODE=warn
    baseline: Literal["off", "quick", "full"] | None = None  # before training; default quick
    minimum_score: Annotated[float, Field(ge=0, le=1)] | None = None


class Wandb(BaseModel):
    """Where a job's curves go at Weights & Biases."""

    model_config = STRICT
    project: str = Field(min_length=1, max_length=128, pattern=PRINTABLE)
    name: str | None = Field(None, max_length=128, pattern=PRINTABLE)
    entity: str | None = Field(None, max_length=128, pattern=PRINTABLE)
    tags: Annotated[list[Annotated[str, Field(max_length=64, pattern=TAG)]], Field(max_length=50)] | None = None


class Integration(BaseModel):
    """Of OpenAI's integrations the only one."""

    model_config = STRICT
    type: Literal["wandb"]
    wandb: Wandb


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
    integrations: Annotated[list[Integration], Field(max_length=1)] | None = None
    hotshoe: Ours = Ours()


def order_of(body: JobBody, caller: Caller) -> JobRow:
    """The job that is asked for; raises InvalidRequest, NameInvalid or Forbidden for what cannot be one."""
    _check_method(body)
    _check_metadata(body.metadata or {})
    job_id = new_id("ftjob-")
    adapter = body.suffix or job_id.removeprefix("ftjob-")[:ID_LETTERS]
    check_name(adapter, "suffix")
    if body.hotshoe.method == "full":
        raise InvalidRequest(
            "method full makes a base of its own, which this server cannot have beside the one that it serves: train "
            "it with `hotshoe train --method full` and start a server on it, or take lora or qlora here.",
            param="method",
        )
    _check_alias(body.hotshoe.alias, caller)
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


def _check_alias(alias: str | None, caller: Caller) -> None:
    """Moving an alias is a promote, whoever does it."""
    if alias is None:
        return
    check_name(alias, "alias")
    if alias.isdigit():
        raise InvalidRequest(f"Alias {alias!r} would read as a version number; choose a word.", param="alias")
    if "promote" not in caller.scopes:
        raise Forbidden("An alias is moved with the scope promote, which the key does not have.", param="alias")


def check_texts(body: JobBody) -> None:
    """Raises InvalidRequest for a character that was cut in two, which no JSON and no database takes."""
    try:
        json.dumps(body.model_dump(), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidRequest("A text of the request holds half a surrogate pair: write the character whole.") from None


def parent_of(job: JobRow) -> tuple[str, str, int] | None:
    """Tenant, name and number of the version that the job goes on from; None where it begins with the base."""
    named = job.request.get("from")
    return (job.tenant, named["name"], named["number"]) if named else None


def asked_of(job: JobRow) -> Mapping[str, Any]:
    """What it asks for that OpenAI's client has no field for."""
    asked: Mapping[str, Any] = job.request.get("hotshoe", {})
    return asked


def wandb_of(job: JobRow, server: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The variables by which Weights & Biases' client reports a job where it asks to; none where it does not."""
    asked = next((one["wandb"] for one in job.request.get("integrations") or ()), None)
    if asked is None:
        return {}
    named = {"WANDB_PROJECT": asked["project"], "WANDB_NAME": asked.get("name"), "WANDB_ENTITY": asked.get("entity")}
    named |= {
        "WANDB_TAGS": ",".join(asked.get("tags") or ()),
        "WANDB_DIR": str(folder),
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
    }
    return {**server, **{key: value for key, value in named.items() if value}}


def settings_of(job: JobRow) -> dict[str, Any]:
    """What the job asks for as a TrainingConfig has it; what is left open is left out."""
    asked = {key: value for key, value in job.request["hyperparameters"].items() if value != AUTO}
    names = {"n_epochs": "epochs", "batch_size": "batch_size", "learning_rate_multiplier": "learning_rate_multiplier"}
    ours = job.request["hotshoe"]
    values = {names[key]: float(value) if key != "batch_size" else value for key, value in asked.items()}
    values |= {key: ours[key] for key in RUN_SETTINGS if key in ours}
    if job.request.get("integrations"):
        values["report_to"] = ["tensorboard", "wandb"]
    if (pass_size := job.request.get("pass_size")) is not None:
        values["pass_size"] = pass_size  # a try with more of them ran out of memory
    return {**values, "seed": job.seed, "name": job.adapter}


def check_settings(job: JobRow) -> None:
    """Raises InvalidRequest for a value that no run can have."""
    from training.jobs import check_rules, config_of

    try:
        check_rules(config_of({**settings_of(job), "data": "data"}))
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
    return (inner or body.hyperparameters or Hyperparameters()).checked()


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
