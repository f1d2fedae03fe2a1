"""What a job leaves among its tenant's files: its metrics in OpenAI's columns, or what the data check found."""

from __future__ import annotations

import csv
import hashlib
import io
import shutil
from pathlib import Path
from typing import Any

from adapters.file_rows import RESULTS, FileQuery, Owner
from adapters.files import Content, Files, NewFile
from adapters.job_rows import JobRow
from adapters.types import AdapterVersion

COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


def metrics_csv(curve: dict[str, Any]) -> bytes:
    """The curve of a card, a line a step; what was not measured is empty."""
    training, validation = dict(curve["training"]), dict(curve["validation"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for step in sorted({*training, *validation}):
        writer.writerow([step, training.get(step, ""), "", validation.get(step, ""), ""])
    return text.getvalue().encode()


def keep_results(files: Files, job: JobRow, version: AdapterVersion) -> str | None:
    """The file's id; the same job's again is the file that is there."""
    curve = ((version.card or {}).get("result") or {}).get("curve")
    if not curve:
        return None
    return _kept(files, job, f"{job.id}-metrics.csv", metrics_csv(curve))


def keep_gate(files: Files, job: JobRow, report: Path) -> str:
    """The id of the file with what the data check found."""
    return _kept(files, job, f"{job.id}-data-check.json", report.read_bytes())


def _kept(files: Files, job: JobRow, name: str, content: bytes) -> str:
    """The id of a file with this content; the same job's again is the file that is there."""
    owner, digest = Owner(job.tenant, job.actor), f"sha256:{hashlib.sha256(content).hexdigest()}"
    for known in files.registry.files(owner, FileQuery(RESULTS, digest)):
        if known.filename == name:  # this job's, of an earlier try
            return known.id
    folder = files.store.stage()
    try:
        staged = folder / "content"
        staged.write_bytes(content)
        made = Content(staged, len(content), digest)
        return files.add_own(owner, NewFile(RESULTS, name), made).id
    finally:
        shutil.rmtree(folder, ignore_errors=True)
