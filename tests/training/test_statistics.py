"""Intervals, paired tests and amounts: against closed forms, and by how often they hold in simulations.

Simulations are seeded, so each passes or fails for good. Their bounds lie three and more binomial standard errors from
the claim, so that another seed would pass as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binomtest
from scipy.stats import t as student

from training.statistics import (
    FEWEST_CLUSTERS,
    auc,
    design_effect,
    flip_p,
    holm,
    interval,
    rows_needed,
    statistic_beyond,
    statistic_interval,
)
from training.statistics.bootstrap import layers_of, mean_draws, share_p
from training.statistics.clusters import grouped

Sizes = Callable[[np.random.Generator, int], np.ndarray[Any, Any]]


def five_each(generator: np.random.Generator, clusters: int) -> np.ndarray[Any, Any]:
    return np.full(clusters, 5)


def heavy_tailed(generator: np.random.Generator, clusters: int) -> np.ndarray[Any, Any]:
    """Most templates have a few rows, some have a hundred."""
    return np.minimum(100, 1 + (generator.pareto(1.2, clusters) * 2).astype(int))


def clustered_answers(
    generator: np.random.Generator, clusters: int, sizes: Sizes, right: float, alike: float = 0.2
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Right or wrong answers whose clusters are alike: each has its own share of right ones."""
    names = np.repeat(np.arange(clusters), sizes(generator, clusters))
    strength = (1 - alike) / alike
    share = generator.beta(right * strength, (1 - right) * strength, clusters)
    return (generator.random(len(names)) < share[names]).astype(float), names


# Intervals of a mean


def test_of_normal_values_it_is_students_interval() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 60)
    made = interval(values, draws=20_000)
    half = student.isf(0.025, 59) * values.std(ddof=1) / np.sqrt(60)
    assert made.estimate == pytest.approx(values.mean())
    assert made.low == pytest.approx(values.mean() - half, abs=0.04)
    assert made.high == pytest.approx(values.mean() + half, abs=0.04)


@pytest.mark.parametrize(("right", "rows"), [(380, 400), (400, 400), (3, 400)])
def test_of_a_share_it_is_jeffreys_interval(right: int, rows: int) -> None:
    made = interval([1.0] * right + [0.0] * (rows - right), bounds=(0, 1), draws=20_000)
    low, high = beta.ppf([0.025, 0.975], right + 0.5, rows - right + 0.5)
    assert made.low == pytest.approx(low, abs=0.003)
    assert made.high == pytest.approx(max(high, made.estimate), abs=0.003)


def test_rows_repeated_in_their_clusters_tell_no_more() -> None:
    values = np.random.default_rng(1).normal(size=50)
    once = interval(values)
    ten_times = interval(np.repeat(values, 10), np.repeat(np.arange(50), 10))
    assert (ten_times.low, ten_times.high) == pytest.approx((once.low, once.high))
    assert (ten_times.items, ten_times.clusters) == (500, 50)
    wide, narrow = once.high - once.low, (believed := interval(np.repeat(values, 10))).high - believed.low
    assert wide / narrow == pytest.approx(np.sqrt(10), rel=0.1)


def test_one_cluster_with_nearly_all_rows_leaves_hardly_anything_known() -> None:
    generator = np.random.default_rng(2)
    values = generator.normal(size=1019)
    lopsided = interval(values, np.array([0] * 1000 + list(range(1, 20))))
    even = interval(values, np.arange(1019) % 20)
    assert lopsided.clusters == even.clusters == FEWEST_CLUSTERS
    assert lopsided.high - lopsided.low > 1.5 * (even.high - even.low)


def test_a_higher_level_is_a_wider_interval_and_the_same_seed_the_same() -> None:
    values = np.random.default_rng(3).random(40)
    assert interval(values, seed=7) == interval(values, seed=7)
    narrow, wide = interval(values, level=0.8), interval(values, level=0.99)
    assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high


