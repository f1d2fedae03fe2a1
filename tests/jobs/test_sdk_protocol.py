"""Every method of OpenAI's client that fine-tuning needs, and what goes over the wire for it, beside what was recorded.

What is recorded are shapes: names and types of fields, methods, paths, status codes. A change of it is a change of the
interface, and is recorded anew with `HOTSHOE_RECORD=1 pytest tests/jobs/test_sdk_protocol.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import pytest
from openai.resources.files import Files
from openai.resources.fine_tuning.jobs import Jobs
from openai.resources.fine_tuning.jobs.checkpoints import Checkpoints
from openai.resources.models import Models
from openai.resources.uploads import Parts, Uploads
from openai.types import FileDeleted, FileObject, Model, ModelDeleted, Upload
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from openai.types.uploads import UploadPart
from pydantic import BaseModel

from adapters.limits import UseLimits
from tests.fixtures.jobs import ended, rows
from tests.fixtures.service import Server

RECORDED = Path(__file__).parent / "recorded" / "fine_tuning.json"
RESOURCES = {
    "files": Files,
    "uploads": Uploads,
    "uploads.parts": Parts,
    "models": Models,
    "fine_tuning.jobs": Jobs,
    "fine_tuning.jobs.checkpoints": Checkpoints,
}
NO_METHODS = ("with_raw_response", "with_streaming_response", "parts", "checkpoints")
DEPRECATED = ("files.retrieve_content",)  # files.content by its old name
OURS = ("hotshoe", "sha256", "bytes", "parts", "root", "parent")  # fields that OpenAI's types lack
Shape = Any
T = TypeVar("T", bound=BaseModel)


@dataclass
class Recorder:
    """Notes what one client sends and gets, under the method that is called."""

    calls: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    method: str = ""

    def client(self, server: Server) -> openai.OpenAI:
        hooks: dict[str, list[Callable[..., Any]]] = {"response": [self.note]}
        http = httpx.Client(event_hooks=hooks, headers=server.headers)
        return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", http_client=http, max_retries=0)

    def note(self, response: httpx.Response) -> None:
        response.read()
        request = response.request
        is_json = response.headers.get("content-type", "").startswith("application/json")
        body, kind = request.read(), request.headers.get("content-type", "none").partition(";")[0]
        call = {
            "request": f"{request.method} {plain(request.url.path)}",
            "query": sorted(request.url.params),
            "body": shape(json.loads(body)) if kind == "application/json" and body else kind,
            "status": response.status_code,
            "answer": shape(response.json()) if is_json else response.headers.get("content-type", ""),
        }
        made = self.calls.setdefault(self.method, [])
        if call not in made:
            made.append(call)

    def of(self, method: str) -> Recorder:
        self.method = method
        return self


def plain(path: str) -> str:
    """The path with ids as what they are ids of."""
    path = re.sub(r"(ftjob|file|upload|ftckpt)[-_][0-9a-f]+", r"{\1}", path)
    return re.sub(r"/models/.+", "/models/{model}", path)


def shape(value: Any) -> Shape:
    """Names and types; of a list what its first has; of `hotshoe` the names alone."""
    if isinstance(value, dict):
        return {name: sorted(one) if name == "hotshoe" else shape(one) for name, one in sorted(value.items())}
    if isinstance(value, list):
        return [shape(one) for one in value[:1]]
    names = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
    return names[type(value)]


@pytest.fixture(scope="module")
def recorded(server: Server) -> dict[str, list[dict[str, Any]]]:
    """All methods called once, in an order in which each has something to do."""
    recorder = Recorder()
    with recorder.client(server) as client:
        file = use_files(recorder, client)
        use_uploads(recorder, client)
        job = use_jobs(recorder, client, server, file)
        use_models(recorder, client, str(job.fine_tuned_model))
    return recorder.calls


def use_files(recorder: Recorder, client: openai.OpenAI) -> str:
    """A file's id, of several that came and went."""
    recorder.of("files.create")
    file = checked(client.files.create(file=("rows.jsonl", rows()), purpose="fine-tune"), FileObject)
    other = client.files.create(file=("more.jsonl", rows(4)), purpose="fine-tune")
    recorder.of("files.wait_for_processing")
    checked(client.files.wait_for_processing(file.id), FileObject)
    recorder.of("files.retrieve")
    checked(client.files.retrieve(file.id), FileObject)
    recorder.of("files.content")
    assert client.files.content(file.id).read() == rows()
    recorder.of("files.list")
    newest = [checked(one, FileObject).id for one in client.files.list(limit=1)]
    oldest = [one.id for one in client.files.list(limit=1, order="asc", purpose="fine-tune")]
    assert newest == [other.id, file.id] == list(reversed(oldest))
    recorder.of("files.delete")
    assert checked(client.files.delete(other.id), FileDeleted).deleted
    return file.id


