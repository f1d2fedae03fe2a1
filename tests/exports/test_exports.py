"""Exports over HTTP: a real server, the real child process, a real (tiny) base."""

from __future__ import annotations

import io
import os
import sqlite3
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

from adapters.bases import BaseModel
from adapters.database_errors import BUSY_SECONDS
from adapters.export_rows import ExportStatus
from tests.fixtures.adapters import shape_only_base, write_adapter
from tests.fixtures.service import Server, error_of, eventually, running
from tests.server.test_locked_registry import locked


def ordered(server: Server, model: str = "router", **body: Any) -> dict[str, Any]:
    answer = server.http.post("/v1/exports", json={"model": model, "parity": False, **body})
    assert answer.status_code == 202, answer.text
    row: dict[str, Any] = answer.json()
    return row


def ended(server: Server, export_id: str, seconds: float = 240.0) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while True:
        row: dict[str, Any] = server.http.get(f"/v1/exports/{export_id}").json()
        if row["status"] not in ("queued", "running"):
            return row
        assert time.monotonic() < deadline, row
        time.sleep(0.05)


def result_of(server: Server, export_id: str, tenant: str = "default") -> Path:
    """Where the result of an order lies, or will lie."""
    row = server.services.registry.get_export(tenant, export_id)
    return server.services.exports.results.place(row.result).out


def hidden(server: Server) -> list[str]:
    """What lies beside the results: of work under way, or left over."""
    return sorted(path.name for path in server.services.exports.results.root.glob(".*"))


def test_an_export_becomes_a_folder_that_comes_back_as_tar_and_as_single_files(server: Server, base: BaseModel) -> None:
    row = ended(server, ordered(server)["id"])
    assert row["status"] == "succeeded" and row["progress"] == 1.0 and row["model"] == "router@1"
    assert row["parity"]["verdict"] == "passed" and row["parity"]["level"] == "weights_only"
    answer = server.http.get(f"/v1/exports/{row['id']}/content")
    assert int(answer.headers["content-length"]) == len(answer.content)
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        files = {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]
    assert set(files) == {*row["files"], "manifest.json"}
    assert {name: len(files[name]) for name in row["files"]} == {
        name: entry["size_bytes"] for name, entry in row["files"].items()
    }
    assert set(load(files["model.safetensors"])) == set(load((base.folder / "model.safetensors").read_bytes()))
    one = server.http.get(f"/v1/exports/{row['id']}/content", params={"file": "config.json"})
    assert one.content == files["config.json"]
    part = server.http.get(
        f"/v1/exports/{row['id']}/content", params={"file": "config.json"}, headers={"range": "bytes=0-9"}
    )
    assert part.status_code == 206 and part.content == files["config.json"][:10]


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own
def test_u4b_a_version_that_cannot_be_served_is_exported_all_the_same(server: Server) -> None:
    pushed = server.push("dora", server.adapter(config={"use_dora": True})).json()
    assert pushed["status"] == "export_only"
    row = ended(server, ordered(server, "dora@1")["id"], 240)
    assert row["status"] == "succeeded", row["error"]
    assert (row["parity"]["verdict"], row["parity"]["merged_by"]) == ("passed", "peft")


def test_f14_an_export_that_ends_while_the_registry_is_locked_is_written_down_when_it_is_free(server: Server) -> None:
    export_id = ordered(server, dtype="float16")["id"]
    eventually(lambda: server.http.get(f"/v1/exports/{export_id}").json()["status"] == "running")
    made = result_of(server, export_id)
    with locked(server.services.settings.home, "IMMEDIATE"):
        eventually(made.is_dir, 240)
        time.sleep(BUSY_SECONDS + 1.5)
        assert server.http.get(f"/v1/exports/{export_id}").json()["status"] == "running"
    assert ended(server, export_id)["status"] == "succeeded"


def test_the_parity_report_has_the_logits_where_they_are_asked_for(server: Server) -> None:
    row = ended(server, ordered(server, dtype="bfloat16", parity=True)["id"])
    assert row["status"] == "succeeded", row["error"]
    logits = row["parity"]["logits"]
    assert row["parity"]["level"] == "logits" and logits["merged_against_rounded_peft"]["max_abs"] < 1e-4
    assert logits["merged_against_peft"]["max_abs"] > logits["merged_against_rounded_peft"]["max_abs"]


@pytest.mark.parametrize(
    ("order", "names"),
    [
        ({"format": "gguf", "dtype": "q8_0"}, {"router-1-Q8_0.gguf"}),
        ({"format": "gguf-lora"}, {"router-1-lora-F32.gguf"}),
        ({"format": "adapter"}, {"adapter_config.json", "adapter_model.safetensors"}),
        ({"format": "hf", "shard_bytes": 1 << 20}, {"model.safetensors", "config.json"}),
    ],
    ids=lambda value: value.get("format") if isinstance(value, dict) else "",
)
def test_every_form_can_be_ordered(server: Server, order: dict[str, Any], names: set[str]) -> None:
    row = ended(server, ordered(server, **order)["id"])
    assert (row["status"], row["error"]) == ("succeeded", None)
    assert names | {"manifest.json", "parity.json", "parity.html"} <= {*row["files"], "manifest.json"}
    assert row["parity"]["verdict"] == "passed" and row["bytes_done"] == row["bytes_total"] > 0
    (largest,) = sorted(row["files"], key=lambda name: row["files"][name]["size_bytes"])[-1:]
    content = server.http.get(f"/v1/exports/{row['id']}/content", params={"file": largest})
    assert content.headers["etag"] == f'"{row["files"][largest]["sha256"]}"' and largest in names


