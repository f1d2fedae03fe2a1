"""Doctor: litter told from damage, every finding named, and repair that leaves a folder that can serve."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from sqlalchemy import text

from adapters.database import FILE
from adapters.doctor import Report, run_doctor
from adapters.publish import PublishContext, publish
from adapters.types import DEFAULT_TENANT, STABLE, Candidate, VersionStatus
from tests.fixtures.adapters import write_adapter

WHERE = (DEFAULT_TENANT, "router")


@pytest.fixture
def home(tmp_path: Path, context: PublishContext) -> Path:
    """router@1 and router@2 (stable), both ready."""
    for number in (1, 2):
        publish(write_adapter(tmp_path / str(number), context.base, seed=number), "router", context=context)
        context.registry.set_status(*WHERE, number, VersionStatus.READY)
    context.registry.move_alias(*WHERE, STABLE, 2, expected_generation=1, actor="x")
    return tmp_path / "home"


def codes(report: Report) -> list[str]:
    return [finding.code for finding in report.findings]


def blob(context: PublishContext, number: int) -> Path:
    digest = context.registry.get(*WHERE, number).digest
    assert digest is not None
    return context.store.folder(digest)


def test_a_sound_folder_is_clean(home: Path) -> None:
    report = run_doctor(home)
    assert report.is_clean and report.is_sound
    assert (report.versions, report.blobs) == (2, 2)
    assert report.lines() == [f"{home}: sound; 2 versions, 2 blobs looked at"]
    assert report.as_dict()["findings"] == []


def test_litter_is_no_damage_and_repair_sweeps_it(home: Path, context: PublishContext) -> None:
    (context.store.stage() / "half").write_bytes(b"x")
    shutil.copytree(blob(context, 1), context.store.root / ("0" * 64))
    report = run_doctor(home)
    assert (codes(report), report.is_sound, report.is_clean) == (["leftover", "blob_unused"], True, False)
    assert all(finding.is_repaired for finding in run_doctor(home, repair=True).findings)
    assert run_doctor(home).is_clean


def test_f12_a_flipped_byte_is_damage_and_repair_rolls_the_alias_back(home: Path, context: PublishContext) -> None:
    path = blob(context, 2) / "adapter_model.safetensors"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    report = run_doctor(home)
    assert (codes(report), report.is_sound) == (["blob_damaged"], False)
    assert "DAMAGED" in report.lines()[-1]
    assert run_doctor(home, repair=True).is_sound
    assert context.registry.get(*WHERE, 2).status is VersionStatus.REJECTED
    assert context.registry.aliases(*WHERE)[0].number == 1
    assert run_doctor(home).is_clean


def test_a_candidate_whose_files_are_damaged_loses_its_share_with_them(home: Path, context: PublishContext) -> None:
    candidate = Candidate(1, 0.05)
    context.registry.set_candidate(*WHERE, STABLE, candidate, expected_generation=None, actor="x")
    shutil.rmtree(blob(context, 1))
    assert run_doctor(home, repair=True).is_sound
    (alias,) = context.registry.aliases(*WHERE)
    assert (alias.number, alias.candidate) == (2, None)


def test_a_missing_blob_of_the_only_version_takes_the_alias_away(home: Path, context: PublishContext) -> None:
    for number in (1, 2):
        shutil.rmtree(blob(context, number))
    assert codes(run_doctor(home)) == ["blob_missing"] * 2
    assert run_doctor(home, repair=True).is_sound
    assert context.registry.aliases(*WHERE) == []
    assert run_doctor(home).is_clean


def test_a_file_beside_the_canonical_ones_is_damage(home: Path, context: PublishContext) -> None:
    (blob(context, 1) / "extra.py").write_text("import os")
    assert codes(run_doctor(home)) == ["blob_damaged"]


def test_an_alias_at_a_version_that_cannot_answer_is_damage(home: Path, context: PublishContext) -> None:
    with context.registry.database.writing() as connection:
        connection.execute(text("UPDATE versions SET status = 'retired' WHERE number = 2"))
    report = run_doctor(home)
    assert codes(report) == ["alias_dangling", "blob_unused"]
    assert run_doctor(home, repair=True).is_sound
    assert context.registry.aliases(*WHERE)[0].number == 1


def test_a_missing_row_is_found_by_its_number(home: Path, context: PublishContext) -> None:
    with context.registry.database.writing() as connection:
        connection.execute(text("DELETE FROM versions WHERE number = 1"))
    assert "version_missing" in codes(run_doctor(home))


def test_garbage_and_nothing_in_place_of_a_registry_are_findings_not_tracebacks(tmp_path: Path) -> None:
    assert codes(run_doctor(tmp_path)) == ["registry_missing"]
    (tmp_path / FILE).write_bytes(b"garbage" * 1000)
    report = run_doctor(tmp_path)
    assert (codes(report), report.is_sound) == (["registry_damaged"], False)
    assert (tmp_path / FILE).read_bytes() == b"garbage" * 1000


def test_a_registry_page_that_was_overwritten_is_found(home: Path, context: PublishContext) -> None:
    context.registry.close()
    data = bytearray((home / FILE).read_bytes())
    data[4096 * 2 : 4096 * 3] = b"\x5a" * 4096
    (home / FILE).write_bytes(data)
    report = run_doctor(home)
    assert "registry_damaged" in codes(report)
    assert not report.is_sound
