"""The training bench's own arithmetic: what is measured next, and what a table says of what was."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bench.training import LOADS, LONG, REFERENCE, SHORT, Line, Load, pending, prepared, rates, reports


def measured(line: Line, tokens_a_second: float, turn: int = 0, load: Load = SHORT) -> dict[str, Any]:
    return {
        "round": turn,
        "load": load.name,
        "line": asdict(line),
        "threads": 1,
        "step_tokens": [1, 100, 300],
        "step_seconds": [50.0, 100 / tokens_a_second, 300 / tokens_a_second],
        "losses": [3.0, 2.0, 1.0],
        "row_tokens": 32.0,
        "learned_tokens": 6.0,
        "peak_bytes": 2e9,
        "validation_loss": 0.5,
    }


def keep(path: Path, found: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in found), "utf-8")
    return path


def test_lines_take_turns_and_what_is_kept_is_not_measured_again(tmp_path: Path) -> None:
    first, second = SHORT.lines[:2]
    kept = keep(tmp_path / "kept.jsonl", [measured(first, 10)])
    order = [(turn, line) for turn, _, line in pending(kept, 2, ["short"])]
    assert (0, first) not in order and order[0] == (0, second)
    assert [line for turn, line in order if turn == 1] == list(reversed(SHORT.lines))
    assert len(order) == 2 * len(SHORT.lines) - 1


def test_the_first_step_is_left_out_of_a_rate() -> None:
    assert rates([measured(REFERENCE, 40.0)]) == [pytest.approx(40.0)]


def test_a_line_is_compared_with_the_best_of_its_own_dtype_and_with_the_reference(tmp_path: Path) -> None:
    ours, grouped = Line("hotshoe", "lora", "float32"), Line("trl", "lora", "float32", groups=True)
    speeds = {ours: 200.0, REFERENCE: 80.0, grouped: 100.0}
    found = [measured(line, speed * (1 + turn), turn) for turn in range(3) for line, speed in speeds.items()]
    (report,) = reports(keep(tmp_path / "kept.jsonl", found))
    row = next(row for row in report.rows if row["trainer"] == "hotshoe")
    assert row["of TRL's best alike"] == pytest.approx(2.0) and row["of TRL float32"] == pytest.approx(2.5)
    assert row["tokens/s"] == 400 and "3 rounds" in report.title and "CPU seconds" in report.notes[0]


@pytest.mark.parametrize("load", LOADS.values(), ids=list(LOADS))
def test_a_side_is_given_as_many_rows_as_its_timed_steps_take(load: Load, tmp_path: Path) -> None:
    given = prepared(load, REFERENCE, tmp_path)
    lines = (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == load.batch * load.timed_steps and given["steps"] == load.timed_steps + 1
    words = [len(json.loads(line)["messages"][1]["content"].split()) for line in lines]
    assert (min(words) > 200) is (load is LONG)
