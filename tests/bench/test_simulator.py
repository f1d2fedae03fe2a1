"""The simulator of admission: its model by hand, its policies on small traces, what they do to a cold adapter."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.simulator import COSTS, LIMITS, compare, simulate, traces
from bench.simulator_policies import POLICIES, Fcfs, Ours, PassedOver
from bench.simulator_traces import Request, adversary, poisson, read_trace, write_trace
from server.admission import Limits

SMALL = Limits(slots=2, max_running=4, max_queued=10**9, patience_seconds=0.5)


def test_one_request_alone_takes_its_load_its_prompt_and_its_steps() -> None:
    found = simulate(Fcfs(LIMITS), [Request(1.0, "t", "a", 10, 5)])
    step, before = COSTS.step + COSTS.row + COSTS.adapter, COSTS.load + 10 * COSTS.prompt
    assert found.first_tokens == [pytest.approx(before + step)]
    assert found.seconds == pytest.approx(1.0 + before + 5 * step)
    assert (found.switches, found.loads, found.tokens) == (1, 1, 5)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_answers_all_requests_once(name: str) -> None:
    requests = list(poisson(300, 20, 20.0, 1.0, seed=1))
    found = simulate(POLICIES[name](SMALL), requests, SMALL)
    assert len(found.first_tokens) == len(found.waits) == 300
    assert found.tokens == sum(one.output_tokens for one in requests)
    assert min(found.waits) >= 0.0


def test_a_cold_adapter_waits_for_the_end_of_a_flood_where_it_is_passed_over_and_not_with_us() -> None:
    flood = [Request(i * 0.05, "flood", "hot", 8, 16) for i in range(1200)]
    cold = Request(5.01, "calm", "cold", 8, 16)
    requests = sorted([*flood, cold], key=lambda one: one.arrival)
    limits = Limits(slots=1, max_running=16, max_queued=10**9, patience_seconds=0.5)
    ours, passed = (simulate(make(limits), requests, limits) for make in (Ours, PassedOver))
    [mine], [theirs] = ours.by_tenant["calm"], passed.by_tenant["calm"]
    assert mine < 5.0 and theirs > 50.0
    assert ours.seconds < 1.1 * passed.seconds


def test_a_recorded_trace_is_read_as_it_was_written_and_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    requests = list(adversary(200, 10, 5.0, 2, seed=3))
    write_trace(path, requests)
    again = read_trace(path)
    assert [one.arrival for one in again] == [one.arrival for one in requests]
    assert simulate(Ours(SMALL), again, SMALL).waits == simulate(Ours(SMALL), requests, SMALL).waits
    path.write_text(path.read_text() + '{"arrival": 1}\n')
    with pytest.raises(ValueError, match=r"trace.jsonl:201: "):
        read_trace(path)


def test_the_table_has_a_row_for_each_policy_on_each_trace() -> None:
    report = compare(traces(60, 30))
    assert len(report.rows) == 6 * len(POLICIES)
    assert all(0 < row["Jain"] <= 1.0 + 1e-9 for row in report.rows)
