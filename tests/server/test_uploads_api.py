"""A file in parts: as OpenAI's own client sends it, out of order, at the same time, and after a cut."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import update

from adapters import schema
from adapters.doctor import run_doctor
from adapters.file_rows import ENDED_SECONDS, UPLOAD_SECONDS
from server.uploads import MAX_PART_BYTES
from tests.fixtures.service import Server, error_of
from tests.server.test_uploads import HEADERS, end, part

WHOLE = random.Random(1).randbytes(100_000)
PIECES = [WHOLE[at : at + 16_384] for at in range(0, len(WHOLE), 16_384)]


def begin(server: Server, size: int = len(WHOLE), **more: Any) -> dict[str, Any]:
    answer = server.http.post("/v1/uploads", json=order(size, **more))
    assert answer.status_code == 200, answer.text
    row: dict[str, Any] = answer.json()
    return row


def order(size: int = len(WHOLE), **more: Any) -> dict[str, Any]:
    return {"filename": "w.safetensors", "purpose": "adapter", "bytes": size, "mime_type": "x/y", **more}


def send(server: Server, upload_id: str, data: bytes) -> httpx.Response:
    return server.http.post(f"/v1/uploads/{upload_id}/parts", files={"data": data})


def complete(server: Server, upload_id: str, part_ids: list[str], **more: Any) -> httpx.Response:
    return server.http.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": part_ids, **more})


def on_disk(server: Server) -> set[str]:
    store = server.services.files.store
    return {str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def rows_and_folders_agree(server: Server) -> Any:
    """After every test: what is on the disk is what has a row."""
    yield
    services = server.services
    files = {file.id for file in services.registry.kept_files()}
    parts = {(one.upload_id, one.id) for one in services.registry.kept_parts()}
    assert services.files.store.leftovers(files, parts) == []


@pytest.mark.parametrize("part_size", [None, 30_000])
def test_a13_the_clients_own_chunked_upload_works(server: Server, tmp_path: Path, part_size: int | None) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(WHOLE)
    send_chunked: Any = server.openai.uploads.upload_file_chunked  # its types know no adapters
    upload = send_chunked(
        file=path,
        mime_type="application/octet-stream",
        purpose="adapter",
        part_size=part_size,
        md5=hashlib.md5(WHOLE, usedforsecurity=False).hexdigest(),
    )
    assert upload.status == "completed" and upload.bytes == len(WHOLE) and upload.file is not None
    assert upload.file.filename == path.name and upload.file.bytes == len(WHOLE)
    assert server.openai.files.content(upload.file.id).content == WHOLE


def test_a13_an_empty_file_is_a_file(server: Server) -> None:
    upload = server.openai.uploads.upload_file_chunked(
        file=b"", filename="empty", bytes=0, mime_type="text/plain", purpose="user_data"
    )
    assert upload.file is not None and upload.file.bytes == 0


def test_a13_the_clients_upload_can_be_cancelled(server: Server) -> None:
    client = server.openai
    upload = client.uploads.create(bytes=5, filename="f", mime_type="text/plain", purpose="evals")
    assert upload.status == "pending" and upload.expires_at - upload.created_at == UPLOAD_SECONDS
    client.uploads.parts.create(upload.id, data=b"12345")
    assert client.uploads.cancel(upload.id).status == "cancelled"
    assert client.uploads.cancel(upload.id).status == "cancelled", "again"
    for call in (
        lambda: client.uploads.parts.create(upload.id, data=b"12345"),
        lambda: client.uploads.complete(upload.id, part_ids=[]),
    ):
        with pytest.raises(openai.ConflictError):
            call()


def test_parts_come_in_any_order_and_at_the_same_time(server: Server) -> None:
    upload = begin(server)["id"]
    numbered = list(enumerate(PIECES))
    random.Random(2).shuffle(numbered)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda one: (one[0], send(server, upload, one[1]).json()), numbered))
    ids = [row["id"] for _, row in sorted(answers, key=lambda one: one[0])]
    assert len(set(ids)) == len(PIECES)
    listed = server.http.get(f"/v1/uploads/{upload}").json()["parts"]
    assert {(one["id"], one["sha256"]) for one in listed} == {
        (part_id, hashlib.sha256(piece).hexdigest()) for part_id, piece in zip(ids, PIECES, strict=True)
    }
    file = complete(server, upload, ids).json()["file"]
    assert file["sha256"] == hashlib.sha256(WHOLE).hexdigest()
    assert server.openai.files.content(file["id"]).content == WHOLE
    assert not any(upload in name for name in on_disk(server)), "its parts are gone"


def test_the_same_bytes_again_are_the_same_part(server: Server) -> None:
    upload = begin(server, 40)["id"]
    first, again = (send(server, upload, b"0123456789").json() for _ in range(2))
    assert first == again
    other = send(server, upload, b"abcdefghij").json()
    ids = [first["id"], other["id"], first["id"], first["id"]]
    file = complete(server, upload, ids).json()["file"]
    assert server.openai.files.content(file["id"]).content == b"0123456789abcdefghij01234567890123456789"


def test_a_complete_that_was_answered_and_lost_gives_the_same_answer_again(server: Server) -> None:
    upload = begin(server, 4)["id"]
    ids = [send(server, upload, b"1234").json()["id"]]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: complete(server, upload, ids), range(4)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["file"]["id"] for answer in answers}) == 1
    file_id = answers[0].json()["file"]["id"]
    server.openai.files.delete(file_id)
    assert complete(server, upload, ids).json()["file"] is None


@pytest.mark.parametrize(
    ("size", "named", "more", "code"),
    [
        (5, [0], {}, "length_mismatch"),
        (8, [0, 1, 1], {}, "length_mismatch"),
        (8, [0, 1], {"md5": "0" * 32}, "digest_invalid"),
        (8, [0, 9], {}, "invalid_request"),
        (8, [], {}, "length_mismatch"),
    ],
)
def test_u14_what_is_joined_must_be_what_was_declared(
    server: Server, size: int, named: list[int], more: dict[str, str], code: str
) -> None:
    upload = begin(server, size)["id"]
    ids = [send(server, upload, data).json().get("id", "") for data in (b"1234", b"5678")]
    answer = complete(server, upload, [(ids + ["part_" + "0" * 24] * 8)[at] for at in named], **more)
    assert (answer.status_code, error_of(answer)["code"]) == (400, code), answer.text
    assert server.http.get(f"/v1/uploads/{upload}").json()["status"] == "pending", "it can still be put right"
    server.http.post(f"/v1/uploads/{upload}/cancel")


def test_u14_parts_beyond_what_was_declared_are_refused_and_not_kept(server: Server) -> None:
    upload = begin(server, 10)["id"]
    assert send(server, upload, b"12345678").status_code == 200
    answer = send(server, upload, b"abc")
    assert (answer.status_code, error_of(answer)["code"], error_of(answer)["param"]) == (400, "length_mismatch", "data")
    assert len(server.http.get(f"/v1/uploads/{upload}").json()["parts"]) == 1


def test_u14_a_part_is_at_most_64_mb_and_the_file_at_most_the_limit(server: Server) -> None:
    upload = begin(server, 1 << 30)["id"]
    head = f"POST /v1/uploads/{upload}/parts HTTP/1.1\r\nHost: localhost\r\nContent-Type: {HEADERS['content-type']}\r\n"
    answer = server.raw(head + f"Content-Length: {MAX_PART_BYTES + (1 << 20)}\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")
    too_large = server.http.post("/v1/uploads", json=order(server.services.settings.max_file_bytes + 1))
    assert (too_large.status_code, error_of(too_large)["param"]) == (413, "bytes")
    server.http.post(f"/v1/uploads/{upload}/cancel")


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"purpose": "vision"}, 400, "purpose"),
        ({"filename": "a/b"}, 400, "filename"),
        ({"mime_type": ""}, 400, "mime_type"),
        ({"bytes": -1}, 422, "bytes"),
        ({"bytes": "5"}, 422, "bytes"),
        ({"sha256": "xyz"}, 422, "sha256"),
        ({"path": "/etc/passwd"}, 422, "path"),
        ({"expires_after": {"anchor": "created_at", "seconds": 5}}, 400, "expires_after"),
    ],
)
def test_an_upload_that_cannot_be_is_refused_before_a_byte_is_sent(
    server: Server, change: dict[str, Any], status: int, param: str
) -> None:
    answer = server.http.post("/v1/uploads", json=order() | change)
    assert (answer.status_code, error_of(answer)["param"]) == (status, param)


@pytest.mark.parametrize("body", [part("file", b"x") + end(), part("data", b"x"), end(), b"", b"x" * 5000])
def test_u30_a_form_that_is_no_part_is_refused(server: Server, body: bytes) -> None:
    upload = begin(server, 4)["id"]
    answer = server.http.post(f"/v1/uploads/{upload}/parts", content=body, headers=HEADERS)
    assert answer.status_code in (400, 422), answer.text
    assert server.http.get(f"/v1/uploads/{upload}").json()["parts"] == []


def test_a_sender_who_was_cut_off_finds_its_upload_and_what_is_here_after_a_restart(
    make_server: Callable[..., Server],
) -> None:
    server = make_server()
    digest = hashlib.sha256(WHOLE).hexdigest()
    upload = begin(server, sha256=digest)["id"]
    begin(server, 7, sha256=hashlib.sha256(b"another").hexdigest())
    for piece in PIECES[3:]:
        assert send(server, upload, piece).status_code == 200
    store = server.services.files.store
    (store.root / ".parts" / upload / ("part_" + "a" * 24)).write_bytes(b"killed before its row")
    (store.root / ".parts" / ("upload_" + "b" * 24)).mkdir()
    server.stop()
    report = run_doctor(server.services.settings.home)
    assert report.is_sound and [finding.code for finding in report.findings] == ["file_unused", "file_unused"]
    again = make_server()
    (found,) = again.http.get("/v1/uploads", params={"sha256": digest}).json()["data"]
    assert (found["id"], found["status"]) == (upload, "pending")
    here = {one["sha256"]: one["id"] for one in again.http.get(f"/v1/uploads/{upload}").json()["parts"]}
    assert len(here) == len(PIECES) - 3 == len([name for name in on_disk(again) if upload in name])
    for piece in PIECES[:3]:
        row = send(again, upload, piece).json()
        here[row["sha256"]] = row["id"]
    file = complete(again, upload, [here[hashlib.sha256(piece).hexdigest()] for piece in PIECES]).json()["file"]
    assert again.openai.files.content(file["id"]).content == WHOLE
    (found,) = again.http.get("/v1/uploads", params={"sha256": digest}).json()["data"]
    assert found["status"] == "completed" and found["file"]["id"] == file["id"]


def test_a_list_of_uploads_is_bounded_and_begins_with_the_newest(server: Server) -> None:
    ids = [begin(server, 4)["id"] for _ in range(3)]
    listed = server.http.get("/v1/uploads", params={"limit": 2}).json()["data"]
    assert [row["id"] for row in listed] == ids[:0:-1]
    assert server.http.get("/v1/uploads", params={"limit": 1001}).status_code == 422


def test_a_whole_that_is_not_what_its_sha256_says_is_refused(server: Server) -> None:
    upload = begin(server, 8, sha256=hashlib.sha256(b"12345678").hexdigest())["id"]
    ids = [send(server, upload, data).json()["id"] for data in (b"1234", b"5678")]
    answer = complete(server, upload, ids[::-1])
    assert (answer.status_code, error_of(answer)["code"]) == (400, "digest_invalid")
    assert complete(server, upload, ids).status_code == 200


def pass_time(server: Server, upload_id: str, seconds: float) -> None:
    """As if the upload had been begun, and its last part sent, so much earlier."""
    uploads = schema.uploads
    with server.services.registry.database.writing() as connection:
        values = {"expires_at": uploads.c.expires_at - seconds}
        connection.execute(update(uploads).where(uploads.c.id == upload_id).values(values))


def test_an_open_upload_ends_an_hour_after_its_last_part(server: Server) -> None:
    upload = begin(server, 8)["id"]
    pass_time(server, upload, UPLOAD_SECONDS - 60)
    part_id = send(server, upload, b"1234").json()["id"]
    pass_time(server, upload, UPLOAD_SECONDS - 60)
    assert server.http.get(f"/v1/uploads/{upload}").json()["status"] == "pending"
    pass_time(server, upload, 60)
    assert server.http.get(f"/v1/uploads/{upload}").json()["status"] == "expired"
    for answer in (send(server, upload, b"5678"), complete(server, upload, [part_id])):
        assert (answer.status_code, error_of(answer)["code"]) == (409, "conflict")
    services = server.services
    services.files.expire(now=0.0)
    assert any(upload in name for name in on_disk(server))
    assert services.files.expire(time.time()) >= 1
    assert not any(upload in name for name in on_disk(server))
    assert server.http.get(f"/v1/uploads/{upload}").json()["status"] == "expired", "its row says so for a day"
    pass_time(server, upload, ENDED_SECONDS)
    services.files.expire(time.time())
    assert server.http.get(f"/v1/uploads/{upload}").status_code == 404


def test_doctor_finds_a_part_and_a_file_that_changed_and_repair_forgets_them(
    make_server: Callable[..., Server],
) -> None:
    server = make_server()
    upload = begin(server, 8)["id"]
    part_id = send(server, upload, b"1234").json()["id"]
    file_id = server.openai.files.create(file=("f", b"rows"), purpose="evals").id
    store, home = server.services.files.store, server.services.settings.home
    server.stop()
    for path in (store.path(file_id), store.part_path(upload, part_id)):
        path.chmod(0o644)
        path.write_bytes(b"rotten")
    report = run_doctor(home)
    assert {finding.code for finding in report.findings} == {"file_damaged", "part_damaged"} and not report.is_sound
    assert run_doctor(home, repair=True).is_sound and run_doctor(home).is_clean
    again = make_server()
    assert again.http.get(f"/v1/files/{file_id}").status_code == 404
    assert again.http.get(f"/v1/uploads/{upload}").json()["parts"] == [], "the upload goes on"


def test_a_part_that_changed_on_the_disk_never_becomes_a_file(server: Server) -> None:
    upload = begin(server, 4)["id"]
    part_id = send(server, upload, b"1234").json()["id"]
    path = server.services.files.store.part_path(upload, part_id)
    path.chmod(0o644)
    path.write_bytes(b"1235")
    answer = complete(server, upload, [part_id])
    assert (answer.status_code, error_of(answer)["code"]) == (500, "storage_damaged")
    server.http.post(f"/v1/uploads/{upload}/cancel")
