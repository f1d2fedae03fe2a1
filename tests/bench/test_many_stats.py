"""The statistics of the bench of many adapters, on values whose answers are known, and on any values."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.many.plan import BASE, Classes
from bench.many.stats import (
    Seen,
    Slo,
    goodput,
    jain,
    keeps,
    largest_gap,
    paired_ratios,
    quantile,
    served_shares,
    spread,
    tpots,
    waits,
)

SLO = Slo(ttft_seconds=1.0, tpot_seconds=0.1)
GOOD = Seen(
    model=0,
    tenant=0,
    intended=1.0,
    sent=1.5,
    first=2.0,
    last=2.9,
    asked_tokens=10,
    got_tokens=10,
    window_tokens=10,
)
amounts = st.floats(min_value=0.0, max_value=1e12, allow_nan=False)
some = st.lists(amounts, min_size=1, max_size=50)


@pytest.mark.parametrize(("share", "expected"), [(0, 1.0), (0.25, 2.0), (0.5, 3.0), (0.9, 4.6), (1, 5.0)])
def test_a_quantile_lies_between_two_neighbours_by_the_distance(share: float, expected: float) -> None:
    assert quantile([5.0, 1.0, 4.0, 2.0, 3.0], share) == pytest.approx(expected)


def test_what_never_came_is_not_averaged_with_what_did() -> None:
    values = [0.1] * 98 + [math.inf] * 2
    assert quantile(values, 0.5) == 0.1 and quantile(values, 0.99) == math.inf


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 1.5), ([1.0], -0.1)])
def test_a_quantile_of_nothing_or_beyond_all_is_refused(values: list[float], share: float) -> None:
    with pytest.raises(ValueError, match="at least one value"):
        quantile(values, share)


@given(some, st.floats(min_value=0, max_value=1), st.floats(min_value=0, max_value=1))
def test_quantiles_stay_within_the_values_and_grow_with_the_share(values: list[float], a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert min(values) <= quantile(values, low) <= quantile(values, high) <= max(values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0, 3.0, 3.0], 1.0), ([1.0, 0.0, 0.0, 0.0], 0.25), ([1.0, 2.0, 3.0], 36 / 42), ([0.0], 1.0)],
)
def test_jains_index_is_1_for_equals_and_1_over_n_where_one_gets_all(values: list[float], expected: float) -> None:
    assert jain(values) == pytest.approx(expected)


@given(some, st.floats(min_value=1e-6, max_value=1e6))
def test_jains_index_lies_above_0_up_to_1_and_knows_no_unit(values: list[float], factor: float) -> None:
    found = jain(values)
    assert 1 / len(values) - 1e-9 <= found <= 1.0
    assert jain([value * factor for value in values]) == pytest.approx(found, rel=1e-6)


def test_jains_index_takes_no_negative_amounts() -> None:
    with pytest.raises(ValueError, match="none below 0"):
        jain([1.0, -1.0])


def test_times_count_from_when_a_request_was_meant_to_be_sent() -> None:
    assert GOOD.ttft_seconds == 1.0 and GOOD.tpot_seconds == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, True),
        ({"intended": 0.9}, False),  # a first token too late
        ({"last": 3.0}, False),  # the others too slow
        ({"last": None}, False),  # cut off by the end
        ({"problem": "503"}, False),
        ({"asked_tokens": 1, "last": 2.0}, True),  # no second token, so no time a token
    ],
)
def test_goodput_counts_whole_answers_within_both_bounds(changes: dict[str, object], kept: bool) -> None:
    one = replace(GOOD, **changes)  # type: ignore[arg-type] - fields by name
    assert keeps(one, SLO) is kept
    assert goodput([GOOD, one], SLO, seconds=4.0) == (1 + kept) / 4


def test_one_that_still_waits_counts_as_long_as_it_has_waited_and_one_that_failed_as_never() -> None:
    waiting, failed = replace(GOOD, first=None, last=None), replace(GOOD, first=None, last=None, problem="503")
    assert waits([GOOD, waiting, failed], until=11.0) == [1.0, 10.0, math.inf]
    assert tpots([GOOD, waiting, failed]) == [pytest.approx(0.1)]


def test_a_served_share_is_of_what_was_asked_for_and_leaves_base_requests_out() -> None:
    seen = [GOOD, replace(GOOD, got_tokens=0), replace(GOOD, model=5, tenant=1), replace(GOOD, model=BASE, tenant=-1)]
    assert served_shares(seen, "model") == [0.5, 1.0]
    assert served_shares(seen, "tenant") == [0.5, 1.0]


def test_ratios_are_taken_within_a_round_that_both_have() -> None:
    assert paired_ratios({0: 2.0, 1: 9.0, 3: 8.0}, {0: 1.0, 2: 5.0, 3: 4.0}) == [2.0, 2.0]
    assert paired_ratios({0: 1.0}, {0: 0.0}) == []
    assert spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)


def test_the_largest_gap_is_of_those_that_touch_the_span() -> None:
    times = [0.0, 5.0, 5.1, 5.9, 6.0, 9.0]
    assert largest_gap(times, 5.05, 5.95) == pytest.approx(0.8)
    assert largest_gap(times, 0.0, 5.0) == 5.0
    assert largest_gap([], 0.0, 1.0) == 0.0


def test_classes_go_by_popularity() -> None:
    classes = Classes(hot=4)
    assert [classes.of(model) for model in (BASE, 0, 3, 4, 15, 16, 63)] == [
        *("base", "hot", "hot", "warm", "warm", "cold", "cold")
    ]
