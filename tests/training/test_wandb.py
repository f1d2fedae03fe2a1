"""Curves in Weights & Biases, offline, where it is installed (it is in no lock of ours)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.killed import call

wandb = pytest.importorskip("wandb", reason="Weights & Biases is not installed: pip install wandb")


def test_a_run_logs_its_curves_and_settings_and_a_resumed_one_goes_on_under_its_id(
    colours: Path, qwen2_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    asked: dict[str, Any] = {"data": str(colours), "name": "colours", "base": str(qwen2_base), "rank": 2, "epochs": 0.4}
    asked |= {"validation": str(colours), "out": str(tmp_path / "out"), "report_to": ("tensorboard", "wandb")}
    stopped = call({**asked, "compare": False}, "SIGTERM:2")
    assert stopped.code == 130, stopped.said
    done = call({**asked, "compare": False}, resume=True)
    assert done.code == 0, done.said
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1  # one id for both starts
    first, second = (next(folder.glob("*.wandb")).read_bytes() for folder in folders)
    assert b"learning_rate" in first and b"max_gradient_norm" in first  # the settings
    for written in (first, second):
        assert b"train/loss" in written and b"eval/loss" in written
    assert list((tmp_path / "out" / "runs").glob("events.out.tfevents.*"))
