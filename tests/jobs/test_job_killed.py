"""SIGKILL at every system call by which a finished run becomes a version: it becomes one once, and no alias dangles.

The worker itself runs in the traced child, all of it on one thread; a version is proven as the prover does it, in the
registry, without an engine. How a run survives kills while it trains is in tests/training/test_checkpoints_killed.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from adapters.bases import BaseModel
from adapters.doctor import run_doctor
from adapters.file_rows import FINE_TUNE, FileQuery, Owner
from adapters.file_store import FileStore
from adapters.files import Content, Files, NewFile
from adapters.job_rows import JobRow, JobStatus
from adapters.publish import PublishContext, publish
from adapters.registry import Registry
from adapters.store import BlobStore
from adapters.types import DEFAULT_TENANT, STABLE, AdapterVersion, VersionStatus
from server.job_worker import JobPlace, JobWorker
from tests.fixtures.adapters import write_adapter
from tests.fixtures.killing import run_and_kill, why_not_here
from training.kept import MOST_KEPT, keep, kept_steps

OWNER = Owner(DEFAULT_TENANT, "tester")
SAMPLE_EVERY = 12
needs_ptrace = pytest.mark.skipif(bool(why_not_here()), reason=why_not_here() or "ptrace works here")


class Proving:
    """Makes a version ready at once, as the prover does when the engine has shown what it had to."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    async def take(self, version: AdapterVersion) -> None:
        self.registry.set_status(version.tenant, version.name, version.number, VersionStatus.READY)

    def is_pending(self, version: AdapterVersion) -> bool:
        return True

    async def wait(self, version: AdapterVersion, seconds: float) -> AdapterVersion:
        return self.registry.get(version.tenant, version.name, version.number)


@dataclass(frozen=True)
class State:
    """A state folder with router@1 (stable), and a job whose run has ended and that has not published."""

    home: Path
    base: BaseModel
    job: str

    def worker(self) -> JobWorker:
        registry, store = Registry.open(self.home), BlobStore(self.home / "blobs")
        context = PublishContext(registry, store, self.base, max_rank=64)

        async def context_for(tenant: str, actor: str) -> PublishContext:
            return context

        async def promote(job: JobRow, version: AdapterVersion, alias: str) -> None:
            registry.move_alias(
                *(job.tenant, version.name, alias, version.number),
                expected_generation=None,
                actor=job.actor,
                job=job,
            )

        prover: Any = Proving(registry)
        return JobWorker(
            JobPlace(
                registry=registry,
                files=Files(registry, FileStore(self.home / "files")),
                store=store,
                base=self.base,
                home=self.home,
                prover=prover,
                context_for=context_for,
                promote=promote,
                stop_seconds=0.0,
            )
        )

    def copy(self, to: Path) -> State:
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(self.home, to)
        return State(to, self.base, self.job)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory, tiny_base: BaseModel) -> State:
    folder = tmp_path_factory.mktemp("jobs-killed")
    state = State(folder / "home", tiny_base, "ftjob-1")
    where = state.worker().where
    first = publish(
        write_adapter(folder / "first", tiny_base, seed=1),
        "router",
        context=PublishContext(where.registry, where.store, tiny_base, max_rank=64),
    )
    where.registry.set_status(DEFAULT_TENANT, "router", first.number, VersionStatus.READY)
    file = sent(where.files, b'{"prompt": "a", "completion": "b"}\n')
    request = {"hyperparameters": {}, "hotshoe": {"alias": STABLE}, "base_digest": tiny_base.digest}
    where.registry.add_job(JobRow(state.job, DEFAULT_TENANT, "tester", "router", "tiny", file, request=request))
    out = write_adapter(state.home / "jobs" / state.job / "out", tiny_base, seed=2)
    curve = {"training": [[1, 2.0], [2, 1.0]], "validation": [[2, 1.5]]}
    card = {"base": {"digest": tiny_base.digest}, "result": {"curve": curve}, "cost": {"tokens": 7}}
    (out / "card.json").write_text(json.dumps(card), encoding="utf-8")
    where.registry.close()
    return state


def sent(files: Files, content: bytes) -> str:
    staged = files.store.stage() / "content"
    staged.write_bytes(content)
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return files.add(OWNER, NewFile(FINE_TUNE, "rows.jsonl"), Content(staged, len(content), digest)).id


async def inline(call: Callable[..., Any], *args: Any, **more: Any) -> Any:
    return call(*args, **more)


