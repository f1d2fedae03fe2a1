"""The simulator beside a run: the costs that a run was made with are found in it, and it is then predicted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.many import cases as plans
from bench.many.cases import Case
from bench.many.kept import SEED, Kept, line_of
from bench.many.plan import BASE
from bench.simulated import SIDE, calibrated, compare, replay
from bench.simulator import Costs

MADE_WITH = Costs(step=0.03, row=0.002, adapter=0.0015, prompt=0.0025, switch=0.0, load=0.0)
CASES = plans.full()
PLACES = 64  # more than there are clients


def run_of(costs: Costs, tmp_path: Path, *tables: str) -> Kept:
    """A run on an engine that takes exactly these costs."""
    kept = Kept(tmp_path / "kept.jsonl")
    for case in (one for one in CASES if one.table in tables and SIDE in one.sides and one.load):
        for turn in range(2):
            kept.add(line_of(turn, case, SIDE, replay(case, SEED + turn, costs, PLACES)))
    return kept


def named(table: str, name: str) -> Case:
    return next(case for case in CASES if (case.table, case.name) == (table, name))


def test_costs_are_found_again_and_the_loads_that_they_make_are_predicted(tmp_path: Path) -> None:
    kept = run_of(MADE_WITH, tmp_path, "closed", "first", "mix", "open")
    found = calibrated(kept, CASES)
    assert found.prompt == pytest.approx(MADE_WITH.prompt, rel=0.1)
    for rows, adapters in ((1, 0), (16, 1), (32, 4)):
        wanted = MADE_WITH.step + rows * MADE_WITH.row + adapters * MADE_WITH.adapter
        assert found.step + rows * found.row + adapters * found.adapter == pytest.approx(wanted, rel=0.1)
    report = compare(kept, CASES, PLACES)
    assert len(report.rows) == 6 + 4
    for row in report.rows:
        assert abs(int(row["tokens/s, error"].rstrip("%"))) <= 10, row
        assert abs(int(row["TTFT p50, s, error"].rstrip("%"))) <= 15, row


def test_a_slower_machine_shows_as_an_error(tmp_path: Path) -> None:
    kept = run_of(MADE_WITH, tmp_path, "closed", "first")
    slow = replace(MADE_WITH, step=2 * MADE_WITH.step, row=2 * MADE_WITH.row, prompt=2 * MADE_WITH.prompt)
    case = named("mix", "base")
    kept.add(line_of(0, case, SIDE, replay(case, SEED, slow, PLACES)))
    (row,) = compare(kept, CASES, PLACES).rows
    assert int(row["tokens/s, error"].rstrip("%")) > 40


def test_without_the_small_loads_there_are_no_costs(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="taken from the tables closed and first"):
        compare(run_of(MADE_WITH, tmp_path, "mix"), CASES, PLACES)


def test_a_replay_asks_what_the_plan_says_and_cuts_off_at_the_windows_end() -> None:
    case = named("open", "alpha 1, 2/s")
    assert case.load is not None
    seen = replay(case, SEED, MADE_WITH, PLACES)
    planned = case.load.arrivals(SEED, case.window.warm_seconds + case.window.seconds)
    assert [one.model for one in seen] == [
        shot.model for shot in planned if shot.at_seconds >= case.window.warm_seconds
    ]
    assert all(0 <= one.intended < case.window.seconds for one in seen) and any(one.model == BASE for one in seen)
    closed = replay(named("mix", "64 round-robin"), SEED, MADE_WITH, PLACES)
    assert sum(not one.is_whole for one in closed) <= 32, "those that ran when it ended"
    assert all(one.last is None or one.last <= 16.0 for one in closed)
