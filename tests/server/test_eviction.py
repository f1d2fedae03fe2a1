"""Which version leaves the engine's memory, by numbers of the test's."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.eviction import HALF_LIFE_SECONDS, Candidate, choose_victim
from server.popularity import DecayingCount


def one(name: str, size: int = 1, load: float | None = 1.0, popularity: float = 1.0, used: float = 0.0) -> Candidate:
    return Candidate(name, size, load, popularity, used)


def test_the_one_whose_return_costs_least_goes() -> None:
    assert choose_victim([one("dear", load=2.0), one("cheap", load=0.5)], [], []) == "cheap"
    assert choose_victim([one("rare", popularity=0.1), one("popular", popularity=9.0)], [], []) == "rare"
    assert choose_victim([one("old", used=1.0), one("new", used=2.0)], [], []) == "old"


def test_a_load_that_was_never_measured_is_estimated_by_size() -> None:
    assert choose_victim([one("large", size=10**9, load=None), one("small", size=10**6, load=None)], [], []) == "small"


def test_pinned_ones_stay_and_those_whose_turn_is_near_go_last() -> None:
    rows = [one("pinned", popularity=0.0), one("near", popularity=0.1), one("other", popularity=5.0)]
    assert choose_victim(rows, ["pinned"], ["near"]) == "other"
    assert choose_victim(rows, ["pinned", "other"], ["near"]) == "near"
    assert choose_victim(rows, ["pinned", "other", "near"], []) is None
    assert choose_victim([], [], []) is None


def test_a_count_halves_and_two_are_compared_whenever_they_were_made() -> None:
    counted = DecayingCount(HALF_LIFE_SECONDS)
    counted.add(0.0)
    counted.add(0.0)
    assert counted.at(HALF_LIFE_SECONDS) == 1.0
    assert DecayingCount(HALF_LIFE_SECONDS).rank() < counted.rank()


@given(st.lists(st.tuples(st.booleans(), st.floats(0.0, 3000.0)), min_size=1, max_size=40))
def test_the_rank_orders_as_the_counts_at_one_moment_do(uses: list[tuple[bool, float]]) -> None:
    first, second, now = DecayingCount(HALF_LIFE_SECONDS), DecayingCount(HALF_LIFE_SECONDS), 0.0
    for is_first, gap in uses:
        now += gap / 10
        (first if is_first else second).add(now)
    a, b = first.at(now), second.at(now)
    if abs(a - b) > 1e-9 * max(a, b):
        assert (a > b) == (first.rank() > second.rank())
