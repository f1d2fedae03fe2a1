"""What `make test` runs, and when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lanes import COMPUTING, FOUND_NONE, exit_code

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([0, 0], 0), ([0, 1], 1), ([1, 0], 1), ([FOUND_NONE, 0], 0), ([FOUND_NONE, 2], 2), ([-9, 0], -9), ([5, 5], 5)],
)
def test_both_runs_must_pass_and_one_may_have_nothing_to_run(codes: list[int], expected: int) -> None:
    assert exit_code(codes) == expected


def test_what_runs_beside_are_folders_of_tests() -> None:
    assert all(list((ROOT / part).glob("test_*.py")) for part in COMPUTING)