@pytest.mark.parametrize("clusters", [19, 20])
def test_fewer_than_twenty_clusters_are_not_telling(clusters: int) -> None:
    values, names = np.arange(100.0), np.arange(100) % clusters
    assert interval(values, names).is_telling is (clusters == 20)
    assert statistic_interval(100, lambda indices: 1.0, names, draws=20).is_telling is (clusters == 20)


@pytest.mark.parametrize("sizes", [five_each, heavy_tailed])
@pytest.mark.parametrize("right", [0.5, 0.95])
@pytest.mark.parametrize("clusters", [20, 80])
def test_the_interval_of_a_score_holds_the_truth_as_often_as_it_says(clusters: int, right: float, sizes: Sizes) -> None:
    """95% claimed; 250 runs have a standard error of 1.4%, and 91% is asked."""
    generator, held = np.random.default_rng(4), 0
    for seed in range(250):
        values, names = clustered_answers(generator, clusters, sizes, right)
        made = interval(values, names, seed=seed, draws=300, bounds=(0, 1))
        held += made.low <= right <= made.high
    assert held / 250 >= 0.91


def test_without_clusters_the_same_interval_misses_far_too_often() -> None:
    generator, held = np.random.default_rng(4), 0
    for seed in range(200):
        values, _ = clustered_answers(generator, 80, five_each, 0.5, alike=0.6)
        made = interval(values, seed=seed, draws=300, bounds=(0, 1))
        held += made.low <= 0.5 <= made.high
    assert held / 200 < 0.85


# Intervals of other statistics

LABELS = 10


def macro_f1(expected: np.ndarray[Any, Any], given: np.ndarray[Any, Any]) -> float:
    counts = np.bincount(expected * LABELS + given, minlength=LABELS**2).reshape(LABELS, LABELS)
    whole = counts.sum(0) + counts.sum(1)
    return float((2 * np.diag(counts)[whole > 0] / whole[whole > 0]).mean())


def macro_f1_of(expected: Any, given: Any, indices: Any) -> float:
    return macro_f1(expected[indices], given[indices])


def labelled_answers(generator: np.random.Generator, templates: int, right: float) -> tuple[Any, Any, Any]:
    """(label, template, answer) of six rows a template, `templates` of each label."""
    labels = np.repeat(np.arange(LABELS), templates * 6)
    names = np.repeat(np.arange(LABELS * templates), 6)
    share = generator.beta(right * 2, (1 - right) * 2, LABELS * templates)
    is_right = generator.random(len(labels)) < share[names]
    return labels, names, np.where(is_right, labels, (labels + generator.integers(1, LABELS, len(labels))) % LABELS)


def held_share(templates: int, runs: int, draws: int) -> float:
    """How often the interval of macro-F1 holds the truth."""
    generator, held = np.random.default_rng(5), 0
    truth = macro_f1(*labelled_answers(generator, 3000, 0.7)[::2])
    for seed in range(runs):
        labels, names, answers = labelled_answers(generator, templates, 0.7)
        made = statistic_interval(
            len(labels), partial(macro_f1_of, labels, answers), names, labels, seed, draws, bounds=(0, 1)
        )
        held += made.low <= truth <= made.high
    return held / runs


def test_the_interval_of_macro_f1_holds_with_two_templates_a_label() -> None:
    """95% claimed; 60 runs have a standard error of 3%. A bootstrap of two shows half of the variance: without its
    push the interval holds in about 80%."""
    assert held_share(templates=2, runs=60, draws=150) >= 0.88


@pytest.mark.long
@pytest.mark.parametrize("templates", [2, 3, 6])
def test_the_interval_of_macro_f1_holds_with_few_templates_a_label(templates: int) -> None:
    """95% claimed; 400 runs have a standard error of 1.1%."""
    assert held_share(templates, runs=400, draws=300) >= 0.92


