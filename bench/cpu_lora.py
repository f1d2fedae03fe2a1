"""LoRA on a CPU: each form of the update, stock vLLM's own, and a vLLM without LoRA, in turn on the same base.

    python -m bench.cpu_lora [--only c,bare] [--loads decode:4,first:128] [--rounds 5] [--clock wall|cpu] [--out FILE]

Every form is a process of its own with vLLM's engine in it; all are started first and then asked in turn, so that the
machine's moods fall on all of them. Decode: so many requests that are past their prompt, tokens in a second.
First token: one request, until its first token is there. A ratio is taken within one round, and its median reported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.embedded import open_base
from bench.report import Report, machine, write

OURS = {"VLLM_PLUGINS": "hotshoe_cpu_lora"}
FORMS: dict[str, dict[str, str]] = {
    "torch": {**OURS, "HOTSHOE_LORA_KERNEL": "torch"},
    "c": {**OURS, "HOTSHOE_LORA_KERNEL": "c"},
    "c+compile": {**OURS, "HOTSHOE_LORA_KERNEL": "c", "HOTSHOE_LORA_COMPILE": "1"},
    "stock": {"VLLM_PLUGINS": ""},
    "bare": {"VLLM_PLUGINS": ""},  # without LoRA, compiled
}
CONCURRENCY, PROMPT_TOKENS = (1, 4, 16), (128, 512, 1400)


@dataclass(frozen=True)
class Load:
    """One measurement: `adapters` of 0 is the base, 1 one adapter for every request, 4 one after the other."""

    kind: str  # "decode" or "first"
    size: int  # concurrency, or tokens of the prompt
    adapters: int
    dtype: str = "F32"  # of the adapters' files

    @property
    def name(self) -> str:
        who = ("base", "one adapter")[self.adapters] if self.adapters < 2 else f"{self.adapters} adapters"
        what = f"decode, {self.size} at once" if self.kind == "decode" else f"first token, {self.size} of prompt"
        return f"{what}, {who}{' of 16 bits' if self.adapters and self.dtype != 'F32' else ''}"


def loads(wanted: Sequence[str] = ()) -> list[Load]:
    """All, or those whose `kind:size` is among `wanted`."""
    decode = [Load("decode", size, count) for size in CONCURRENCY for count in (0, 1, 4) if count <= size]
    short = [Load("decode", size, count, "BF16") for size in CONCURRENCY for count in (1, 4) if count <= size]
    every = decode + short + [Load("first", size, count) for size in PROMPT_TOKENS for count in (0, 1)]
    return [load for load in every if not wanted or f"{load.kind}:{load.size}" in wanted]


class Side:
    """The process of one form."""

    def __init__(self, form: str, folder: Path, cores: str, extra: Mapping[str, Any]) -> None:
        environment = {**os.environ, **FORMS[form], "OMP_NUM_THREADS": str(len(cores.split(",")))}
        fixed = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        self.form = form
        self._process = subprocess.Popen(
            ["taskset", "-c", cores, sys.executable, "-m", "bench.cpu_lora_side"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, **fixed, "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        )
        self._ask({"lora": form != "bare", "folder": str(folder), "base": str(open_base().folder), **extra})

    def measure(self, load: Load) -> float | None:
        """Tokens in a second, or seconds; None for what this form cannot do."""
        if self.form == "bare" and load.adapters:
            return None
        value: float = self._ask(vars(load))["value"]
        return value

    def ready(self) -> dict[str, Any]:
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return {} if "folder" in message else self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"the process of {self.form} ended with {self._process.wait()}")


def run(
    rounds: int, only: Sequence[str] = tuple(FORMS), wanted: Sequence[str] = (), cores: str = "0", **extra: Any
) -> Iterator[Report]:
    """`only` names the forms, `wanted` the loads; a ratio to a form that is not among them is left out."""
    with tempfile.TemporaryDirectory() as folder:
        sides, starts = [], {}
        for form in only:  # one after the other, so that a start is not another's
            side = Side(form, Path(folder), cores, extra)
            starts[form] = side.ready()["start_seconds"]
            sides.append(side)
        try:
            yield from _tables(sides, loads(wanted), rounds, starts)
        finally:
            for side in sides:
                side.close()


def _tables(
    sides: Sequence[Side], wanted: Sequence[Load], rounds: int, starts: Mapping[str, float]
) -> Iterator[Report]:
    seen: dict[tuple[str, Load], list[float]] = {}
    for turn in range(rounds + 1):  # the first is for warming up
        for load in wanted:
            for side in sides if turn % 2 else reversed(sides):
                value = side.measure(load)
                if value is not None and turn:
                    seen.setdefault((side.form, load), []).append(value)
        print(f"round {turn} of {rounds}", file=sys.stderr, flush=True)
    forms = [side.form for side in sides]
    figures = Report("LoRA on a CPU: tokens/s, and milliseconds to the first token (medians)")
    ratios = Report(
        "LoRA on a CPU: speed of the same engine's base, and of a vLLM without LoRA (medians of the rounds)"
    )
    for load in wanted:
        values = {form: seen.get((form, load)) for form in forms}
        scale = 1.0 if load.kind == "decode" else 1e3
        figures.rows.append(
            {"": load.name, **{form: statistics.median(got) * scale if got else "-" for form, got in values.items()}}
        )
        plain = Load(load.kind, load.size, 0)
        row: dict[str, Any] = {"": load.name}
        for form in (one for one in forms if one != "bare"):
            row[f"{form} / its base"] = speed(values[form], seen.get((form, plain)), load) if load.adapters else "-"
            if "bare" in forms:
                row[f"{form} / bare"] = speed(values[form], seen.get(("bare", plain)), load)
        ratios.rows.append(row)
    figures.notes.append(
        "Start to ready, seconds: " + ", ".join(f"{form} {value:.1f}" for form, value in starts.items())
    )
    ratios.notes.append("A first token's ratio is its time over the other's: more is slower. Decode: less is slower.")
    yield figures
    yield ratios


def speed(values: list[float] | None, others: list[float] | None, load: Load) -> Any:
    if not values or not others:
        return "-"
    return statistics.median(value / other for value, other in zip(values, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_lora", description=__doc__)
    parser.add_argument("--only", default=",".join(FORMS), help="forms, with commas between them")
    parser.add_argument("--loads", default="", help="decode:1,4,16 and first:128,512,1400, each as KIND:SIZE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", default="0", help="as taskset takes them, one by one: 0 or 0,1")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a machine that others use too"
    )
    parser.add_argument("--dtype", default="float32", help="of the engine")
    parser.add_argument("--decode-steps", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("build/cpu_lora.json"))
    given = parser.parse_args()
    print(json.dumps(machine(), indent=2))
    extra = {"clock": given.clock, "dtype": given.dtype, "decode_steps": given.decode_steps}
    reports = []
    for report in run(
        given.rounds, given.only.split(","), list(filter(None, given.loads.split(","))), given.cores, **extra
    ):
        report.print()
        reports.append(report)
    write(reports, given.out)


if __name__ == "__main__":
    main()
