"""Files as OpenAI's own client calls them."""

from __future__ import annotations

import hashlib
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from adapters.file_rows import PURPOSES
from tests.fixtures.service import Server, error_of, eventually
from tests.server.test_uploads import HEADERS, end, part

ROWS = b'{"messages": []}\n' * 50


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.openai


def on_disk(server: Server) -> set[str]:
    return server.services.files.store.files()


def nothing_is_left(server: Server) -> bool:
    store = server.services.files.store
    return on_disk(server) == {file.id for file in server.services.registry.kept_files()} and not any(
        (store.root / ".staging").iterdir()
    )


def test_a13_a_file_can_be_sent_read_fetched_listed_and_deleted(server: Server, client: openai.OpenAI) -> None:
    sent = client.files.create(file=("rows.jsonl", ROWS), purpose="evals")
    assert (sent.object, sent.bytes, sent.filename, sent.purpose) == ("file", len(ROWS), "rows.jsonl", "evals")
    assert sent.model_extra == {"sha256": hashlib.sha256(ROWS).hexdigest()}
    assert client.files.retrieve(sent.id) == sent
    assert client.files.content(sent.id).content == ROWS
    assert sent.id in [file.id for file in client.files.list(purpose="evals")]
    assert client.files.wait_for_processing(sent.id).status == "processed"
    gone = client.files.delete(sent.id)
    assert (gone.id, gone.deleted, gone.object) == (sent.id, True, "file")
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(sent.id)
    assert sent.id not in on_disk(server) and nothing_is_left(server)


def test_a_file_from_a_path_keeps_its_name_and_stays_as_long_as_it_is_asked_to(
    client: openai.OpenAI, tmp_path: Path
) -> None:
    path = tmp_path / "größe.jsonl"
    path.write_bytes(ROWS)
    expiry = {"anchor": "created_at", "seconds": 3600}
    sent = client.files.create(file=path, purpose="fine-tune", expires_after=expiry)  # type: ignore[arg-type]
    assert sent.filename == path.name and sent.expires_at == sent.created_at + 3600
    answer = client.files.content(sent.id)
    assert "filename*=utf-8''gr%C3%B6%C3%9Fe.jsonl" in answer.response.headers["content-disposition"]
    assert answer.response.headers["etag"].strip('"').removeprefix("sha256:") == hashlib.sha256(ROWS).hexdigest()
    client.files.delete(sent.id)


def test_a_list_goes_on_after_its_last_file_in_either_order(client: openai.OpenAI) -> None:
    ids = [client.files.create(file=(f"{i}", b"x"), purpose="user_data").id for i in range(5)]
    assert [file.id for file in client.files.list(purpose="user_data", limit=2)] == ids[::-1]  # the client's paging
    assert [file.id for file in client.files.list(purpose="user_data", limit=2, order="asc")] == ids
    page = client.files.list(purpose="user_data", after=ids[2], limit=10)
    assert [file.id for file in page.data] == [ids[1], ids[0]] and not page.has_next_page()
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.list(after="file-" + "0" * 24)
    assert refused.value.param == "after"
    for file_id in ids:
        client.files.delete(file_id)


@pytest.mark.parametrize("purpose", ["assistants", "vision", "batch", ""])
def test_other_purposes_are_refused_with_the_list(server: Server, client: openai.OpenAI, purpose: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("x", b"x"), purpose=purpose)  # type: ignore[arg-type]
    assert refused.value.param == "purpose" and all(one in refused.value.message for one in PURPOSES)
    assert nothing_is_left(server)


@pytest.mark.parametrize("filename", ["../../../etc/passwd", "a\\b", "x" * 300, "nul%00", "a‮b"])
def test_u9_a_file_name_is_text_that_is_checked_and_never_a_path(server: Server, filename: str) -> None:
    body = part("purpose", b"user_data") + part("file", b"x", f'; filename="{filename}"') + end()
    answer = server.http.post("/v1/files", content=body, headers=HEADERS)
    if filename == "nul%00":  # three ordinary characters
        assert answer.status_code == 200 and answer.json()["filename"] == filename
        assert server.http.delete(f"/v1/files/{answer.json()['id']}").status_code == 200
    else:
        assert (answer.status_code, error_of(answer)["param"]) == (400, "filename")
    assert nothing_is_left(server)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (part("purpose", b"evals") + end(), 400, "file"),
        (part("file", b"x", '; filename="x"') + end(), 400, "purpose"),
        (part("purpose", b"evals") + part("file", b"x", '; filename="x"'), 400, None),
        (part("purpose", b"evals" * 100) + end(), 413, "purpose"),
        (part("purpose", b"evals") + part("folder", b"x") + part("file", b"x", '; filename="x"') + end(), 422, None),
        (
            part("purpose", b"evals")
            + part("expires_after[seconds]", b"3600")
            + part("file", b"x", '; filename="x"')
            + end(),
            400,
            "expires_after",
        ),
    ],
    ids=["no file", "no purpose", "cut short", "long text", "another part", "half an expiry"],
)
def test_u30_a_form_that_is_no_file_is_refused(server: Server, body: bytes, status: int, param: str | None) -> None:
    answer = server.http.post("/v1/files", content=body, headers=HEADERS)
    assert (answer.status_code, error_of(answer)["param"]) == (status, param), answer.text
    assert nothing_is_left(server)


