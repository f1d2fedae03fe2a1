"""One side of the export bench, a process of its own: `python -m bench.exports_side SIDE SPEC.json`, JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.durable import sync

COPY, MERGE, EXPORT, PEFT = "cp -r", "the merge alone", "export with read-back and digests", "peft"
SIDES = (COPY, MERGE, EXPORT, PEFT)


def main() -> None:
    side, spec = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    run = {COPY: _copy, MERGE: _merge, EXPORT: _export, PEFT: _by_peft}[side]
    import torch  # noqa: F401 - what the peak is counted above

    before, started = resident_bytes("VmRSS"), time.perf_counter()
    run(spec)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_bytes": resident_bytes("VmHWM") - before}))


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the most there was) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _copy(spec: Mapping[str, Any]) -> None:
    subprocess.run(["cp", "-r", spec["base"], spec["out"]], check=True)
    _sync_all(Path(spec["out"]))


def _merge(spec: Mapping[str, Any]) -> None:
    from adapters.bases import load_base
    from adapters.merge import merge, plan_merge

    out = Path(spec["out"])
    out.mkdir()
    merge(plan_merge(Path(spec["adapter"]), load_base(spec["base"])), out)
    sync(out)


def _export(spec: Mapping[str, Any]) -> None:
    from adapters.bases import load_base
    from adapters.export import ExportRequest, export

    base = load_base(spec["base"])
    export(ExportRequest(Path(spec["adapter"]), base, Path(spec["out"]), source="bench", with_logits=False))


def _by_peft(spec: Mapping[str, Any]) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(spec["base"], dtype=getattr(torch, spec["dtype"]))
    PeftModel.from_pretrained(model, spec["adapter"]).merge_and_unload().save_pretrained(spec["out"])
    _sync_all(Path(spec["out"]))


def _sync_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)


if __name__ == "__main__":
    main()
