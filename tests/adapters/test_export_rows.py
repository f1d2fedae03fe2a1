"""Exports as rows: orders of one result are one piece of work, tenants take turns, results have a limit and an end."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.database import FILE
from adapters.errors import Conflict, InvalidRequest, NotFound, QuotaExceeded
from adapters.export_rows import MOST_LOSSES, ExportEnd, ExportRow, ExportStatus, NewExport
from adapters.limits import UseLimits
from adapters.paging import Page
from adapters.registry import Registry
from adapters.turn_rows import Queue, last_turns
from tests.fixtures.old_state import at_schema

WEEK = 7 * 86_400.0


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    one = Registry.open(tmp_path)
    yield one
    one.close()


def ordered(registry: Registry, result: str = "export-a", tenant: str = "default", **more: Any) -> ExportRow:
    return registry.add_export(NewExport(tenant, "router@1", result, "somebody", **more))


def claimed(registry: Registry) -> ExportRow:
    row = registry.claim_export()
    assert row is not None
    return row


def succeeded(keep_seconds: float | None = WEEK) -> ExportEnd:
    report: dict[str, Any] = {"files": {}}
    return ExportEnd(ExportStatus.SUCCEEDED, path="/x", report=report, size_bytes=70, keep_seconds=keep_seconds)


def read(registry: Registry, *rows: ExportRow) -> list[ExportRow]:
    return [registry.get_export(row.tenant, row.id) for row in rows]


def results(registry: Registry) -> tuple[set[str], set[str]]:
    """Those that orders wait for, and those that are kept."""
    waited, kept = registry.results()
    return set(waited), set(kept)


def test_orders_of_one_result_are_claimed_told_and_ended_together(registry: Registry) -> None:
    first, second, other = ordered(registry), ordered(registry), ordered(registry, "export-b")
    work = claimed(registry)
    assert [row.status for row in read(registry, first, second, other)] == ["running", "running", "queued"]
    registry.note_export(work, progress=0.4, stage="merging", bytes_done=4, bytes_total=10)
    third = ordered(registry)
    assert (third.status, third.progress, third.stage, third.bytes_total) == ("running", 0.4, "merging", 10)
    assert registry.end_export(work, succeeded()) == 3
    rows = read(registry, first, second, third)
    assert {(row.status, row.progress, row.path, row.size_bytes) for row in rows} == {("succeeded", 1.0, "/x", 70)}
    assert {row.bytes_done for row in rows} == {10} and registry.get_export("default", other.id).status == "queued"
    later = ordered(registry)
    assert (later.status, later.report, later.has_result(time.time())) == ("succeeded", {"files": {}}, True)
    assert later.expires_at is None, "it was ordered to be kept for ever"


def test_cancelling_one_order_leaves_the_others_of_its_work(registry: Registry) -> None:
    first, second = ordered(registry), ordered(registry)
    work = claimed(registry)
    assert registry.cancel_export("default", first.id).status == "cancelled"
    assert registry.is_wanted(work)
    registry.cancel_export("default", second.id)
    assert not registry.is_wanted(work)
    third = ordered(registry)
    assert third.status == "queued", "work that nobody waits for is not joined"
    assert registry.end_export(work, succeeded()) == 0
    registry.requeue_export(work, has_died=True)
    assert [(row.status, row.deaths) for row in read(registry, first, second, third)] == [
        ("cancelled", 0),
        ("cancelled", 0),
        ("queued", 0),
    ]
    assert registry.cancel_export("default", first.id).finished_at is not None


def test_an_order_of_another_tenant_is_work_of_its_own(registry: Registry) -> None:
    ordered(registry, tenant="acme")
    registry.end_export(claimed(registry), succeeded())
    assert ordered(registry, tenant="other").status == "queued"
    with pytest.raises(NotFound):
        registry.get_export("other", registry.exports("acme")[0].id)


def test_tenants_take_turns(registry: Registry) -> None:
    for number in range(3):
        ordered(registry, f"export-{number}", "flood")
    ordered(registry, "export-one", "quiet")
    turns = []
    while (row := registry.claim_export()) is not None:
        turns.append(row.tenant)
        registry.end_export(row, ExportEnd(ExportStatus.FAILED, error={"code": "x"}))
    assert turns == ["flood", "quiet", "flood", "flood"]
    assert not registry.has_queued_export()


def test_a_tenant_that_deletes_what_was_begun_for_it_has_had_its_turn_all_the_same(registry: Registry) -> None:
    ordered(registry, "export-a", "sly"), ordered(registry, "export-b", "sly")
    ordered(registry, "export-c", "other"), ordered(registry, "export-d", "other")
    turns = []
    while (row := registry.claim_export()) is not None:
        turns.append(row.tenant)
        registry.end_export(row, ExportEnd(ExportStatus.FAILED, error={"code": "x"}))
        if row.tenant == "sly":
            registry.delete_export("sly", row.id, actor="sly")
    assert turns == ["sly", "other", "sly", "other"]


def test_turns_of_before_the_table_of_turns_are_kept_by_its_migration(tmp_path: Path) -> None:
    at_schema(tmp_path / FILE, "0008")
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        for tenant, started_at in (("acme", 7.0), ("other", None)):
            connection.execute("INSERT INTO tenants (id, created_at) VALUES (?, 1)", (tenant,))
            connection.execute(
                "INSERT INTO exports (id, tenant, ref, format, options, status, progress, created_at, started_at) "
                "VALUES (?, ?, 'router@1', 'hf', '{}', 'queued', 0, 1, ?)",
                (f"export-{tenant}", tenant, started_at),
            )
        connection.commit()
    registry = Registry.open(tmp_path)
    with registry.database.reading() as reading:
        assert last_turns(reading, Queue.EXPORTS, ["acme", "other"]) == {"acme": 7.0, "other": 0.0}
    registry.close()


def test_exports_are_listed_in_pages_newest_first_of_the_adapters_that_are_asked_for(registry: Registry) -> None:
    rows = [ordered(registry, f"export-{number}") for number in range(5)]
    other = registry.add_export(NewExport("default", "router_en@3", "export-x", "somebody"))
    newest_first = [row.id for row in (other, *reversed(rows))]
    seen: list[str] = []
    while page := registry.exports("default", Page(seen[-1] if seen else None, 4)):
        seen += [row.id for row in page]
    assert seen == newest_first
    assert [row.id for row in registry.exports("default", adapters=["router_en"])] == [other.id]
    assert registry.exports("default", adapters=["router%", "Router_en", "router_en@3"]) == []
    with pytest.raises(InvalidRequest, match="after is"):
        registry.exports("acme", Page(rows[0].id))


def test_of_exports_that_have_ended_a_tenant_keeps_so_many_and_the_oldest_go(registry: Registry) -> None:
    still_open = ordered(registry, "export-open", "acme", keep_rows=2)
    registry.claim_export()
    ended = []
    for number in range(4):
        row = ordered(registry, f"export-{number}", keep_rows=2)
        registry.end_export(claimed(registry), replace(succeeded(), keep_rows=2))
        ended.append(row.id)
    assert [row.id for row in registry.exports("default")] == [ended[3], ended[2]]
    assert results(registry) == ({"export-open"}, {"export-2", "export-3"})
    again = ordered(registry, "export-3", keep_rows=2)
    assert again.status == "succeeded" and [row.id for row in registry.exports("default")] == [again.id, ended[3]]
    assert results(registry) == ({"export-open"}, {"export-3"})
    assert [row.id for row in registry.exports("acme")] == [still_open.id]
    gone = [event.detail for event in registry.events("default", "router") if event.kind == "export_deleted"]
    assert {detail["export"] for detail in gone} == set(ended[:3]) and gone[0]["keep_rows"] == 2


def test_what_ran_when_the_server_ended_waits_again_and_not_for_ever(registry: Registry) -> None:
    row = ordered(registry)
    for losses in range(1, MOST_LOSSES):
        registry.note_export(claimed(registry), progress=0.3)
        registry.free_exports()
        (found,) = read(registry, row)
        assert (found.status, found.losses, found.attempts, found.progress) == ("queued", losses, losses, 0.3)
    claimed(registry)
    registry.free_exports()
    (found,) = read(registry, row)
    assert found.status == "failed" and found.error is not None and found.error["code"] == "worker_lost"


def test_a_result_is_kept_until_its_time_is_over_or_it_is_deleted(registry: Registry) -> None:
    rows = [ordered(registry, result) for result in ("export-a", "export-b")]
    registry.end_export(claimed(registry), succeeded(keep_seconds=60))
    with pytest.raises(Conflict, match="cancel it first"):
        registry.delete_export("default", rows[1].id, actor="x")
    registry.end_export(claimed(registry), succeeded(keep_seconds=None))
    assert results(registry) == (set(), {"export-a", "export-b"})
    assert registry.expire_exports(time.time() + 59) == 0
    assert registry.expire_exports(time.time() + 61) == 1
    assert results(registry) == (set(), {"export-b"})
    assert [row.has_result(time.time()) for row in read(registry, *rows)] == [False, True]
    assert ordered(registry).status == "queued", "what is gone is made again"
    assert registry.delete_export("default", rows[1].id, actor="x").id == rows[1].id
    assert results(registry) == ({"export-a"}, set())
    with pytest.raises(NotFound):
        registry.get_export("default", rows[1].id)


def test_a_tenant_has_a_number_of_exports_and_of_their_bytes(registry: Registry) -> None:
    registry.add_tenant("acme", UseLimits(exports=2, export_bytes=100), actor="operator")
    first = ordered(registry, tenant="acme", size_bytes=60)
    ordered(registry, tenant="acme", size_bytes=60)
    with pytest.raises(QuotaExceeded, match="2 exports that have not ended of at most 2") as caught:
        ordered(registry, tenant="acme", size_bytes=60)
    assert caught.value.param == "exports"
    registry.end_export(claimed(registry), succeeded())
    assert registry.get_tenant("acme").export_bytes == 70
    with pytest.raises(QuotaExceeded, match="70 bytes of at most 100, and this one would have about 60") as caught:
        ordered(registry, "export-b", "acme", size_bytes=60)
    assert caught.value.param == "export_bytes"
    assert ordered(registry, tenant="acme", size_bytes=60).status == "succeeded", "its bytes are there already"
    ordered(registry, "export-b", "acme", size_bytes=30)
    for row in registry.exports("acme"):
        if row.status is ExportStatus.SUCCEEDED:
            registry.delete_export("acme", row.id, actor="x")
    assert registry.get_tenant("acme").export_bytes == 30
    assert registry.stored_exports().queued == 1 and registry.stored_exports().result_bytes == 0
    assert first.tenant == "acme"