def use_uploads(recorder: Recorder, client: openai.OpenAI) -> None:
    content = rows(8)
    asked: Any = {"filename": "rows.jsonl", "purpose": "fine-tune", "mime_type": "text/jsonl", "bytes": len(content)}
    recorder.of("uploads.create")
    upload = checked(client.uploads.create(**asked), Upload)
    recorder.of("uploads.parts.create")
    last = checked(client.uploads.parts.create(upload.id, data=content[100:]), UploadPart)
    first = client.uploads.parts.create(upload.id, data=content[:100])
    recorder.of("uploads.complete")
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    done = checked(client.uploads.complete(upload.id, part_ids=[first.id, last.id], md5=digest), Upload)
    assert done.status == "completed" and done.file is not None
    assert client.files.content(done.file.id).read() == content
    recorder.of("uploads.cancel")
    assert checked(client.uploads.cancel(client.uploads.create(**asked).id), Upload).status == "cancelled"
    recorder.of("uploads.upload_file_chunked")
    whole = checked(
        client.uploads.upload_file_chunked(
            file=content, filename="r.jsonl", bytes=len(content), mime_type="text/jsonl", purpose="fine-tune"
        ),
        Upload,
    )
    assert whole.status == "completed"


def use_jobs(recorder: Recorder, client: openai.OpenAI, server: Server, file: str) -> FineTuningJob:
    """A job that succeeded. Those that are turned wait meanwhile: their tenant may run none."""
    jobs, registry = client.fine_tuning.jobs, server.services.registry
    registry.add_tenant("default", UseLimits(running_jobs=0), actor="operator")
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 8}}}
    recorder.of("fine_tuning.jobs.create")
    made = jobs.create(
        model=server.base.id,
        training_file=file,
        method=method,
        suffix="lights",
        seed=3,
        metadata={"team": "home"},
        extra_body={"hotshoe": {"rank": 4, "alpha": 8, "baseline": "off"}},
    )
    job = checked(made, FineTuningJob)
    other = jobs.create(model=server.base.id, training_file=file)
    for verb in ("pause", "resume", "cancel"):
        recorder.of(f"fine_tuning.jobs.{verb}")
        checked(getattr(jobs, verb)(other.id), FineTuningJob)
    registry.add_tenant("default", UseLimits(), actor="operator")
    server.services.jobs.poke()
    ended(server, job)
    recorder.of("fine_tuning.jobs.retrieve")
    job = checked(jobs.retrieve(job.id), FineTuningJob)
    recorder.of("fine_tuning.jobs.list")
    assert [checked(one, FineTuningJob).id for one in jobs.list(limit=1)] == [other.id, job.id]
    assert [one.id for one in jobs.list(metadata={"team": "home"})] == [job.id]
    recorder.of("fine_tuning.jobs.list_events")
    events = [checked(one, FineTuningJobEvent) for one in jobs.list_events(job.id, limit=5)]
    assert len({event.id for event in events}) == len(events) > 5
    recorder.of("fine_tuning.jobs.checkpoints.list")
    steps = [checked(one, FineTuningJobCheckpoint).step_number for one in jobs.checkpoints.list(job.id, limit=2)]
    assert steps == sorted(steps, reverse=True) and steps
    return job


def use_models(recorder: Recorder, client: openai.OpenAI, model: str) -> None:
    recorder.of("models.list")
    assert "lights" in [checked(one, Model).id for one in client.models.list()]
    recorder.of("models.retrieve")
    Model.model_validate(client.models.retrieve(model).model_dump())  # with all of the version's row beside it
    recorder.of("models.delete")
    assert checked(client.models.delete(model), ModelDeleted).deleted
    recorder.of("models.list")
    assert "lights" not in [one.id for one in client.models.list()]


def checked(found: T, kind: type[T]) -> T:
    """What the client has taken as it came, held against OpenAI's own type; beyond it only what is ours by name."""
    kind.model_validate(found.model_dump())
    extra = set(found.model_extra or {}) - set(OURS)
    assert not extra, (kind, extra)
    return found


def test_every_method_of_the_client_is_recorded(recorded: dict[str, Any]) -> None:
    methods = {
        f"{name}.{method}"
        for name, resource in RESOURCES.items()
        for method in dir(resource)
        if not method.startswith("_") and method not in NO_METHODS
    }
    assert set(recorded) == methods - set(DEPRECATED)


def test_the_protocol_is_the_recorded_one(recorded: dict[str, Any]) -> None:
    if os.environ.get("HOTSHOE_RECORD"):
        RECORDED.parent.mkdir(exist_ok=True)
        RECORDED.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    expected = json.loads(RECORDED.read_text("utf-8"))
    assert recorded == expected


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda client, file: client.fine_tuning.jobs.create(model="m", training_file=file, method={"type": "dpo"}),
            "dpo",
        ),
        (
            lambda client, file: client.fine_tuning.jobs.create(
                model="m", training_file=file, method={"type": "reinforcement"}
            ),
            "reinforcement",
        ),
        (
            lambda client, file: client.batches.create(
                input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h"
            ),
            "atches",
        ),
    ],
)
def test_what_is_not_offered_is_refused_by_name(
    server: Server, call: Callable[[openai.OpenAI, str], Any], says: str
) -> None:
    with pytest.raises(openai.APIStatusError, match=says) as refused:
        call(server.openai, "file-1")
    assert refused.value.status_code in (400, 404)