def test_each_draw_keeps_as_many_clusters_of_each_label() -> None:
    labels = np.array([0] * 30 + [1] * 6)
    shares: list[float] = []

    def share(indices: Any) -> float:
        shares.append(float(labels[indices].mean()))
        return shares[-1]

    statistic_interval(36, share, strata=labels, draws=50)
    assert set(shares) == {6 / 36}
    shares.clear()
    statistic_interval(36, share, draws=50)
    assert len(set(shares)) > 5


def test_labels_of_one_cluster_are_drawn_together_so_that_they_vary() -> None:
    groups = grouped(8, ["a", "a", "b", "b", "c", "d", "e", "f"])
    layers = layers_of(groups, ["x", "x", "y", "y", "z", "z", "z", "z"])
    assert sorted(sorted(layer.tolist()) for layer in layers) == [[0, 1], [2, 3, 4, 5]]


def test_a_perfect_score_has_the_exact_interval_of_a_share() -> None:
    made = statistic_interval(30, lambda indices: 1.0, bounds=(0, 1), draws=20)
    assert (made.low, made.high) == (pytest.approx(0.025 ** (1 / 30)), 1.0)


# Paired differences


def test_flips_of_right_and_wrong_are_mcnemars_exact_test() -> None:
    for wins, losses in ((5, 0), (9, 3)):
        differences = [1.0] * wins + [-1.0] * losses + [0.0] * 100
        assert flip_p(differences) == pytest.approx(binomtest(wins, wins + losses).pvalue)
    many = [1.0] * 60 + [-1.0] * 36 + [0.0] * 300
    assert flip_p(many) == pytest.approx(binomtest(60, 96).pvalue, abs=0.005)
    assert interval(many).estimate == pytest.approx(24 / 396)


def test_a_cluster_is_flipped_as_a_whole() -> None:
    assert flip_p([1.0] * 40, np.repeat(np.arange(4), 10)) == 2 / 2**4
    assert flip_p([1.0] * 40) < 1e-3


def test_sums_that_are_equal_but_for_rounding_count_as_reached() -> None:
    """Of thirds in any order: the observed sum is a tie with itself under every permutation."""
    thirds = [1 / 3, 2 / 3, -1 / 3] * 30
    shuffled = [thirds[i] for i in np.random.default_rng(0).permutation(90)]
    ones = flip_p([round(value * 3) for value in shuffled])
    assert flip_p(shuffled) == pytest.approx(ones, abs=1e-12)


def test_no_difference_is_no_evidence_and_no_certainty() -> None:
    nothing = interval([0.0] * 50, bounds=(-1, 1))
    assert flip_p([0.0] * 50) == 1.0
    assert -0.1 < nothing.low < 0 < nothing.high < 0.1


def test_where_nothing_differs_flips_find_a_difference_as_seldom_as_they_say() -> None:
    """5% claimed; 200 runs have a standard error of 1.5%."""
    generator, found = np.random.default_rng(6), 0
    for seed in range(200):
        names = np.repeat(np.arange(25), 4)
        differences = generator.choice([-1.0, 1.0], 25)[names] * (generator.random(100) < 0.3)
        found += flip_p(differences, names, seed) <= 0.05
    assert found / 200 <= 0.095


def beyond(values: Sequence[float], limit: float, seed: int = 0) -> float:
    """The p of a mean of rows lying on the limit."""
    groups = grouped(len(values), None)
    return share_p(mean_draws(np.asarray(values), groups, seed, 10_000, None), limit, groups.effective)


def test_the_p_of_a_limit_is_where_the_interval_begins_to_leave_it_out() -> None:
    values = np.random.default_rng(7).normal(0.1, 1.0, 80)
    p = beyond(values, 0.0, seed=3)
    assert 0.01 < p < 0.9
    wider = interval(values, seed=3, draws=10_000, level=1 - 0.9 * p)
    narrower = interval(values, seed=3, draws=10_000, level=1 - 1.1 * p)
    assert wider.low <= 0.0 <= wider.high
    assert not narrower.low <= 0.0 <= narrower.high