def test_u14_a_file_over_the_limit_is_413_while_it_comes_and_nothing_is_kept(
    make_server: Callable[..., Server],
) -> None:
    server = make_server(max_file_bytes=100_000)

    def endless() -> Iterator[bytes]:
        yield part("purpose", b"evals")
        yield b'--b0undary\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        for _ in range(100):
            yield bytes(1 << 20)

    answer = server.http.post("/v1/files", content=endless(), headers=HEADERS)
    assert (answer.status_code, error_of(answer)["param"]) == (413, "file")
    head = f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: {HEADERS['content-type']}\r\n"
    assert server.raw(head + f"Content-Length: {1 << 40}\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 413")
    assert nothing_is_left(server)


def test_a_client_that_goes_away_in_the_middle_leaves_nothing(server: Server) -> None:
    def cut() -> Iterator[bytes]:
        yield part("purpose", b"evals") + part("file", bytes(1 << 20), '; filename="x"')
        raise KeyboardInterrupt

    with httpx.Client(base_url=server.url) as other, pytest.raises(KeyboardInterrupt):
        other.post("/v1/files", content=cut(), headers=HEADERS)
    eventually(lambda: nothing_is_left(server))


def test_the_same_request_again_is_the_same_file(server: Server) -> None:
    headers = {"idempotency-key": "once"}
    form = {"data": {"purpose": "evals"}, "files": {"file": ("a", b"same")}}
    first, second = (server.http.post("/v1/files", headers=headers, **form) for _ in range(2))  # type: ignore[arg-type]
    assert first.json()["id"] == second.json()["id"] and nothing_is_left(server)
    form["files"] = {"file": ("a", b"other")}
    assert error_of(server.http.post("/v1/files", headers=headers, **form))["code"] == "idempotency_key_reused"  # type: ignore[arg-type]


def test_a_restart_sweeps_what_has_no_row_and_keeps_what_has(make_server: Callable[..., Server]) -> None:
    server = make_server()
    kept = server.openai.files.create(file=("kept", b"kept"), purpose="evals").id
    store = server.services.files.store
    (store.root / ("file-" + "a" * 24)).write_bytes(b"renamed, and killed before its row")
    (store.stage() / "content").write_bytes(b"killed while it came")
    server.stop()
    again = make_server()
    assert on_disk(again) == {kept} and nothing_is_left(again)
    assert again.openai.files.content(kept).content == b"kept"


def test_f7_a_full_disk_is_507_and_what_is_there_can_still_be_read(server: Server) -> None:
    kept = server.openai.files.create(file=("kept", b"kept"), purpose="evals").id
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, before[1]))  # of this process, which is the server's
    try:
        answer = server.http.post("/v1/files", data={"purpose": "evals"}, files={"file": ("big", bytes(8 << 20))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert (answer.status_code, error_of(answer)["code"]) == (507, "storage_full")
    assert server.openai.files.content(kept).content == b"kept"
    assert nothing_is_left(server)


def test_f12_a_file_whose_bytes_are_gone_is_said_to_be_and_can_be_deleted(server: Server) -> None:
    file_id = server.openai.files.create(file=("kept", b"kept"), purpose="evals").id
    server.services.files.store.path(file_id).unlink()
    answer = server.http.get(f"/v1/files/{file_id}/content")
    assert (answer.status_code, error_of(answer)["code"]) == (500, "storage_damaged")
    assert server.http.delete(f"/v1/files/{file_id}").status_code == 200


def test_files_are_readable_by_this_account_only(server: Server) -> None:
    file_id = server.openai.files.create(file=("kept", b"kept"), purpose="evals").id
    store = server.services.files.store
    assert oct(store.root.stat().st_mode)[-3:] == "700" and oct(store.path(file_id).stat().st_mode)[-3:] == "444"
