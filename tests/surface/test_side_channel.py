"""The measure of the timing side channel is the one that it says."""

from __future__ import annotations

import random

import pytest

from bench.side_channel import Times, interval, prefix, quicker


def test_the_auc_is_how_often_the_right_guess_is_the_quicker_one() -> None:
    assert quicker([1.0, 2.0], [3.0, 4.0]) == 1.0
    assert quicker([3.0, 4.0], [1.0, 2.0]) == 0.0
    assert quicker([1.0, 1.0], [1.0, 1.0]) == 0.5
    assert quicker([1.0, 3.0], [2.0, 4.0]) == 0.75


def test_its_interval_holds_a_coins_half_and_closes_on_certainty() -> None:
    chance = random.Random(1)
    coin = Times([chance.random() for _ in range(100)], [chance.random() for _ in range(100)])
    low, high = interval(coin)
    assert low < 0.5 < high and high - low < 0.2
    assert interval(Times([1.0] * 20, [2.0] * 20)) == pytest.approx((1.0, 1.0))


def test_no_two_prefixes_begin_alike() -> None:
    chance = random.Random(1)
    assert len({prefix(chance).split()[0] for _ in range(1000)}) == 1000