# Amounts


def test_the_design_effect_of_copies_is_how_many_there_are() -> None:
    values = np.random.default_rng(8).normal(size=40)
    assert design_effect(np.repeat(values, 7), np.repeat(np.arange(40), 7)) == pytest.approx(7)
    assert design_effect(values) == 1.0
    assert design_effect(np.ones(10), [0] * 10) == 1.0


def test_the_p_of_a_statistic_is_that_of_its_interval() -> None:
    values = np.random.default_rng(11).normal(0.2, 1.0, 60)

    def mean(indices: Any) -> float:
        return float(values[indices].mean())

    p, far = statistic_beyond(60, mean, [0.0, 5.0], seed=3, draws=2000)
    assert p == pytest.approx(beyond(values, 0.0, seed=3), abs=0.03)
    assert statistic_interval(60, mean, seed=3, draws=2000, level=1 - 0.8 * p).low <= 0.0
    assert statistic_interval(60, mean, seed=3, draws=2000, level=1 - 1.25 * p).low > 0.0
    assert far < 0.02 and statistic_beyond(60, mean, [5.0], draws=200)[0] < 0.02


def test_so_many_rows_as_are_said_to_be_needed_tell_eight_times_of_ten() -> None:
    """A difference of 10 points where 30% of the rows are discordant, against a margin of 2 points. 300 runs: 2.3%."""
    rows = rows_needed(0.3, 0.08, difference=0.1)
    assert rows == pytest.approx(7.849 * (0.3 - 0.01) / 0.0064, abs=1)
    generator, told = np.random.default_rng(9), 0
    for seed in range(300):
        differences = generator.choice([1.0, -1.0, 0.0], rows, p=[0.2, 0.1, 0.7])
        told += interval(differences, seed=seed, draws=400, bounds=(-1, 1)).low > 0.02
    assert 0.72 < told / 300 < 0.88


def test_clusters_ask_for_more_rows_and_no_gap_for_endlessly_many() -> None:
    assert rows_needed(0.2, 0.05, design_effect=4.0) == pytest.approx(4 * rows_needed(0.2, 0.05), abs=4)
    with pytest.raises(ValueError, match="no number of rows"):
        rows_needed(0.2, 0.0)


def test_holms_adjusted_p_is_the_papers() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_one_look_more_makes_each_p_larger() -> None:
    assert holm([0.03])[0] < holm([0.03, 0.5])[0]


def test_auc_counts_pairs_and_halves_ties() -> None:
    assert auc([3, 4], [1, 2]) == 1.0
    assert auc([1, 2], [1, 2]) == 0.5
    assert auc([1, 5, 5], [2, 5]) == pytest.approx((0 + 0 + 1 + 0.5 + 1 + 0.5) / 6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.lists(st.integers(-3, 3), min_size=1, max_size=12))
def test_auc_is_the_share_of_pairs(above: Sequence[int], below: Sequence[int]) -> None:
    pairs = [(a > b) + (a == b) / 2 for a in above for b in below]
    assert auc(above, below) == pytest.approx(sum(pairs) / len(pairs))


# What cannot be computed


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: interval([]), "no item"),
        (lambda: interval([1.0, float("nan")]), "1 of 2 values are not finite"),
        (lambda: interval([1.0, 2.0], ["a"]), "1 names of clusters for 2 items"),
        (lambda: interval([0.5, 1.2], bounds=(0, 1)), "outside 0 to 1"),
        (lambda: auc([], [1.0]), "both kinds"),
    ],
)
def test_what_cannot_be_computed_is_said(call: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


def test_one_item_alone_is_computed_and_not_telling() -> None:
    alone = interval([0.5])
    assert (alone.low, alone.high, alone.is_telling) == (0.5, 0.5, False)
    assert beyond([0.5], 0.1) == 1.0
