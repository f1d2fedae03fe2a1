"""SIGKILL at every system call of an export that changes the disk: the folder is whole or absent, a retry succeeds."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.bases import load_base
from adapters.export import ExportRequest, export
from adapters.staging import sweep_partial
from tests.fixtures.adapters import write_adapter
from tests.fixtures.bases import tiny_qwen2
from tests.fixtures.killing import run_and_kill, why_not_here

needs_ptrace = pytest.mark.skipif(bool(why_not_here()), reason=why_not_here() or "ptrace works here")
SAMPLE_EVERY = 12


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> ExportRequest:
    folder = tmp_path_factory.mktemp("killed")
    base = load_base(tiny_qwen2(folder / "base"))
    adapter = write_adapter(folder / "adapter", base)
    return ExportRequest(adapter, base, folder / "out", source="router@1", with_logits=False, workers=2)


def is_whole(folder: Path) -> bool:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    found.pop("manifest.json")
    return {name: entry["sha256"] for name, entry in manifest["files"].items()} == found


def kill_at_every(request: ExportRequest, folder: Path, step: int) -> int:
    """How many changing calls the main thread of a whole run has; its workers die with it, wherever they are."""
    whole = run_and_kill(lambda: export(replace(request, out=folder / "whole" / "out")), None)
    assert whole.acknowledged and is_whole(folder / "whole" / "out")
    for kill_at in sorted({*range(0, len(whole.calls), step), *range(len(whole.calls) - 4, len(whole.calls))}):
        place = folder / f"killed-{kill_at}"
        wanted = replace(request, out=place / "out")
        run = run_and_kill(lambda wanted=wanted: export(wanted), kill_at)  # type: ignore[misc]
        assert run.was_killed
        if place.exists():
            sweep_partial(place)
            assert [path.name for path in place.iterdir()] in ([], ["out"]), run.calls[-1]
        if wanted.out.exists():
            assert is_whole(wanted.out), run.calls[-1]
        else:
            assert is_whole(export(wanted).folder)
        shutil.rmtree(place)
    return len(whole.calls)


@needs_ptrace
def test_f4_an_export_killed_at_sampled_system_calls_is_whole_or_absent(
    request_: ExportRequest, tmp_path: Path
) -> None:
    assert kill_at_every(request_, tmp_path, SAMPLE_EVERY) >= 30


@needs_ptrace
@pytest.mark.long
def test_f4_an_export_killed_at_every_system_call_is_whole_or_absent(request_: ExportRequest, tmp_path: Path) -> None:
    assert kill_at_every(request_, tmp_path, 1) >= 30
