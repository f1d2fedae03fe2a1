"""Files and uploads of tenants beside each other: whatever is not yours looks as if it were not there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from adapters.bases import BaseModel
from server.access import ROUTES, Route
from tests.fixtures.service import Server, error_of, running
from tests.server.test_tenants import KEY, Team, show

BODIES: dict[str, dict[str, Any]] = {
    "/v1/uploads/{upload_id}/parts": {"files": {"data": b"x"}},
    "/v1/uploads/{upload_id}/complete": {"json": {"part_ids": []}},
    "/v1/uploads/{upload_id}/cancel": {},
}
NAMING = [route for route in ROUTES if "{file_id}" in route.path or "{upload_id}" in route.path]
ABSENT = {"file_id": "file-" + "0" * 24, "upload_id": "upload_" + "0" * 24}


@pytest.fixture(scope="module")
def keyed(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_base, tmp_path_factory.mktemp("isolated"), api_key=KEY) as one:
        yield one


@pytest.fixture(scope="module")
def acme(keyed: Server) -> Team:
    return Team(keyed, "acme", "upload")


@pytest.fixture(scope="module")
def other(keyed: Server, acme: Team) -> Team:
    return Team(keyed, "other", "upload")


def send(team: Team, content: bytes = b"rows", purpose: str = "evals") -> httpx.Response:
    return team.http.post("/v1/files", data={"purpose": purpose}, files={"file": ("rows", content)})


def begin(team: Team, size: int = 4, **more: Any) -> httpx.Response:
    body = {"filename": "f", "purpose": "evals", "bytes": size, "mime_type": "text/plain", **more}
    return team.http.post("/v1/uploads", json=body)


@pytest.fixture
def ids(acme: Team) -> dict[str, str]:
    return {"file_id": send(acme).json()["id"], "upload_id": begin(acme).json()["id"]}


def ask(team: Team, route: Route, ids: dict[str, str]) -> httpx.Response:
    return team.http.request(route.method, route.path.format(**ids), **BODIES.get(route.path, {}))


@pytest.mark.parametrize("route", NAMING, ids=show)
def test_i1_a_foreign_file_looks_exactly_absent(route: Route, acme: Team, other: Team, ids: dict[str, str]) -> None:
    foreign, absent = ask(other, route, ids), ask(other, route, ABSENT)
    assert foreign.status_code == absent.status_code == 404, foreign.text
    text = foreign.text.replace(ids["file_id"], ABSENT["file_id"]).replace(ids["upload_id"], ABSENT["upload_id"])
    assert text == absent.text and set(foreign.headers) == set(absent.headers)
    assert ask(acme, route, ids).status_code != 404


def test_i2_no_foreign_file_or_upload_is_in_a_list(acme: Team, other: Team, ids: dict[str, str]) -> None:
    own = send(other).json()["id"]
    assert [file["id"] for file in other.http.get("/v1/files").json()["data"]] == [own]
    assert other.http.get("/v1/uploads").json()["data"] == []
    assert other.http.get(f"/v1/files?after={ids['file_id']}").status_code == 400


def test_i1_a_foreign_file_is_no_part_of_an_adapter(keyed: Server, acme: Team, other: Team) -> None:
    weights = send(acme, b"weights", "adapter").json()["id"]
    order = {"name": "stolen", "config": {}, "weights": weights}
    foreign = other.http.post("/v1/adapters", json=order)
    absent = other.http.post("/v1/adapters", json={**order, "weights": ABSENT["file_id"]})
    assert foreign.status_code == 404 and foreign.text.replace(weights, ABSENT["file_id"]) == absent.text
    assert other.http.get("/v1/adapters/stolen").status_code == 404


def test_a_key_limited_to_adapters_sees_only_the_files_that_it_sent(keyed: Server, acme: Team) -> None:
    whole = send(acme).json()["id"]
    narrow = Team(keyed, "acme", "upload", adapters=["second"])
    assert narrow.http.get(f"/v1/files/{whole}").status_code == 404
    own = send(narrow).json()["id"]
    assert [file["id"] for file in narrow.http.get("/v1/files").json()["data"]] == [own]
    assert acme.http.get(f"/v1/files/{own}").status_code == 200


@pytest.mark.parametrize(
    ("limits", "status", "param"),
    [
        ({"files": 2}, 429, "files"),
        ({"file_bytes": 7}, 413, "file_bytes"),
        ({"stored_bytes": 7}, 413, "file_bytes"),
        ({"file_bytes": 3}, 413, "file"),
    ],
)
def test_a_quota_holds_for_files_and_open_uploads_together(
    keyed: Server, limits: dict[str, int], status: int, param: str
) -> None:
    tenant = "-".join(["quota", *limits, *map(str, limits.values())]).replace("_", "-")
    keyed.http.put(f"/v1/tenants/{tenant}", json={"limits": limits})
    team = Team(keyed, tenant, "upload")
    if param != "file":
        first, upload = send(team).json()["id"], begin(team, 3)
        assert upload.status_code == 200
        row = keyed.http.get(f"/v1/tenants/{tenant}").json()
        assert (row["files"], row["file_bytes"], row["upload_parts"]) == (2, 7, 0)
    for refused in (send(team), begin(team)):
        assert refused.status_code == status, refused.text
        assert error_of(refused)["param"] == (param if refused.request.url.path == "/v1/files" else "file_bytes") or (
            param == "files"
        )
    if param != "file":
        team.http.post(f"/v1/uploads/{upload.json()['id']}/cancel")
        team.http.delete(f"/v1/files/{first}")
        assert send(team).status_code == 200
    kept = {file.id for file in keyed.services.registry.kept_files()}
    assert keyed.services.files.store.files() == kept


def test_a_quota_of_open_parts_is_told_and_ends_with_the_upload(keyed: Server) -> None:
    keyed.http.put("/v1/tenants/parted", json={"limits": {"upload_parts": 2}})
    team = Team(keyed, "parted", "upload")
    first, second = (begin(team, 8).json()["id"] for _ in range(2))

    def part(upload: str, data: bytes) -> httpx.Response:
        return team.http.post(f"/v1/uploads/{upload}/parts", files={"data": data})

    assert [part(first, b"aa").status_code, part(second, b"aa").status_code] == [200, 200]
    refused = part(first, b"bb")
    assert (refused.status_code, error_of(refused)["param"]) == (429, "upload_parts")
    assert part(first, b"aa").status_code == 200, "it is there already"
    team.http.post(f"/v1/uploads/{second}/cancel")
    assert part(first, b"bb").status_code == 200


def test_limits_of_what_is_kept_are_no_limits_of_a_key(keyed: Server) -> None:
    for name in ("stored_bytes", "versions", "file_bytes", "files", "upload_parts"):
        answer = keyed.http.post("/v1/keys", json={"tenant": "x", "scopes": ["infer"], "limits": {name: 1}})
        assert (answer.status_code, error_of(answer)["param"]) == (400, "limits")
