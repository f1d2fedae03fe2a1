"""The result of an export as a client fetches it: by parts, with ETags, cut off and gone on, and until it is gone."""

from __future__ import annotations

import hashlib
import io
import shutil
import sqlite3
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from adapters.bases import BaseModel
from tests.exports.test_exports import ended, ordered, result_of
from tests.fixtures.service import Server, error_of, eventually, running

NO_CURL = shutil.which("curl") is None
FILE = {"file": "model.safetensors"}


@pytest.fixture(scope="module")
def row(server: Server) -> dict[str, Any]:
    row = ended(server, ordered(server)["id"])
    assert row["status"] == "succeeded", row["error"]
    return row


@pytest.mark.parametrize("params", [{}, FILE, {"file": "manifest.json"}], ids=["tar", "file", "manifest"])
def test_every_part_of_a_content_can_be_asked_for(server: Server, row: dict[str, Any], params: dict[str, str]) -> None:
    url = f"/v1/exports/{row['id']}/content"
    whole = server.http.get(url, params=params)
    etag, size = whole.headers["etag"], len(whole.content)
    assert (whole.status_code, whole.headers["accept-ranges"]) == (200, "bytes")
    assert int(whole.headers["content-length"]) == size
    head = server.http.head(url, params=params)
    kept = ("etag", "content-length", "accept-ranges", "content-disposition", "content-type")
    assert head.status_code == 200 and head.content == b""
    assert {name: head.headers[name] for name in kept} == {name: whole.headers[name] for name in kept}

    def asked(**headers: str) -> Any:
        return server.http.get(
            url, params=params, headers={key.replace("_", "-"): value for key, value in headers.items()}
        )

    for wanted, start, end in (("0-9", 0, 10), (f"{size // 2}-", size // 2, size), ("-7", size - 7, size)):
        part = asked(range=f"bytes={wanted}", if_range=etag)
        assert (part.status_code, part.content) == (206, whole.content[start:end])
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
    assert asked(range="bytes=5-", if_range='"of another"').content == whole.content
    assert asked(range="bytes=0-1,4-5").status_code == 200
    same = asked(if_none_match=f'"x", {etag}')
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", etag)
    beyond = asked(range=f"bytes={size}-")
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{size}")
    assert error_of(beyond)["code"] == "range_not_satisfiable"


def test_the_etag_of_a_file_is_its_sha256_and_the_manifests_word(server: Server, row: dict[str, Any]) -> None:
    manifest = server.http.get(f"/v1/exports/{row['id']}/content", params={"file": "manifest.json"})
    assert manifest.headers["etag"] == f'"{hashlib.sha256(manifest.content).hexdigest()}"'
    for name, entry in manifest.json()["files"].items():
        answer = server.http.get(f"/v1/exports/{row['id']}/content", params={"file": name})
        assert answer.headers["etag"] == f'"{entry["sha256"]}"'
        assert hashlib.sha256(answer.content).hexdigest() == entry["sha256"]
    missing = server.http.get(f"/v1/exports/{row['id']}/content", params={"file": "../registry.sqlite3"})
    assert missing.status_code == 404 and "model.safetensors" in error_of(missing)["message"]


@pytest.mark.skipif(NO_CURL, reason="there is no curl")
@pytest.mark.parametrize("query", ["", "?file=model.safetensors"], ids=["tar", "file"])
def test_curl_goes_on_where_it_was_cut_off(server: Server, row: dict[str, Any], tmp_path: Path, query: str) -> None:
    url, target = f"{server.url}/v1/exports/{row['id']}/content{query}", tmp_path / "got"
    whole = server.http.get(url).content
    target.write_bytes(whole[:100_001])
    done = subprocess.run(
        ["curl", "-sS", "-f", "-C", "-", "-o", str(target), "-w", "%{http_code} %{size_download}", url],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"206 {len(whole) - 100_001}", done.stderr
    assert target.read_bytes() == whole
    if not query:
        with tarfile.open(target) as tar:
            assert "manifest.json" in tar.getnames()


def test_a_changed_file_is_said_and_not_sent(server: Server) -> None:
    row = ended(server, ordered(server, dtype="float16")["id"])
    (result_of(server, row["id"]) / "config.json").write_text("{}")
    for params in ({}, {"file": "config.json"}):
        answer = server.http.get(f"/v1/exports/{row['id']}/content", params=params)
        assert answer.status_code == 500 and error_of(answer)["code"] == "storage_damaged"
    assert server.http.get(f"/v1/exports/{row['id']}/content", params={"file": "tokenizer.json"}).status_code in (
        200,
        404,
    )
    again = ended(server, ordered(server, dtype="float16")["id"])
    assert again["status"] == "succeeded" and again["attempts"] == 1, "a damaged result is made again"
    assert server.http.get(f"/v1/exports/{again['id']}/content").status_code == 200
    shutil.rmtree(result_of(server, again["id"]))
    assert server.http.get(f"/v1/exports/{again['id']}/content").status_code == 404
    server.services.exports._sweep()
    assert not server.http.get(f"/v1/exports/{again['id']}").json()["has_content"], "what is pruned is forgotten"


def test_a_result_goes_when_it_is_deleted_and_who_reads_it_gets_it_whole(server: Server) -> None:
    row = ended(server, ordered(server, dtype="bfloat16")["id"])
    folder = result_of(server, row["id"])
    large = folder / "model.safetensors"
    assert server.services.registry.stored_exports().result_bytes > 0
    url = f"/v1/exports/{row['id']}"
    with server.http.stream("GET", f"{url}/content") as answer:
        expected, pieces = int(answer.headers["content-length"]), answer.iter_raw(1024)
        got = next(pieces)
        assert server.http.delete(url).json() == {"id": row["id"], "object": "export", "deleted": True}
        assert not large.exists()
        got += b"".join(pieces)
    assert len(got) == expected
    with tarfile.open(fileobj=io.BytesIO(got)) as tar:
        assert "model.safetensors" in tar.getnames()
    for method, path in (("GET", url), ("GET", f"{url}/content"), ("HEAD", f"{url}/content"), ("DELETE", url)):
        assert server.http.request(method, path).status_code == 404
    server.services.exports._sweep()
    assert [path.name for path in folder.parent.glob(f".{folder.name}*")] == []


def test_a_result_whose_time_is_over_is_gone_with_what_to_do_next(base: BaseModel, tmp_path: Path) -> None:
    with running(base, tmp_path, export_days=2) as server:
        server.pushed("router")
        row = ended(server, ordered(server)["id"])
        assert row["has_content"] and row["expires_at"] == pytest.approx(row["finished_at"] + 2 * 86_400, abs=2)
        result = result_of(server, row["id"])
        over(tmp_path, row["id"])
        gone = server.http.get(f"/v1/exports/{row['id']}/content")
        assert gone.status_code == 404 and "export router@1 again" in error_of(gone)["message"]
        assert not server.http.get(f"/v1/exports/{row['id']}").json()["has_content"]
        again = ended(server, ordered(server)["id"])
        assert (again["status"], again["attempts"]) == ("succeeded", 1), "what is over is made again"
        over(tmp_path, again["id"])
    assert result.is_dir()
    with running(base, tmp_path, export_days=0) as server:
        eventually(lambda: not result.exists())
        row = ended(server, ordered(server)["id"])
        assert row["expires_at"] is None and row["has_content"]


def over(scratch: Path, export_id: str) -> None:
    """The time of a result is over, as it will be in days."""
    with sqlite3.connect(scratch / "home" / "registry.sqlite3") as connection:
        assert connection.execute("update exports set expires_at = 1 where id = ?", (export_id,)).rowcount == 1
