"""One export, from adapter to finished folder: plan, write, prove, seal, rename once.

The output appears whole or not at all: it is written into a hidden sibling folder, fsynced, and renamed. What a killed
process left is swept by the next export beside it. `python -m adapters.export SPEC.json` runs one as a child process.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from adapters.bases import BaseModel
from adapters.canonical import canonicalise, check
from adapters.child import end_with_stdin
from adapters.errors import HotshoeError, ParityFailed, Problem, StorageFull
from adapters.export_files import MANIFEST, PARITY, lacking, notes, seal
from adapters.export_forms import Form, plan_form
from adapters.export_request import (
    FORMATS,
    ExportRequest,
    ExportResult,
    check_order,
    check_request,
    request_from_spec,
)
from adapters.inspect import inspect_folder
from adapters.lora_config import MAX_RANK
from adapters.parity_report import Tell
from adapters.staging import explained, publish, staging, work_folder

__all__ = [
    "FORMATS",
    "MANIFEST",
    "PARITY",
    "ExportRequest",
    "ExportResult",
    "canonical_copy",
    "check_order",
    "export",
    "request_from_spec",
]
SPACE_MARGIN_BYTES = 16 << 20
HEARD_SECONDS, MOST_HOURS_ALONE = 600, 24


def export(request: ExportRequest, report: Tell | None = None) -> ExportResult:
    """Make `request.out`, which must not exist, and prove it.

    Raises OutputExists, BaseMismatch, BaseInvalid, MergeFailed, StorageFull or ParityFailed (after `report` got the
    failed parity); whatever is raised, nothing is left behind, unless the process is killed and the request has a
    `work` folder. The same inputs give the same bytes. `report` gets progress as dicts with a `stage`.
    """
    tell = report or (lambda _: None)
    check_request(request)
    form = plan_form(request)
    tell({"stage": "planned", "weight_bytes": form.weight_bytes, **form.as_dict()})
    try:
        with _folder_for(request, form) as folder:
            _check_space(request, form, folder)
            form.write(folder, tell)
            parity = _passed(request, form.prove(folder, tell), tell)
            manifest = seal(request, form.dtype, folder, parity)
            publish(folder, request.out)
    except OSError as error:
        raise explained(error) from error
    tell({"stage": "done"})
    return ExportResult(request.out, manifest, parity, lacking(request))


def _folder_for(request: ExportRequest, form: Form) -> AbstractContextManager[Path]:
    if request.work is None:
        return staging(request.out)
    return work_folder(request.work, request.inputs, form.files)


def _check_space(request: ExportRequest, form: Form, folder: Path) -> None:
    held = sum(path.stat().st_size for path in folder.iterdir())
    parent = request.out.parent
    free = shutil.disk_usage(parent).free
    needed = form.size_bytes - held + SPACE_MARGIN_BYTES
    if free < needed:
        raise StorageFull(f"{parent} has {free:,} bytes free and the export needs {needed:,}.", param="out")


def _passed(request: ExportRequest, parity: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """The report with all notes; raises ParityFailed, after `tell` got the report."""
    parity = {**parity, "notes": [*parity.get("notes", ()), *notes(request)]}
    if parity["verdict"] != "passed":
        tell({"stage": "failed", "parity": parity})
        raise ParityFailed(
            f"The export of {request.source} is not what base + adapter gives; nothing was exported.",
            problems=tuple(Problem("parity_failed", PARITY, text) for text in parity["problems"]),
        )
    return parity


def canonical_copy(source: Path, base: BaseModel, out: Path, *, base_is_named: bool = False) -> Path:
    """Any trainer's folder as canonical files in `out`; raises AdapterRefused with every problem.

    `base_is_named` believes the caller over the base that the folder's config claims.
    """
    inspection = inspect_folder(source)
    verdict = check(inspection, base, max_rank=MAX_RANK, base_is_served=base_is_named)
    return canonicalise(source, inspection, verdict, out, serving_dtype="float32").folder


def main(spec_path: str) -> int:
    """The child process: JSON lines on stdout, the last of them `result` or `error`; 0, or 3 with an error.

    It ends with its process group when stdin closes (the parent died) and cleans up on SIGTERM (cancel).
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    spec = json.loads(Path(spec_path).read_text())
    os.nice(spec.pop("nice", 0))
    end_with_stdin()
    voice = Voice()
    threading.Thread(target=voice.stay_heard, daemon=True).start()
    try:
        result = export(request_from_spec(spec), voice.say)
    except HotshoeError as error:
        voice.say({"stage": "error", "error": error.as_dict()})
        return 3
    voice.say({"stage": "result", "result": result.as_dict()})
    return 0


class Voice:
    """A process's words to its parent, one JSON line each on stdout."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said: Mapping[str, Any] = {"stage": "started"}

    def say(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            self._said = message
            sys.stdout.write(json.dumps(message) + "\n")
            sys.stdout.flush()

    def stay_heard(self) -> None:
        """Say the last word again now and then: a comparison layer by layer may have nothing new to say for hours."""
        for _ in range(MOST_HOURS_ALONE * 3600 // HEARD_SECONDS):
            time.sleep(HEARD_SECONDS)
            if self._said["stage"] not in ("started", "failed", "error", "result"):
                self.say(self._said)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