def carried_out(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server does with the job from its start on: the worker takes it up and carries it to its end."""
    monkeypatch.setattr(asyncio, "to_thread", inline)
    worker = state.worker()

    async def carry() -> None:
        await worker.start()
        while not worker.registry.get_job(DEFAULT_TENANT, state.job).status.is_final:  # noqa: ASYNC110 - a row tells it
            await asyncio.sleep(0.001)
        await worker.stop()

    asyncio.run(carry())
    worker.registry.close()


def check_in_between(state: State) -> None:
    """However far it came: at most one version was made of the job, and an alias names what can be served."""
    report = run_doctor(state.home)
    assert report.is_sound, report.lines()
    registry = Registry.open(state.home)
    versions = registry.versions(DEFAULT_TENANT, "router")
    (alias,) = registry.aliases(DEFAULT_TENANT, "router")
    job = registry.get_job(DEFAULT_TENANT, state.job)
    assert [version.number for version in versions] in ([1], [1, 2])
    assert job.number == (2 if len(versions) == 2 else None)  # in the transaction of the version
    assert versions[alias.number - 1].status is VersionStatus.READY
    assert job.status is not JobStatus.SUCCEEDED or alias.number == 2
    registry.close()


def check_at_the_end(state: State) -> None:
    """Gone on with, it ended as if nothing had been."""
    report = run_doctor(state.home)
    assert report.is_sound, report.lines()
    registry = Registry.open(state.home)
    job = registry.get_job(DEFAULT_TENANT, state.job)
    assert (job.status, job.number, job.trained_tokens) == (JobStatus.SUCCEEDED, 2, 7), job
    assert [version.number for version in registry.versions(DEFAULT_TENANT, "router")] == [1, 2]
    (alias,) = registry.aliases(DEFAULT_TENANT, "router")
    assert (alias.number, alias.previous) == (2, (1,))
    results = registry.files(OWNER, FileQuery("fine-tune-results"))
    assert [file.id for file in results] == [job.result_file]
    said = [event.message for event in registry.job_events(DEFAULT_TENANT, state.job)]
    assert sum("successfully completed" in line for line in said) == 1
    registry.close()


def kill_everywhere(state: State, folder: Path, step: int) -> int:
    """Kill at every `step`-th changing call and at the last, and go on; how many such calls the whole has."""
    whole = state.copy(folder / "whole")
    with pytest.MonkeyPatch.context() as patch:
        calls = len(run_and_kill(lambda: carried_out(whole, patch), None).calls)
    check_at_the_end(whole)
    for kill_at in sorted({*range(0, calls, step), calls - 1}):
        killed = state.copy(folder / "killed")
        with pytest.MonkeyPatch.context() as patch:
            run_and_kill(lambda: carried_out(killed, patch), kill_at)  # noqa: B023 - it is over when this returns
        check_in_between(killed)
        with pytest.MonkeyPatch.context() as patch:
            carried_out(killed, patch)
        check_at_the_end(killed)
    return calls


@needs_ptrace
def test_a_kill_at_sampled_system_calls_publishes_once(state: State, tmp_path: Path) -> None:
    assert kill_everywhere(state, tmp_path, SAMPLE_EVERY) >= 50


@needs_ptrace
@pytest.mark.long
def test_a_kill_at_every_system_call_publishes_once(
    state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = kill_everywhere(state, tmp_path, 1)
    with capsys.disabled():
        print(f" {points} kill points ", end="")
    assert points >= 50


@needs_ptrace
def test_a_kill_while_a_checkpoint_is_put_aside_leaves_whole_ones(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint-4"
    source.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (source / name).write_bytes(name.encode())

    def fresh(folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        for step in range(1, MOST_KEPT + 1):
            keep(source, folder, step)
        return folder

    whole = fresh(tmp_path / "whole")
    calls = len(run_and_kill(lambda: keep(source, whole, 4), None).calls)
    assert sorted(kept_steps(whole)) == [2, 3, 4] and calls >= 5
    for kill_at in range(calls):
        folder = fresh(tmp_path / "killed")
        run_and_kill(lambda: keep(source, folder, 4), kill_at)  # noqa: B023 - it is over when this returns
        steps = kept_steps(folder)
        assert {1, 2, 3} - {1} <= set(steps) <= {1, 2, 3, 4}
        assert all(len(list((folder / str(step)).iterdir())) == 2 for step in steps)
        keep(source, folder, 4)
        assert sorted(kept_steps(folder)) == [2, 3, 4]
