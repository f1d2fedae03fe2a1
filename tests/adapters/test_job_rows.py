"""The queue of training jobs: whose turn it is, who may write, and that a job publishes at most once."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import (
    Conflict,
    HotshoeError,
    InvalidRequest,
    LeaseLost,
    NotFound,
    PayloadTooLarge,
    QuotaExceeded,
)
from adapters.job_history import event_id
from adapters.job_rows import MOST_LOSSES, NEXT, JobChange, JobRow, JobStatus, Phase
from adapters.limits import UseLimits
from adapters.paging import Page
from adapters.registry import NewVersion, Registry
from adapters.turns import Turn, choose
from adapters.types import VersionStatus

ERROR = {"code": "training_stopped", "message": "The loss exploded.", "param": None}


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    one = Registry.open(tmp_path / "home")
    yield one
    one.close()


def new(tenant: str = "default", **more: Any) -> JobRow:
    return JobRow("", tenant, "somebody", "router", "tiny", "file-1", **more)


def claimed(registry: Registry, **more: Any) -> JobRow:
    job = registry.claim_job(**more)
    assert job is not None
    return job


def test_a_job_goes_from_the_queue_to_its_end(registry: Registry) -> None:
    made = registry.add_job(new(seed=7))
    assert (made.status, made.phase, made.attempts, made.id[:6]) == (JobStatus.QUEUED, Phase.NEW, 0, "ftjob-")
    job = claimed(registry)
    assert (job.id, job.status, job.attempts, job.fence) == (made.id, JobStatus.RUNNING, 1, 1)
    assert registry.claim_job() is None and not registry.has_free_job()
    registry.note_job(job, JobChange(phase=Phase.TRAINING, progress={"step": 1}), says="Step 1", data={"loss": 2.0})
    registry.succeed_job(job, "Done", result_file="file-2")
    ended = registry.get_job("default", made.id)
    assert (ended.status, ended.progress, ended.result_file) == (JobStatus.SUCCEEDED, {"step": 1}, "file-2")
    assert ended.finished_at is not None and ended.leased_until is None
    said = registry.job_events("default", made.id)
    assert [(event.level, event.message) for event in said] == [
        ("info", "Done"),
        ("info", "Step 1"),
        ("info", f"Created fine-tuning job: {made.id}"),
    ]
    assert said[1].data == {"loss": 2.0}
    assert registry.job_events_since("default", made.id, said[1].id) == [said[0]]


TURNS: dict[str, Callable[[Registry, JobRow], Any]] = {
    "pause": lambda registry, job: registry.pause_job(job.tenant, job.id, actor="a"),
    "resume": lambda registry, job: registry.resume_job(job.tenant, job.id, actor="a"),
    "cancel": lambda registry, job: registry.cancel_job(job.tenant, job.id, actor="a"),
}
WANTED = {"pause": JobStatus.PAUSED, "resume": JobStatus.QUEUED, "cancel": JobStatus.CANCELLED}


def in_status(registry: Registry, status: JobStatus) -> JobRow:
    job = registry.add_job(new())
    if status in (JobStatus.RUNNING, JobStatus.SUCCEEDED, JobStatus.FAILED):
        job = claimed(registry)
    if status is JobStatus.SUCCEEDED:
        registry.succeed_job(job, "Done")
    elif status is JobStatus.FAILED:
        registry.fail_job(job, ERROR)
    elif status is JobStatus.PAUSED:
        registry.pause_job(job.tenant, job.id, actor="a")
    elif status is JobStatus.CANCELLED:
        registry.cancel_job(job.tenant, job.id, actor="a")
    return registry.get_job(job.tenant, job.id)


@pytest.mark.parametrize(("status", "verb"), list(itertools.product(JobStatus, TURNS)))
def test_what_a_user_may_do_is_what_the_table_of_states_says(registry: Registry, status: JobStatus, verb: str) -> None:
    job, wanted = in_status(registry, status), WANTED[verb]
    is_taken = wanted is status or (wanted in NEXT[status] and (verb != "resume" or status is JobStatus.PAUSED))
    if not is_taken:
        with pytest.raises(Conflict, match=f"{job.id} is {status}"):
            TURNS[verb](registry, job)
        assert registry.get_job(job.tenant, job.id) == job
        return
    changed = TURNS[verb](registry, job)
    assert changed.status is wanted
    assert (changed.fence > job.fence) == (wanted is not status)
    assert (changed.finished_at is not None) == (wanted is JobStatus.CANCELLED)


def writes(job: JobRow) -> dict[str, Callable[[Registry], Any]]:
    """Everything that a worker does to its job."""
    return {
        "renew": lambda registry: registry.renew_lease(job),
        "note": lambda registry: registry.note_job(job, says="Still here"),
        "requeue": lambda registry: registry.requeue_job(job, "stop"),
        "fail": lambda registry: registry.fail_job(job, ERROR),
        "succeed": lambda registry: registry.succeed_job(job, "Done"),
        "publish": lambda registry: registry.add_version(NewVersion("router", job=job)),
    }


@pytest.mark.parametrize("write", list(writes(new())))
@pytest.mark.parametrize("lost", ["lease", "pause", "cancel"])
def test_a_worker_whose_job_is_not_its_own_any_more_writes_nothing(registry: Registry, write: str, lost: str) -> None:
    registry.add_job(new())
    job = claimed(registry, lease_seconds=-1 if lost == "lease" else 30)
    if lost == "lease":
        assert claimed(registry).fence == job.fence + 1
    else:
        TURNS[lost](registry, job)
    before = (registry.get_job(job.tenant, job.id), registry.job_events(job.tenant, job.id))
    with pytest.raises(LeaseLost):
        writes(job)[write](registry)
    assert (registry.get_job(job.tenant, job.id), registry.job_events(job.tenant, job.id)) == before
    assert registry.job_checkpoints(job.tenant, job.id) == [] and registry.adapters(job.tenant) == []


def test_a_job_publishes_once_whatever_two_workers_do(registry: Registry) -> None:
    registry.add_job(new())
    first = claimed(registry, lease_seconds=-1)
    second = claimed(registry)
    made = registry.add_version(NewVersion("router", digest="sha256:1", job=second))
    with pytest.raises(LeaseLost):
        registry.add_version(NewVersion("router", digest="sha256:2", job=first))
    assert [version.ref for version in registry.versions("default", "router")] == ["router@1"]
    assert registry.get_job("default", first.id).number == made.number == 1
    again = registry.add_version(NewVersion("router", digest="sha256:1", job=second))  # the step done again
    assert (again.number, again.is_new) == (1, False)


def test_a_checkpoint_that_was_saved_while_the_job_was_paused_is_listed(registry: Registry) -> None:
    registry.add_job(new())
    job = claimed(registry)
    registry.pause_job(job.tenant, job.id, actor="a")
    registry.note_checkpoint(job.tenant, job.id, 7, {"loss": 0.5}, [7])
    assert [(one.step, one.metrics) for one in registry.job_checkpoints(job.tenant, job.id)] == [(7, {"loss": 0.5})]


def test_a_name_that_differs_only_in_case_and_a_full_tenant_are_known_before_any_training(registry: Registry) -> None:
    registry.add_version(NewVersion("Router", digest="sha256:1"))
    with pytest.raises(Conflict, match="differs only in case"):
        registry.add_job(new())
    registry.add_tenant("default", UseLimits(versions=1), actor="operator")
    with pytest.raises(QuotaExceeded, match="1 versions of at most 1"):
        registry.add_job(replace(new(), adapter="Router"))


def test_a_lease_that_is_renewed_is_nobody_elses(registry: Registry) -> None:
    registry.add_job(new())
    job = claimed(registry, lease_seconds=-1)
    registry.renew_lease(job)
    assert registry.claim_job() is None
    registry.free_leases()
    assert claimed(registry).attempts == 2
    assert registry.job_events("default", job.id)[0].message == "The worker of this job is gone; another goes on"


def test_tenants_take_turns_and_a_tenants_own_jobs_keep_their_order(registry: Registry) -> None:
    many = [registry.add_job(new("many")) for _ in range(3)]
    few = registry.add_job(new("few"))
    order = []
    for _ in range(4):
        job = claimed(registry)
        order.append(job.id)
        registry.succeed_job(job, "Done")
    assert order == [many[0].id, few.id, many[1].id, many[2].id]


def test_who_has_fewer_running_is_first_and_who_may_have_no_more_waits() -> None:
    jobs = [replace(new(tenant), id=f"{tenant}{number}", created_at=number) for number, tenant in enumerate("aabc")]
    turns = {"a": Turn(1, None, 0.0), "b": Turn(1, 1, 0.0), "c": Turn(2, None, 0.0)}
    chosen = choose(jobs, turns)
    assert chosen is not None and chosen.id == "a0"
    assert choose([job for job in jobs if job.tenant == "b"], turns) is None
    assert choose([], {}) is None


def test_a_tenants_limits_hold_for_jobs_that_wait_and_for_those_that_run(registry: Registry) -> None:
    registry.add_job(new())
    registry.add_tenant("default", UseLimits(jobs=2, running_jobs=1), actor="operator")
    registry.add_job(new())
    with pytest.raises(QuotaExceeded, match="2 fine-tuning jobs that have not ended of at most 2"):
        registry.add_job(new())
    job = claimed(registry)
    assert registry.claim_job() is None
    registry.succeed_job(job, "Done")
    assert claimed(registry).id != job.id


def test_many_workers_take_each_job_once(registry: Registry) -> None:
    made = {registry.add_job(new(tenant)).id for tenant in ("a", "b", "c") for _ in range(5)}
    taken: list[str] = []

    def work() -> None:
        while (job := registry.claim_job()) is not None:
            taken.append(job.id)
            registry.succeed_job(job, "Done")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(made)


def test_pages_go_on_where_the_last_one_ended(registry: Registry) -> None:
    made = [registry.add_job(new(request={"metadata": {"team": "a" if n % 2 else "b"}})).id for n in range(5)]
    newest = list(reversed(made))
    assert [job.id for job in registry.jobs("default", Page(limit=2))] == newest[:2]
    assert [job.id for job in registry.jobs("default", Page(newest[1], 9))] == newest[2:]
    assert [job.id for job in registry.jobs("default", metadata={"team": "a"})] == [newest[1], newest[3]]
    assert [job.id for job in registry.jobs("default", adapters={"router"})] == newest
    assert registry.jobs("default", adapters={"other"}) == [] == registry.jobs("other")
    job = claimed(registry)
    for step in (10, 20, 20, 30):
        registry.note_checkpoint(job.tenant, job.id, step, {"loss": 1 / step}, [20, 30])
    found = registry.job_checkpoints("default", job.id, Page(limit=2))
    assert [one.step for one in found] == [30, 20]
    assert [one.step for one in registry.job_checkpoints("default", job.id, Page(found[-1].id))] == [10]
    said = registry.job_events("default", job.id, Page(limit=3))
    assert [event.message for event in said] == [f"Checkpoint created at step {step}" for step in (30, 20, 10)]
    rest = registry.job_events("default", job.id, Page(event_id(said[-1].id)))
    assert [event.message for event in rest] == [f"Created fine-tuning job: {job.id}"]


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda registry: registry.get_job("default", "ftjob-none"), NotFound),
        (lambda registry: registry.get_job("other", registry.jobs("default")[0].id), NotFound),
        (lambda registry: registry.job_events("other", registry.jobs("default")[0].id), NotFound),
        (lambda registry: registry.cancel_job("other", registry.jobs("default")[0].id, actor="a"), NotFound),
        (lambda registry: registry.jobs("default", Page("ftjob-none")), InvalidRequest),
        (lambda registry: registry.job_events("default", registry.jobs("default")[0].id, Page("7")), InvalidRequest),
        (
            lambda registry: registry.job_events("default", registry.jobs("default")[0].id, Page("ftevent-x")),
            InvalidRequest,
        ),
        (
            lambda registry: registry.job_checkpoints("default", registry.jobs("default")[0].id, Page("no")),
            InvalidRequest,
        ),
    ],
)
def test_what_is_not_there_or_not_the_tenants_is_not_found(
    registry: Registry, ask: Callable[[Registry], Any], error: type[HotshoeError]
) -> None:
    registry.add_job(new())
    with pytest.raises(error):
        ask(registry)


def test_jobs_of_all_tenants_are_found_by_their_ids(registry: Registry) -> None:
    made = [registry.add_job(new(tenant)) for tenant in ("default", "other", "default")]
    found = registry.jobs_of([made[1].id, made[2].id, "ftjob-none"])
    assert {job.id for job in found} == {made[1].id, made[2].id}


def test_checkpoints_have_files_until_they_are_dropped_and_one_version_each(registry: Registry) -> None:
    registry.add_job(new())
    job = claimed(registry)
    for step, kept in ((1, [1]), (2, [1, 2]), (3, [2, 3])):
        registry.note_checkpoint(job.tenant, job.id, step, {}, kept)
    listed = registry.job_checkpoints(job.tenant, job.id)
    assert [(one.step, one.is_kept) for one in listed] == [(3, True), (2, True), (1, False)]
    named = registry.name_checkpoint(listed[0], 4)
    assert named.number == 4 and registry.get_checkpoint(job.tenant, job.id, named.id) == named
    registry.note_kept(job.id, [3], 100)
    assert [one.is_kept for one in registry.job_checkpoints(job.tenant, job.id)] == [True, False, False]
    assert registry.get_job(job.tenant, job.id).stored_bytes == 100
    with pytest.raises(NotFound, match="no checkpoint"):
        registry.get_checkpoint(job.tenant, job.id, "ftckpt_none")
    with pytest.raises(NotFound):
        registry.get_checkpoint("other", job.id, named.id)


def test_what_a_job_uses_is_counted_over_all_tries_and_limited(registry: Registry) -> None:
    registry.add_tenant("default", UseLimits(job_seconds=10, job_bytes=1000), actor="operator")
    first, second = registry.add_job(new()), registry.add_job(new())
    job = claimed(registry)
    registry.count_use(job, 6.0, 400)
    registry.requeue_job(job, "again")
    job = claimed(registry)
    registry.count_use(job, 4.0, 500)
    found = registry.get_job("default", first.id)
    assert (found.run_seconds, found.stored_bytes) == (10.0, 500)
    with pytest.raises(QuotaExceeded, match="11 seconds of at most 10") as over:
        registry.count_use(job, 1.0, 500)
    assert over.value.param == "job_seconds"
    registry.cancel_job("default", first.id, actor="a")
    other = claimed(registry)
    assert other.id == second.id
    registry.count_use(other, 1.0, 500)  # together they have just what they may
    with pytest.raises(PayloadTooLarge, match="1001 bytes on the disk of at most 1000"):
        registry.count_use(other, 1.0, 501)
    with pytest.raises(PayloadTooLarge, match="bytes on the disk"):
        registry.add_job(new())
    registry.note_kept(first.id, [], 0)
    registry.add_job(new())


def test_a_job_with_which_servers_end_over_and_over_fails(registry: Registry) -> None:
    made = registry.add_job(new())
    for losses in range(MOST_LOSSES):
        job = claimed(registry)
        assert job.losses == losses
        registry.free_leases()  # the server is back, and had not said goodbye
    assert registry.claim_job() is None
    found = registry.get_job("default", made.id)
    assert found.status is JobStatus.FAILED and found.error is not None and found.error["code"] == "worker_lost"


def test_a_job_that_gets_further_is_not_given_up(registry: Registry) -> None:
    made = registry.add_job(new())
    for step in range(2 * MOST_LOSSES):
        job = claimed(registry)
        registry.note_checkpoint(job.tenant, job.id, step, {}, [])
        registry.free_leases()
    assert registry.get_job("default", made.id).status is JobStatus.RUNNING


def test_a_job_that_is_put_back_says_with_how_many_rows_at_a_time_it_is_tried(registry: Registry) -> None:
    registry.add_job(new(request={"metadata": {"team": "a"}}))
    registry.requeue_job(claimed(registry), "too large", died=True, pass_size=4)
    job = claimed(registry)
    assert (job.deaths, dict(job.request)) == (1, {"metadata": {"team": "a"}, "pass_size": 4})


def test_a_job_that_is_not_ours_any_more_moves_no_alias(registry: Registry) -> None:
    registry.add_version(NewVersion("router", digest="sha256:1"))
    registry.set_status("default", "router", 1, VersionStatus.READY)
    registry.add_job(new())
    job = claimed(registry)
    asked = ("default", "router", "beta", 1)
    registry.cancel_job("default", job.id, actor="a")
    with pytest.raises(LeaseLost):
        registry.move_alias(*asked, expected_generation=None, actor="a", job=job)
    assert [alias.alias for alias in registry.aliases("default", "router")] == ["stable"]
