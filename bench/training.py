"""Training tokens/s and peak memory against TRL's SFTTrainer, which does the same work in turn.

Both train the same adapter from the same first weights on the same token ids, with labels on the answers only, with the
same optimizer, dtype and batch. A batch is all the rows, so the loss of a step depends on no order and shows that the
work is the same. Each measurement is a process of its own: its peak memory is its own, and the sides alternate.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.report import Report

SIDES = ("hotshoe", "trl")
METHODS = ("lora", "qlora")
ROOMS = ("kitchen", "garage", "attic", "hallway", "guest bedroom", "office", "cellar", "conservatory")
TIMED_STEPS = 3  # after one that warms up
TIMEOUT_SECONDS = 600


def rows() -> list[dict[str, Any]]:
    """Eight requests of a voice assistant with the call that answers each, of different lengths."""
    said = ("turn the {} lights to {}%", "could you please set the heating in the {} to {} degrees for tonight")
    return [
        {
            "messages": [
                {"role": "user", "content": said[index % 2].format(room, 10 + index)},
                {"role": "assistant", "content": f'{{"intent": "Set", "area": "{room}", "value": {10 + index}}}'},
            ]
        }
        for index, room in enumerate(ROOMS)
    ]


def run(rounds: int) -> list[Report]:
    """Alternate the sides `rounds` times for each method; medians over the rounds."""
    report = Report(f"Training against TRL {version('trl')}, embedded base, rank 16, float32 ({rounds} rounds)")
    with tempfile.TemporaryDirectory(prefix="bench-training-") as scratch:
        data = Path(scratch) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
        for method in METHODS:
            seen: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
            for turn in range(rounds):
                for side in SIDES if turn % 2 == 0 else reversed(SIDES):
                    seen[side].append(measure(side, method, data))
            report.rows += table(method, seen)
    report.notes.append(
        f"{len(ROOMS)} rows a step, {TIMED_STEPS} timed steps a measurement after one that warms up. tokens/s counts "
        "the rows' tokens, without padding, for both. Peak memory is the process's, from its start."
    )
    return [report]


def measure(side: str, method: str, data: Path) -> dict[str, Any]:
    """One process of one side: its seconds a step, losses and peak memory."""
    with tempfile.TemporaryDirectory(prefix="bench-training-") as folder:
        command = [sys.executable, "-m", "bench.training_side", side, method, str(data), folder, str(TIMED_STEPS + 1)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} {method} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(method: str, seen: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row for each side; the ratio is the median of the rounds' own ratios."""
    rates = {
        side: [one["tokens"] / statistics.median(one["step_seconds"]) for one in found] for side, found in seen.items()
    }
    return [
        {
            "method": method,
            "trainer": side,
            "tokens/s": round(statistics.median(rates[side])),
            "of TRL's": ratio(rates[side], rates["trl"]),
            "min..max of tokens/s": f"{min(rates[side]):.0f}..{max(rates[side]):.0f}",
            "seconds a step": statistics.median(statistics.median(one["step_seconds"]) for one in found),
            "peak memory, GB": statistics.median(one["peak_bytes"] for one in found) / 1e9,
            "loss, first step": f"{found[0]['losses'][0]:.4f}",
            "loss, last step": f"{found[0]['losses'][-1]:.4f}",
        }
        for side, found in seen.items()
    ]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
