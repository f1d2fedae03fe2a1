"""The bench of loads: its arithmetic by hand, and the target that it is for, on the real engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from adapters.bases import BaseModel
from bench.load_stall import BASE, FIRST, LIVE, LOAD, NOTHING, RANK, Recorder, one_form, percentile, rows_of
from tests.fixtures.adapters import write_adapter


def test_a_stall_is_the_longest_gap_that_touches_an_event_less_the_quiet_median() -> None:
    seen = Recorder(gaps=[(begin / 10, begin / 10 + 0.1) for begin in range(100)])
    seen.gaps += [(20.0, 20.1), (20.1, 20.5), (30.0, 30.1), (30.05, 30.25), (40.0, 40.1)]
    seen.windows = {
        NOTHING: [(1.0, 2.0)],
        BASE: [(40.05, 40.06)],
        LOAD: [(20.3, 20.4), (20.05, 20.15)],
        FIRST: [(30, 31)],
    }
    seen.quiet = {NOTHING: [(0.5, 1.0)], BASE: [(5.0, 6.0)], LOAD: [(3.0, 4.0), (3.0, 4.0)], FIRST: [(30.0, 30.04)]}
    seen.gaps += [(3.31, 3.61)] * 21  # a slow time before the loads: what is as long as then is no stall
    seen.seconds = {kind: [0.5] for kind in seen.windows}
    rows = {str(row["while there is"]): row for row in rows_of("ours", seen)}
    assert rows[NOTHING]["stall p99 ms"] == pytest.approx(0.0, abs=1e-6)
    assert rows[LOAD]["events"] == 2
    assert rows[LOAD]["stall p50 ms"] == pytest.approx(100.0), "one gap touches both windows"
    assert rows[LOAD]["gap p50 ms"] == pytest.approx(400.0)
    assert rows[FIRST]["gap max ms"] == pytest.approx(200.0)
    assert rows[BASE]["event p50 ms"] == pytest.approx(500.0)


def test_percentiles_are_values_that_were_seen() -> None:
    assert [percentile([3.0, 1.0, 2.0], share) for share in (0.0, 0.5, 0.99)] == [1.0, 2.0, 3.0]


@pytest.mark.long
@pytest.mark.model
def test_streams_wait_for_a_load_at_most_ten_milliseconds_more_than_without(
    embedded_base: BaseModel, tmp_path: Path
) -> None:
    """By the median of twelve loads, beside twelve quiet windows of the same run: of a shared machine's noise, which
    both have, twelve give no honest 99th percentile. The bench prints that."""
    names = (LIVE, *(f"loaded-{number}" for number in range(12)))
    folders = [
        write_adapter(tmp_path / name, embedded_base, rank=RANK, alpha=2 * RANK, seed=seed, dtype="BF16", scale=0.02)
        for seed, name in enumerate(names)
    ]
    seen = asyncio.run(one_form("ours", embedded_base.folder, folders, tmp_path / "run"))
    stalls = {str(row["while there is"]): float(str(row["stall p50 ms"])) for row in rows_of("ours", seen)}
    assert stalls[LOAD] <= stalls[NOTHING] + 10.0
    assert stalls[FIRST] <= stalls[BASE] + 10.0
