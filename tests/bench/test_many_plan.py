"""The loads of the bench of many adapters: the same for the same seed, and of the distributions that they claim."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from functools import cache

import pytest

from bench.many.cases import OUTPUTS, PROMPTS, Case, full, short, trial
from bench.many.plan import BASE, Lengths, Load, Popularity, Shot, zipf

OPEN = Load("open", Popularity(64, 1.0, 0.1), PROMPTS, OUTPUTS, rate=5.0)


@cache
def many() -> list[Shot]:
    """Enough to see a distribution."""
    return OPEN.arrivals(1, 1600.0)


def test_the_same_seed_gives_the_same_plan_down_to_the_token_ids() -> None:
    first, again, other = (OPEN.arrivals(seed, 20.0) for seed in (7, 7, 8))
    assert first == again and [shot.prompt() for shot in first] == [shot.prompt() for shot in again]
    assert first != other


def test_a_plan_does_not_depend_on_how_far_it_is_read() -> None:
    assert OPEN.arrivals(3, 40.0)[: len(OPEN.arrivals(3, 10.0))] == OPEN.arrivals(3, 10.0)


def test_arrivals_are_a_poisson_process() -> None:
    times = [shot.at_seconds for shot in many()]
    gaps = [late - early for early, late in itertools.pairwise(times)]
    assert len(times) == pytest.approx(8_000, rel=0.05)  # within five standard deviations
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.05)  # as of an exponential


@pytest.mark.parametrize("alpha", [0.6, 1.0, 1.4])
def test_adapters_are_asked_for_by_zipfs_law(alpha: float) -> None:
    load = Load("zipf", Popularity(64, alpha), Lengths(8), Lengths(8), rate=10.0)
    counts = Counter(shot.model for shot in load.arrivals(1, 1000.0))
    assert counts[0] / counts[3] == pytest.approx(4**alpha, rel=0.25)
    assert sum(zipf(64, alpha)) == pytest.approx(1.0)


def test_a_share_is_for_the_base_and_the_others_take_turns_without_alpha() -> None:
    counts = Counter(shot.model for shot in many())
    assert counts[BASE] / counts.total() == pytest.approx(0.1, rel=0.2)
    turns = Load("turns", Popularity(4), Lengths(8), Lengths(8), clients=1)
    assert [shot.model for shot in itertools.islice(turns.shots(1), 6)] == [0, 1, 2, 3, 0, 1]
    base = Load("base", Popularity(0), Lengths(8), Lengths(8), clients=1)
    assert next(base.shots(1)).model == BASE


def test_lengths_are_lognormal_within_their_ends() -> None:
    shots = many()
    prompts = [shot.prompt_tokens for shot in shots]
    assert statistics.median(prompts) == pytest.approx(PROMPTS.median, rel=0.1)
    assert min(prompts) >= PROMPTS.least and max(prompts) == PROMPTS.most  # the tail is long enough to be cut
    assert statistics.mean(prompts) > 1.2 * PROMPTS.median
    assert {len(shot.prompt()) for shot in shots[:20]} <= set(prompts)


def test_no_two_prompts_begin_alike() -> None:
    beginnings = [tuple(shot.prompt()[:4]) for shot in OPEN.arrivals(1, 100.0)]
    assert len(set(beginnings)) == len(beginnings)


def test_a_closed_load_has_no_times() -> None:
    with pytest.raises(ValueError, match="no times"):
        Load("closed", Popularity(1), Lengths(8), Lengths(8), clients=1).arrivals(1, 1.0)


@pytest.mark.parametrize("cases", [short(), full(), trial()], ids=["short", "full", "trial"])
def test_every_case_has_a_name_of_its_own_and_ours_on_its_first_place(cases: list[Case]) -> None:
    names = [(case.table, case.name) for case in cases]
    assert len(set(names)) == len(names)
    assert all(case.sides[0] == "hotshoe" and len(set(case.sides)) == len(case.sides) > 1 for case in cases)
