"""`hotshoe train --dry-run`: three measured steps, an end time, and nothing left."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from typer.testing import CliRunner

from server.cli.main import build_app
from training.config import TrainingConfig
from training.planner.dry_run import dry_run, lines


def test_three_steps_are_measured_and_the_end_is_said(colours: Path, qwen2_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    words = ["train", str(colours), "--name", "t", "--out", str(folder / "t"), "--base", str(qwen2_base)]
    result = CliRunner().invoke(build_app(), [*words, "--method", "lora", "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout[result.stdout.index("{") :])
    assert len(found["step_seconds"]) == len(found["step_tokens"]) == 3
    assert found["steps"] == 30 and found["training_seconds"] > 0
    assert datetime.fromisoformat(found["ends_at"]) > datetime.now().astimezone().replace(year=2000)
    assert found["peak_bytes"] > 0 and found["predicted"]["peak_bytes"] > 0
    assert not list(folder.iterdir()), "nothing is left behind"
    said = "\n".join(lines(found))
    assert "the run ends at" in said and "nothing was saved" in said


def test_a_run_that_would_be_refused_is_refused_at_once(tmp_path: Path, qwen2_base: Path) -> None:
    import pytest

    from adapters.errors import DataInvalid

    with pytest.raises(DataInvalid):
        dry_run(TrainingConfig(data=tmp_path / "missing.jsonl", name="t", base=str(qwen2_base)))
