"""Training tokens/s, peak memory and validation loss against TRL's SFTTrainer, which does the same work in turn.

Both train the same adapter from the same first weights on the same token ids, with labels on the answers only, with the
same optimizer and batch; a line is one trainer with one set of TRL's own switches. Each measurement is a process of its
own: its peak memory is its own, and the lines take turns. On a shared machine the bench runs in pieces:
`python -m bench.training --kept FILE --seconds 200` goes on where the last piece ended and prints what is whole; with
`--threads 1` it counts CPU seconds, to which other work adds nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.report import Report

ROOMS = ("kitchen", "garage", "attic", "hallway", "guest bedroom", "office", "cellar", "conservatory")
ASKED = (
    ("turn the {room} lights to {n}%", "lights on"),
    ("{room} off", "lights off"),
    ("could you please set the heating in the {room} to {n} degrees for tonight", "heat"),
    ("is the {room} window still open, and for how many minutes has it been", "window"),
)
VALIDATION_ROWS = 32
TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Line:
    """One trainer as it is set. Ours has no use for `groups`: its batches have no padding."""

    trainer: str  # hotshoe or trl
    method: str  # lora or qlora
    dtype: str
    checkpoints: bool = False  # gradient checkpointing
    groups: bool = False  # rows of like length in a batch

    @property
    def name(self) -> str:
        switches = ["gradient checkpointing" if self.checkpoints else "", "grouped by length" if self.groups else ""]
        return ", ".join([self.trainer, *filter(None, switches)])


@dataclass(frozen=True)
class Load:
    """What the lines are measured on: rows, how many of them a step, and how many steps after the one that warms up."""

    name: str
    batch: int
    timed_steps: int
    lines: tuple[Line, ...]


AS_IT_COMES = Line("trl", "lora", "bfloat16", checkpoints=True)
REFERENCE = Line("trl", "lora", "float32")
SHORT = Load(
    "short",
    16,
    2,
    (
        Line("hotshoe", "lora", "float32"),
        REFERENCE,
        Line("trl", "lora", "float32", groups=True),
        Line("hotshoe", "lora", "bfloat16"),
        Line("trl", "lora", "bfloat16", groups=True),
        Line("hotshoe", "qlora", "bfloat16"),
        AS_IT_COMES,
        Line("trl", "lora", "bfloat16"),
        Line("hotshoe", "qlora", "float32"),
        Line("trl", "qlora", "float32", groups=True),
        Line("trl", "qlora", "bfloat16", groups=True),
    ),
)
LONG = Load(
    "long",
    2,
    1,
    (
        Line("hotshoe", "lora", "float32"),
        REFERENCE,
        Line("hotshoe", "lora", "bfloat16"),
        Line("trl", "lora", "bfloat16"),
    ),
)
LOADS = {load.name: load for load in (SHORT, LONG)}


def rows(load: Load, count: int, seed: int) -> list[dict[str, Any]]:
    """Requests of a voice assistant, each answered by a few words; long ones have notes before and a long answer."""
    drawn = random.Random(seed)
    made = []
    for index in range(count):
        asked, answer = ASKED[index % len(ASKED)]
        room, number = drawn.choice(ROOMS), drawn.randrange(10, 60)
        question, said = asked.format(room=room, n=number), f"{answer} in the {room}"
        if load.name == "long":
            notes = " ".join(f"{drawn.choice(ROOMS)} {drawn.randrange(100)}." for _ in range(drawn.randrange(90, 160)))
            question, said = f"{notes} {question}", " ".join([said, *(drawn.choice(ROOMS) for _ in range(170))])
        turns = (("system", "Route."), ("user", question), ("assistant", said))
        made.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return made


def run(rounds: int) -> list[Report]:
    """Alternate the lines `rounds` times on each load; medians over the rounds."""
    with tempfile.TemporaryDirectory(prefix="bench-training-") as folder:
        kept = Path(folder) / "kept.jsonl"
        go_on(kept, rounds, float("inf"), list(LOADS))
        return reports(kept)


def go_on(kept: Path, rounds: int, seconds: float, loads: Sequence[str], threads: int = 0) -> None:
    """Measure what `kept` does not have yet, a line each, until all is there or the seconds are over."""
    end = time.monotonic() + seconds
    for turn, load, line in pending(kept, rounds, loads):
        if time.monotonic() >= end:
            return
        found = measure(load, line, threads)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"round": turn, "load": load.name, "line": asdict(line), **found}) + "\n")


def pending(kept: Path, rounds: int, loads: Sequence[str]) -> Iterator[tuple[int, Load, Line]]:
    """Every measurement that is still to be made; the order of the lines turns with each round."""
    done = {(one["round"], one["load"], Line(**one["line"])) for one in read(kept)}
    for turn in range(rounds):
        for load in (LOADS[name] for name in loads):
            for line in load.lines if turn % 2 == 0 else reversed(load.lines):
                if (turn, load.name, line) not in done:
                    yield turn, load, line


def read(kept: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in kept.read_text("utf-8").splitlines()] if kept.exists() else []


def measure(load: Load, line: Line, threads: int = 0) -> dict[str, Any]:
    """One process of one line: its tokens and seconds of each step, losses, validation loss and peak memory."""
    with tempfile.TemporaryDirectory(prefix="bench-training-") as folder:
        given = prepared(load, line, Path(folder), threads)
        command = [sys.executable, "-m", "bench.training_side", json.dumps(given)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"{line.name} {line.method} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def prepared(load: Load, line: Line, folder: Path, threads: int = 0) -> dict[str, Any]:
    """What `bench.training_side` is given, with the rows written to the folder; an epoch is the timed steps."""
    for name, of, count, seed in (
        ("rows", load, load.batch * load.timed_steps, 1),
        ("held", SHORT, VALIDATION_ROWS, 2),
    ):
        made = rows(of, count, seed)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    more = {"folder": str(folder), "batch": load.batch, "steps": load.timed_steps + 1, "threads": threads}
    return {**asdict(line), **more}


def reports(kept: Path) -> list[Report]:
    """A table for each load that has been measured."""
    made = []
    for load in LOADS.values():
        seen: dict[Line, list[dict[str, Any]]] = {}
        for one in read(kept):
            if one["load"] == load.name:
                seen.setdefault(Line(**one["line"]), []).append(one)
        if seen:
            made.append(report(load, seen))
    return made


def report(load: Load, seen: Mapping[Line, list[dict[str, Any]]]) -> Report:
    """One row a line; a ratio is the median of the rounds' own ratios."""
    rounds = min(map(len, seen.values()))
    made = Report(f"Training against TRL {version('trl')}, embedded base, rank 16, {load.name} rows ({rounds} rounds)")
    for line, found in seen.items():
        own = rates(found)
        others = [other for other in seen if other.trainer == "trl" and other.dtype == line.dtype]
        alike = [other for other in others if other.method == line.method]
        best = max(alike, key=lambda other: statistics.median(rates(seen[other])), default=None)
        made.rows.append(
            {
                "method": line.method,
                "dtype": line.dtype,
                "trainer": line.name,
                "tokens/s": round(statistics.median(own)),
                "of TRL's best alike": ratio(own, rates(seen[best])) if best else "",
                "of TRL float32": ratio(own, rates(seen[REFERENCE])) if REFERENCE in seen else "",
                "min..max": f"{min(own):.0f}..{max(own):.0f}",
                "peak memory, GB": statistics.median(one["peak_bytes"] for one in found) / 1e9,
                "validation loss": f"{statistics.median(one['validation_loss'] for one in found):.4f}",
                "loss, last step": f"{found[0]['losses'][-1]:.4f}",
            }
        )
    one = next(iter(seen.values()))[0]
    made.notes.append(
        f"{load.batch} rows a step, {load.timed_steps} timed steps a measurement after one that warms up; "
        f"{one['row_tokens']:.0f} tokens a row, {one['learned_tokens']:.0f} of them learned. tokens/s counts the rows' "
        "tokens, without padding, for both. Peak memory is the process's, from its start."
        + (" One thread; seconds are CPU seconds, to which other work adds nothing." if one["threads"] == 1 else "")
    )
    return made


def rates(found: Sequence[Mapping[str, Any]]) -> list[float]:
    """Tokens a second of each measurement, its first step left out."""
    return [sum(one["step_tokens"][1:]) / sum(one["step_seconds"][1:]) for one in found]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.add_argument("--kept", type=Path, required=True, help="JSON lines of what was measured; goes on from it")
    parser.add_argument("--seconds", type=float, default=200, help="begin no measurement after so long (default 200)")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each measurement (default 5)")
    parser.add_argument("--threads", type=int, default=0, help="1: one core, timed by CPU seconds (default all cores)")
    parser.add_argument("--load", choices=LOADS, action="append", help="which rows; default all")
    given = parser.parse_args()
    go_on(given.kept, given.rounds, given.seconds, given.load or list(LOADS), given.threads)
    for made in reports(given.kept):
        made.print()


if __name__ == "__main__":
    main()
