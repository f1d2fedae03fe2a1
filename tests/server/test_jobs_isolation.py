"""A tenant's fine-tuning jobs, files and versions are nobody else's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from adapters.bases import BaseModel
from adapters.job_rows import JobRow
from server.access import ROUTES
from tests.fixtures.service import Server, error_of, running
from tests.server.test_tenants import Team

JOBS = "/v1/fine_tuning/jobs"
ABSENT = "ftjob-" + "0" * 24
OF_A_JOB = [route for route in ROUTES if route.path.startswith(f"{JOBS}/")]


@pytest.fixture(scope="module")
def keyed(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_base, tmp_path_factory.mktemp("jobs"), api_key="a-key-of-the-operator") as one:
        yield one


@pytest.fixture(scope="module")
def acme(keyed: Server) -> Team:
    return Team(keyed, "acme", "train", "infer")


@pytest.fixture(scope="module")
def other(keyed: Server) -> Team:
    return Team(keyed, "other", "train", "infer")


@pytest.fixture(scope="module")
def job(keyed: Server, acme: Team) -> str:
    """A job of acme's that rests: nothing trains here."""
    registry = keyed.services.registry
    made = registry.add_job(JobRow("", "acme", "somebody", "router", "tiny", "file-1", request={"hyperparameters": {}}))
    return registry.pause_job("acme", made.id, actor="somebody").id


@pytest.mark.parametrize("route", OF_A_JOB, ids=lambda route: f"{route.method} {route.path}")
def test_i1_a_foreign_job_looks_exactly_absent(route: Any, acme: Team, other: Team, job: str) -> None:
    foreign, absent = (other.http.request(route.method, route.path.replace("{job_id}", one)) for one in (job, ABSENT))
    assert foreign.status_code == absent.status_code == 404, foreign.text
    assert foreign.text.replace(job, ABSENT) == absent.text


def test_i1_jobs_are_listed_to_their_own_tenant(acme: Team, other: Team, job: str) -> None:
    assert [row["id"] for row in acme.http.get(JOBS).json()["data"]] == [job]
    assert other.http.get(JOBS).json()["data"] == []
    assert acme.http.get(f"{JOBS}/{job}").json()["hotshoe"]["status"] == "paused"


def test_i1_a_job_takes_no_file_and_no_model_of_another_tenants(keyed: Server, acme: Team, other: Team) -> None:
    parts: dict[str, Any] = {"files": {"file": ("rows.jsonl", b"{}")}, "data": {"purpose": "fine-tune"}}
    file, own = (team.http.post("/v1/files", **parts).json()["id"] for team in (acme, other))
    refused = other.http.post(JOBS, json={"model": keyed.base.id, "training_file": file})
    assert (refused.status_code, error_of(refused)["param"]) == (400, "training_file")
    uploader = Team(keyed, "acme", "upload")
    assert uploader.push(keyed, "router").json()["status"] == "ready"
    keyed.services.registry.add_grant("acme", "router", "other", actor="operator")
    for model, status in (("router@1", 404), ("acme/router@1", 400)):
        refused = other.http.post(JOBS, json={"model": model, "training_file": own})
        assert (refused.status_code, error_of(refused)["param"]) == (status, "model"), refused.text


def test_an_alias_is_moved_with_the_scope_promote_only(keyed: Server, acme: Team) -> None:
    parts: dict[str, Any] = {"files": {"file": ("rows.jsonl", b"{}")}, "data": {"purpose": "fine-tune"}}
    file = acme.http.post("/v1/files", **parts).json()["id"]
    body = {"model": keyed.base.id, "training_file": file, "hotshoe": {"alias": "stable"}}
    refused = acme.http.post(JOBS, json=body)
    assert (refused.status_code, error_of(refused)["param"]) == (403, "alias")


def test_a_key_that_is_limited_to_adapters_sees_their_jobs_only(keyed: Server, acme: Team, job: str) -> None:
    limited, fitting = (Team(keyed, "acme", "train", adapters=[name]) for name in ("summary", "router"))
    assert limited.http.get(JOBS).json() == {"object": "list", "data": [], "has_more": False}
    assert limited.http.get(f"{JOBS}/{job}").status_code == 404
    assert [
        row["id"]
        for row in fitting.http.get(
            JOBS,
        ).json()["data"]
    ] == [job]
