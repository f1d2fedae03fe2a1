"""The real runs that the planner's memory is measured against: each `hotshoe train` in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.training import ROOMS

TIMEOUT_SECONDS = 1200
SMALL: dict[str, Any] = {  # a random base between the tests' tiny ones and the embedded one, with a tokenizer of bytes
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


@dataclass(frozen=True)
class RealRun:
    """One run: which base, how it is trained, how many rows a step, and how often a row repeats its request."""

    name: str
    base: str  # embedded, or the family of a random base
    method: str
    repeats: int
    batch_size: int
    flags: tuple[str, ...] = ()


RUNS = (
    RealRun("embedded, lora", "embedded", "lora", 1, 8),
    RealRun("embedded, lora, longer rows", "embedded", "lora", 6, 4),
    RealRun("embedded, lora, checkpointing", "embedded", "lora", 6, 4, ("--gradient-checkpointing",)),
    RealRun("embedded, qlora", "embedded", "qlora", 1, 8),
    RealRun("embedded, full", "embedded", "full", 1, 4),
    RealRun("qwen2, lora", "qwen2", "lora", 2, 8),
    RealRun("qwen2, full", "qwen2", "full", 1, 8),
    RealRun("qwen3, lora", "qwen3", "lora", 2, 8),
    RealRun("qwen3, qlora", "qwen3", "qlora", 2, 8),
    RealRun("qwen3, full, accumulated", "qwen3", "full", 2, 8, ("--tokens-per-pass", "900")),
)


def data_of(run: RealRun, folder: Path) -> Path:
    """Two steps' rows, whose requests say themselves several times."""
    rows = []
    for index in range(2 * run.batch_size):
        room = ROOMS[index % len(ROOMS)]
        said = " ".join([f"turn the {room} lights to {10 + index}%"] * run.repeats)
        answer = json.dumps({"intent": "Set", "area": room, "value": 10 + index})
        rows.append({"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def base_of(run: RealRun, folder: Path) -> str:
    """The folder of the run's base; a random one is made there."""
    if run.base == "embedded":
        return run.base
    from tests.fixtures.bases import tiny_qwen2, tiny_qwen3

    if run.base == "qwen2":
        return str(tiny_qwen2(folder / "base", **SMALL))
    return str(tiny_qwen3(folder / "base", tokenizer="bytes", **SMALL))


def config_of(run: RealRun, data: Path, base: str) -> Any:
    """The same run as a config, to predict it from."""
    from training.config import TrainingConfig

    tokens = int(run.flags[run.flags.index("--tokens-per-pass") + 1]) if "--tokens-per-pass" in run.flags else 8192
    return TrainingConfig(
        data=data,
        name="bench",
        base=base,
        method=run.method,  # type: ignore[arg-type]
        dtype="float32",
        epochs=1.0,
        batch_size=run.batch_size,
        tokens_per_pass=tokens,
        gradient_checkpointing="--gradient-checkpointing" in run.flags,
        validation_share=0.0,
        compare=False,
        data_check=False,
    )


def flags_of(run: RealRun) -> list[str]:
    """The settings as flags: two steps in float32, with nothing but the training."""
    fixed = ["--method", run.method, "--dtype", "float32", "--epochs", "1", "--batch-size", str(run.batch_size)]
    return [*fixed, "--no-compare", "--no-data-check", "--validation-share", "0", *run.flags]


def measured(run: RealRun, data: Path, base: str, out: Path) -> dict[str, Any]:
    """The card's cost of the run: its peak resident set and its seconds."""
    command = [sys.executable, "-c", "from server.cli.main import run; run()", "train", str(data)]
    command += ["--name", "bench", "--out", str(out), "--base", base, *flags_of(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"{run.name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads((out / "card.json").read_text("utf-8"))["cost"]
    return found
