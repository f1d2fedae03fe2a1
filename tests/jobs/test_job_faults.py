"""What can go wrong under a job: each ends it as failed, with code, message and param, and no alias moves."""

from __future__ import annotations

import json
import resource
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai.types.fine_tuning import FineTuningJob
from safetensors.numpy import load_file, save_file

import server.job_training
from adapters.bases import load_base
from adapters.job_rows import JobRow, Phase
from adapters.limits import UseLimits
from tests.fixtures.bases import tiny_qwen2
from tests.fixtures.jobs import SECONDS, created, ended, messages, rows, sent, steps, trainers
from tests.fixtures.service import Server, eventually, running

WEIGHTS = "model.safetensors"


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Server]:
    with running(load_base(tiny_qwen2(tmp_path / "base")), tmp_path) as server:
        server.pushed("router")
        yield server


def damage_upload(server: Server, file: str) -> None:
    """One byte of the file on the disk is another, and it is still JSON."""
    path = server.services.files.store.path(file)
    path.write_bytes(path.read_bytes().replace(b"kitchen", b"kitchem", 1))


def poison_base(server: Server, file: str) -> None:
    """A weight of the base is no number: the loss is none."""
    path = server.base.folder / WEIGHTS
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("mlp.down_proj.weight"))
    tensors[name] = tensors[name] * float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def truncate_base(server: Server, file: str) -> None:
    path = server.base.folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


@dataclass(frozen=True)
class Fault:
    """What is done before the job is created, and what the job says."""

    act: Callable[[Server, str], None]
    code: str
    param: str | None
    says: str


FAULTS = {
    "corrupted upload": Fault(damage_upload, "storage_damaged", "training_file", "send it again"),
    "NaN loss": Fault(poison_base, "training_stopped", None, "loss is nan at step 1"),
    "base that does not load": Fault(truncate_base, "base_invalid", None, "cannot be read"),
}


@pytest.mark.parametrize(
    "name", ["corrupted upload", "NaN loss", pytest.param("base that does not load", marks=pytest.mark.long)]
)
def test_a_fault_fails_the_job_with_its_reason_and_the_alias_stays(one: Server, name: str) -> None:
    fault, file = FAULTS[name], sent(one, rows())
    fault.act(one, file)
    job = ended(one, created(one, file, suffix="router", extra_body={"hotshoe": {"alias": "stable"}}), "failed")
    check(one, job, fault.code, fault.param, fault.says)


def check(server: Server, job: FineTuningJob, code: str, param: str | None, says: str) -> None:
    assert job.error is not None and (job.error.code, job.error.param) == (code, param), job.error
    assert says in job.error.message
    told = json.dumps([job.model_dump(), messages(server, job)])
    assert str(server.scratch) not in told
    assert job.fine_tuned_model is None and server.say("router").json()["model"] == "router@1"


def test_a_full_disk_fails_the_job_and_its_last_checkpoint_stays(one: Server) -> None:
    file = sent(one, rows())
    job = created(one, file, epochs=200, suffix="router")
    eventually(lambda: bool(steps(one, job)), SECONDS)
    for process in trainers():
        process.rlimit(psutil.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))  # no file may be larger
    job = ended(one, job, "failed")
    check(one, job, "storage_full", None, "The disk is full")
    assert steps(one, job)


LIMITS: dict[str, tuple[UseLimits, str, str]] = {
    "time": (UseLimits(job_seconds=1), "quota_exceeded", "job_seconds"),
    "disk": (UseLimits(job_bytes=1), "payload_too_large", "job_bytes"),
}


@pytest.mark.parametrize("name", ["time", pytest.param("disk", marks=pytest.mark.long)])
def test_a_job_beyond_its_tenants_limits_ends_and_its_checkpoints_stay(
    one: Server, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits, code, param = LIMITS[name]
    monkeypatch.setattr(server.job_training, "RENEW_SECONDS", 0.5)
    file = sent(one, rows())
    job = created(one, file, epochs=500, suffix="router")
    eventually(lambda: bool(steps(one, job)), SECONDS)
    one.services.registry.add_tenant("default", limits, actor="operator")
    job = ended(one, job, "failed")
    check(one, job, code, param, "ask the operator for more")
    eventually(lambda: not trainers())
    assert steps(one, job)


@pytest.mark.long
def test_while_a_version_is_published_the_lease_is_renewed(one: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, store, renewed = one.services.registry, one.services.store, threading.Event()
    renew, stage = registry.renew_lease, store.stage

    def renew_and_tell(job: JobRow, **more: Any) -> None:
        renew(job, **more)
        if registry.get_job(job.tenant, job.id).phase is Phase.PUBLISHING:
            renewed.set()

    def stage_late() -> Path:
        """Once the job publishes: as long as it takes for a lease to be renewed."""
        if one.services.jobs.working_on is None:
            assert renewed.wait(SECONDS)
        return stage()

    monkeypatch.setattr(registry, "renew_lease", renew_and_tell)
    file = sent(one, rows())
    job = created(one, file, epochs=1)
    monkeypatch.setattr(store, "stage", stage_late)
    assert ended(one, job).fine_tuned_model
