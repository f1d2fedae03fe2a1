"""A calibration report: what short real runs on a machine held and took, beside what was predicted.

With a report of a machine a plan for it says "calibrated" and reckons with its rates; without one "unvalidated".
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from adapters.errors import ConfigInvalid
from training.config import TrainingConfig
from training.machine import has_bfloat16, own_device
from training.planner.dry_run import measured

KIND, FORMAT = "hotshoe-calibration", 1
ROWS, SAYINGS = 64, (2, 6)
LEAST_SPREAD = 1.2
NEEDED = ("machine", "date", "flops", "spread", "peak_ratios", "runs")


def calibrate(say: Callable[[str], None] = lambda line: None, base: str | None = None) -> dict[str, Any]:
    """Measure this machine with three steps of each way to train a base, the embedded one by default."""
    runs = []
    with tempfile.TemporaryDirectory(prefix="hotshoe-calibrate-") as folder:
        for name, config in _runs(Path(folder), base):
            say(f"measuring {name}")
            runs.append({"name": name, **_judged(measured(config))})
    return report_of(runs)


def report_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The report that these runs make."""
    from importlib.metadata import version

    flops = {
        str(size): median(run["flops"] for run in runs if run["itemsize"] == size)
        for size in sorted({run["itemsize"] for run in runs})
    }
    spreads = [max(run["step_seconds"]) / min(run["step_seconds"]) for run in runs]
    spreads += [max(rate / run["flops"], run["flops"] / rate) for run in runs for rate in [flops[str(run["itemsize"])]]]
    return {
        "kind": KIND,
        "format": FORMAT,
        "machine": _machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "torch": version("torch"),
        "flops": flops,
        "spread": max(LEAST_SPREAD, *spreads),
        "peak_ratios": [run["peak_ratio"] for run in runs],
        "runs": list(runs),
    }


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write it; raises ConfigInvalid where the folder is not there or cannot be written to."""
    try:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigInvalid(f"{path} cannot be written: {error}.", param="calibrate") from error


def read_report(path: Path) -> dict[str, Any]:
    """A report that was written before; raises ConfigInvalid for anything else."""
    try:
        found: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigInvalid(f"{path} cannot be read as a calibration report: {error}.", param="calibrate") from error
    if not isinstance(found, dict) or found.get("kind") != KIND or found.get("format") != FORMAT:
        raise ConfigInvalid(
            f"{path} is no calibration report of format {FORMAT}: name a new file, and it is made.", param="calibrate"
        )
    missing = [key for key in NEEDED if key not in found]
    if missing:
        raise ConfigInvalid(f"{path} lacks {', '.join(missing)}: make it again.", param="calibrate")
    return found


def described(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    lines = [f"{report['machine']['name']}, {report['date']}"]
    for run in report["runs"]:
        lines.append(
            f"  {run['name']}: {median(run['step_seconds']):.2f} s a step, {run['flops'] / 1e9:,.0f} GFLOP/s, peak "
            f"{run['peak_bytes'] / 1e9:.2f} GB, {100 * (run['peak_ratio'] - 1):+.1f}% from the predicted"
        )
    return "\n".join(lines)


def _runs(folder: Path, base: str | None) -> Iterator[tuple[str, TrainingConfig]]:
    methods = ("lora", "qlora", "full")
    dtypes = ["float32", "bfloat16"] if has_bfloat16(own_device()) else ["float32"]
    data = _rows(folder / "rows.jsonl")
    for method in methods:
        for dtype in dtypes if method != "full" else dtypes[:1]:
            yield (
                f"{method}, {dtype}",
                TrainingConfig(
                    data=data,
                    name="calibration",
                    base=base,
                    method=method,  # type: ignore[arg-type]
                    dtype=dtype,
                    epochs=1.0,
                    batch_size=4,
                    validation_share=0.0,
                    compare=False,
                    data_check=False,
                    report_to=("none",),
                    out=folder / "out",
                ),
            )


def _rows(path: Path) -> Path:
    """Rows of two lengths."""
    rows = []
    for index in range(ROWS):
        said = " ".join([f"set the heating in room {index} to {10 + index % 15} degrees"] * SAYINGS[index % 2])
        answer = json.dumps({"intent": "Set", "room": index})
        rows.append({"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _judged(found: dict[str, Any]) -> dict[str, Any]:
    """A measured run with its rate and its peak's ratio to the predicted."""
    predicted = found.pop("predicted")
    seconds = sum(found["step_seconds"]) / len(found["step_seconds"])
    share = (sum(found["step_tokens"]) / len(found["step_tokens"])) / found["tokens_a_step"]
    return {
        **found,
        "itemsize": predicted["itemsize"],
        "flops": predicted["flops_a_step"] * share / seconds,
        "predicted_bytes": predicted["peak_bytes"],
        "peak_ratio": found["peak_bytes"] / predicted["peak_bytes"],
    }


def _machine() -> dict[str, str]:
    from training.planner.target import target_of

    target = target_of("auto")
    return {"key": target.key, "name": target.name, "memory_bytes": str(target.memory_bytes)}
