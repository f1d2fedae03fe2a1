"""A job that reports to Weights & Biases, with their own client, offline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from adapters.bases import load_base
from tests.fixtures.bases import tiny_qwen2
from tests.fixtures.jobs import SECONDS, created, ended, rows, sent, trainers
from tests.fixtures.service import eventually, running

pytest.importorskip("wandb", reason="Weights & Biases is not installed: pip install wandb")


def test_a_job_reports_where_it_was_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    integrations: Any = [{"type": "wandb", "wandb": {"project": "lights", "name": "first-light"}}]
    with running(load_base(tiny_qwen2(tmp_path / "base")), tmp_path, wandb_api_key="k" * 40) as server:
        job = created(server, sent(server, rows()), epochs=20, integrations=integrations)
        assert job.integrations and job.integrations[0].wandb.project == "lights"
        eventually(lambda: bool(trainers()), SECONDS)
        assert trainers()[0].environ()["WANDB_API_KEY"] == "k" * 40
        folder, kept = server.services.jobs.folders.of(job.id), b""
        while server.openai.fine_tuning.jobs.retrieve(job.id).status != "succeeded":
            for found in folder.glob("wandb/offline-run-*/*.wandb"):
                kept = found.read_bytes() or kept
            time.sleep(0.2)
        assert ended(server, job).fine_tuned_model
        assert b"first-light" in kept and b"train/loss" in kept
