"""Serving many adapters, beside peers in the same run: `python -m bench many`.

Sides are started once, and asked in turn: in each round every load goes to one side after the other, in an order that
turns with the round, so that the machine's moods fall on all of them. What was measured is kept, one JSON line a
measurement, and a run that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from adapters.bases import load_base
from adapters.embedded import default_base
from adapters.llamacpp import missing
from bench.many import cases as plans
from bench.many import stalls
from bench.many.cases import SLO, STALL_EVENTS, TABLES, Case, expected_seconds
from bench.many.kept import SEED, Kept, head, line_of
from bench.many.pictures import pictures
from bench.many.sides import SIDES, HttpSide, Setup, Side, started, write_files
from bench.many.tables import reports
from bench.report import Report, commit, machine, write

PRESETS = {"short": plans.short, "full": plans.full, "trial": plans.trial}
DOCS = Path("docs/benchmarks.md")
PICTURES = Path("docs/bench")


def main(arguments: Sequence[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the sides are ended
    every = PRESETS[given.preset]()
    wanted = chosen(every, split(given.only), split(given.sides))
    folder: Path = given.out or Path("build/bench") / given.preset
    kept = Kept.open(folder / "kept.jsonl", every)
    todo = list(kept.pending(wanted, given.rounds))
    print(f"{len(todo)} measurements, {said(expected_seconds(todo))}; kept in {kept.path}", flush=True)
    for setup in dict.fromkeys(case.setup for case in wanted):
        measure(kept, setup, [case for case in wanted if case.setup == setup], given.rounds)
    found = list(reports(kept, every))
    print(json.dumps(machine(), indent=2))
    for _, report in found:
        report.print()
    drawn = {name: text for table, report in found for name, text in pictures(table, report)}
    put(folder, found, drawn, every)
    if given.docs:
        into_docs(found, drawn, f"`{machine()['command']}`, {kept.taken()}.")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench many", description=__doc__)
    made.add_argument(
        "--preset",
        choices=PRESETS,
        default="short",
        help="short: ten minutes; full: about an hour and a half; trial: does it all run?",
    )
    made.add_argument("--only", default="", help=f"tables, with commas between them: {', '.join(TABLES)}")
    made.add_argument("--sides", default="", help=f"as many of {', '.join(SIDES)}; default those of each load")
    made.add_argument("--rounds", type=int, default=5, help="of every load on every side (default 5)")
    made.add_argument("--out", type=Path, help="goes on from what it has; default build/bench/PRESET")
    made.add_argument("--docs", action="store_true", help="put the tables and pictures into docs/ as well")
    return made


def split(words: str) -> list[str]:
    return [word.strip() for word in words.split(",") if word.strip()]


def chosen(every: Sequence[Case], only: Sequence[str], sides: Sequence[str]) -> list[Case]:
    """The cases of these tables on these sides; empty means all. Raises SystemExit for a name that there is not."""
    unknown = [*(set(only) - set(TABLES)), *(set(sides) - set(SIDES))]
    if unknown:
        raise SystemExit(
            f"There is no {', '.join(sorted(unknown))}: tables are {', '.join(TABLES)}; sides {', '.join(SIDES)}."
        )
    absent = {"llama.cpp"} if (reason := missing()) else set()
    if reason:
        print(f"llama.cpp is left out: {reason}", flush=True)
    found = []
    for case in every:
        left = tuple(side for side in case.sides if (not sides or side in sides) and side not in absent)
        if left and (not only or case.table in only):
            found.append(replace(case, sides=left))
    return found


def said(seconds: float) -> str:
    until = time.strftime("%H:%M", time.localtime(time.time() + seconds))
    return f"about {seconds / 60:.0f} minutes, until {until}"


def measure(kept: Kept, setup: Setup, cases: Sequence[Case], rounds: int) -> None:
    """All that is still to be measured with one setup; its sides are started once, those that have something to do."""
    todo = list(kept.pending(cases, rounds))
    if not todo:
        return
    names = [name for name in SIDES if any(side == name for _, _, side in todo)]
    with tempfile.TemporaryDirectory(prefix="bench-many-") as folder, contextlib.ExitStack() as stack:
        files = write_files(load_base(default_base()), setup, Path(folder))
        sides: dict[str, Side] = {}
        for name in names:  # one after the other, so that a start is not another's
            sides[name] = stack.enter_context(started(name, setup, files))
            on = {"commit": commit(), "date": time.strftime("%Y-%m-%d")}
            kept.add({"start": name, "setup": setup.name, "seconds": sides[name].start_seconds, **on})
            print(f"{name} is ready: {sides[name].start_seconds:.1f} s", file=sys.stderr, flush=True)
        for turn, case, name in todo:
            line = one(sides[name], case, turn)
            kept.add(line)
            print(f"round {turn + 1}, {case.table}: {case.name}, {name}", file=sys.stderr, flush=True)


def one(side: Side, case: Case, turn: int) -> dict[str, Any]:
    """One measurement as a line to keep."""
    if case.load is not None:
        return line_of(turn, case, side.name, side.measure(case.load, SEED + turn, case.window))
    if not isinstance(side, HttpSide):
        raise ValueError(f"{side.name} has no streams over HTTP.")
    found = asyncio.run(stalls.measure(side.asker, case.setup.adapters, turn, STALL_EVENTS))
    if found.problems:
        raise RuntimeError(f"{side.name} refused {len(found.problems)} requests: {found.problems[0]}")
    return {**head(turn, case, side.name), "stalls": stalls.summary(found)}


def put(folder: Path, found: Sequence[tuple[str, Report]], drawn: Mapping[str, str], cases: Sequence[Case]) -> None:
    """Figures as JSON, with what they were taken on and how, and the pictures beside it."""
    path = folder / "many.json"
    how = {
        "first_seed": SEED,
        "slo": asdict(SLO),
        "loads": [asdict(case) for case in cases],
        "each": str(folder / "kept.jsonl"),
    }
    write([report for _, report in found], path, **how)
    for name, text in drawn.items():
        (folder / f"{name}.svg").write_text(text, "utf-8")
    print(f"\nwritten: {path}" + "".join(f", {name}.svg" for name in drawn))


def into_docs(found: Sequence[tuple[str, Report]], drawn: Mapping[str, str], taken: str) -> None:
    """Replace what stands between the marks of each table in docs/benchmarks.md; pictures go to docs/bench/."""
    text = DOCS.read_text("utf-8")
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, report in found:
        begin, end = (f"<!-- bench many: {name} {edge} -->" for edge in ("begins", "ends"))
        if begin not in text or end not in text:
            raise SystemExit(f"{DOCS} has no place for the table {name}: it needs the lines {begin} and {end}.")
        shown = [f"![{report.title}](bench/{picture}.svg)" for picture, _ in pictures(name, report)]
        body = "\n\n".join([report.markdown().strip(), *shown, taken])
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n{body}\n{end}{rest.partition(end)[2]}"
    for picture, svg in drawn.items():
        (PICTURES / f"{picture}.svg").write_text(svg, "utf-8")
    DOCS.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