def test_orders_that_cannot_work_are_refused_at_once(server: Server) -> None:
    for body, status, code in (
        ({"model": "router", "format": "zip"}, 400, "invalid_request"),
        ({"model": "router", "dtype": "int8"}, 400, "invalid_request"),
        ({"model": "router", "format": "gguf", "dtype": "q3_k"}, 400, "invalid_request"),
        ({"model": "router", "format": "gguf", "shard_bytes": 1 << 30}, 400, "invalid_request"),
        ({"model": "router", "shard_bytes": 1000}, 400, "invalid_request"),
        ({"model": "router", "merge_into": "int8"}, 400, "invalid_request"),
        ({"model": "nobody"}, 404, "model_not_found"),
        ({"model": "router@9"}, 404, "model_not_found"),
        ({"model": "../x"}, 400, "name_invalid"),
        ({"model": "router", "out": "/tmp/x"}, 422, None),
    ):
        answer = server.http.post("/v1/exports", json=body)
        assert answer.status_code == status, (body, answer.text)
        assert code is None or error_of(answer)["code"] == code
    assert server.http.get("/v1/exports/export-none").status_code == 404


def test_content_before_the_end_is_a_conflict_and_cancel_leaves_nothing(server: Server) -> None:
    row = ordered(server, parity=True)
    assert server.http.get(f"/v1/exports/{row['id']}/content").status_code == 409
    exports, result = server.services.exports, result_of(server, row["id"])
    eventually(lambda: exports._running is not None and exports._running.row.id == row["id"])
    assert server.http.post(f"/v1/exports/{row['id']}/cancel").json()["status"] == "cancelled"
    eventually(lambda: exports._running is None)
    assert ended(server, row["id"])["status"] == "cancelled"
    eventually(lambda: hidden(server) == [] and not result.exists())


def test_the_same_idempotency_key_is_one_export(server: Server) -> None:
    key = {"idempotency-key": "once"}
    body = {"model": "router", "parity": False}
    first, second = (server.http.post("/v1/exports", json=body, headers=key).json()["id"] for _ in range(2))
    assert first == second
    assert ended(server, first)["status"] == "succeeded"
    assert first in [row["id"] for row in server.http.get("/v1/exports").json()["data"]]


def test_a_flipped_byte_in_the_store_fails_the_export_by_digest(server: Server) -> None:
    version = server.pushed("damaged")
    path = server.services.store.folder(version["digest"]) / "adapter_model.safetensors"
    os.chmod(path, 0o644)  # noqa: PTH101 - the file is read-only
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    row = ended(server, ordered(server, "damaged")["id"])
    assert row["status"] == "failed" and row["error"]["code"] == "storage_damaged"


def test_a_quantised_base_without_merge_base_names_the_setting(base: BaseModel, tmp_path: Path) -> None:
    quantised = shape_only_base(
        tmp_path / "awq", **{**dict(base.config), "quantization_config": {"quant_method": "awq", "bits": 4}}
    )
    with running(quantised, tmp_path / "without") as server:
        server.pushed("router")
        answer = server.http.post("/v1/exports", json={"model": "router"})
        assert answer.status_code == 409
        assert error_of(answer)["code"] == "merge_base_missing" and "HOTSHOE_MERGE_BASE" in error_of(answer)["message"]
    with running(quantised, tmp_path / "with", merge_base=str(base.folder)) as server:
        server.pushed("router")
        assert ended(server, ordered(server)["id"])["status"] == "succeeded"


def test_an_export_that_ended_before_its_row_said_so_runs_again(base: BaseModel, tmp_path: Path) -> None:
    with running(base, tmp_path) as server:
        server.push("router", write_adapter(tmp_path / "adapter", base))
        row = ended(server, ordered(server)["id"])
        assert result_of(server, row["id"]).is_dir()
    with sqlite3.connect(tmp_path / "home" / "registry.sqlite3") as connection:  # as a kill in that moment leaves it
        assert connection.execute("update exports set status = 'running' where id = ?", (row["id"],)).rowcount == 1
    with running(base, tmp_path) as server:
        again = ended(server, row["id"])
        assert again["status"] == "succeeded", again["error"]


def test_an_export_that_ran_when_the_server_ended_runs_again(base: BaseModel, tmp_path: Path) -> None:
    with running(base, tmp_path) as server:
        server.push("router", write_adapter(tmp_path / "adapter", base))
        row = ordered(server)
        eventually(lambda: server.http.get(f"/v1/exports/{row['id']}").json()["status"] == "running")
    with running(base, tmp_path) as server:
        assert server.services.registry.get_export("default", row["id"]).status is not ExportStatus.CANCELLED
        assert ended(server, row["id"])["status"] == "succeeded"


def test_the_list_comes_in_pages_and_a_tenant_keeps_so_many_that_have_ended(base: BaseModel, tmp_path: Path) -> None:
    with running(base, tmp_path, max_export_rows=3) as server:
        server.pushed("router")
        made = [ordered(server, dtype=dtype)["id"] for dtype in ("float32", "float16", "bfloat16", None, None)]
        for one in made[2:]:
            assert ended(server, one)["status"] == "succeeded"
        first = server.http.get("/v1/exports", params={"limit": 2}).json()
        assert ([row["id"] for row in first["data"]], first["has_more"]) == ([made[4], made[3]], True)
        rest = server.http.get("/v1/exports", params={"limit": 2, "after": made[3]}).json()
        assert ([row["id"] for row in rest["data"]], rest["has_more"]) == ([made[2]], False)
        assert server.http.get(f"/v1/exports/{made[0]}").status_code == 404
        results = server.services.exports.results.root
        eventually(lambda: len([path for path in results.iterdir() if path.name.startswith("export-")]) == 2, 10)
        refused = server.http.get("/v1/exports", params={"after": "export-nothing"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "after")
        assert server.http.get("/v1/exports", params={"limit": 101}).status_code == 422
