"""What `make test` runs, and when it fails."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.lanes import COMPUTING, FAILED, FOUND_NONE, MOST_AGAIN, Lane, exit_code

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([0, 0], 0), ([0, 1], 1), ([1, 0], 1), ([FOUND_NONE, 0], 0), ([FOUND_NONE, 2], 2), ([-9, 0], -9), ([5, 5], 5)],
)
def test_both_runs_must_pass_and_one_may_have_nothing_to_run(codes: list[int], expected: int) -> None:
    assert exit_code(codes) == expected


def test_what_runs_beside_are_folders_of_tests() -> None:
    assert all(list((ROOT / part).glob("test_*.py")) for part in COMPUTING)


def lane_of(folder: Path, text: str) -> Lane:
    """A lane over one file of tests, run once."""
    file = folder / "test_made.py"
    file.write_text(text)
    lane = Lane(str(folder / "cache"), (str(file), f"--rootdir={folder}"))
    subprocess.run(lane.command(), check=False, capture_output=True)
    return lane


def test_a_test_that_passes_by_itself_is_named_and_does_not_fail_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lane = lane_of(
        tmp_path,
        f"""
from pathlib import Path
SEEN = Path({str(tmp_path / "seen")!r})
def test_late():
    was_there = SEEN.exists()
    SEEN.touch()
    assert was_there
def test_fine(): pass
""",
    )
    assert [name.split("::")[1] for name in lane.failed()] == ["test_late"]
    assert lane.settled(FAILED, []) == 0
    said = capfd.readouterr().out
    assert "DEPENDS ON TIME" in said
    assert "1 passed" in said  # and not the one that had passed before


def test_a_test_that_fails_again_fails_the_run(tmp_path: Path) -> None:
    assert lane_of(tmp_path, "def test_broken(): assert False").settled(FAILED, []) == FAILED


def test_many_failures_are_not_tried_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    many = "\n".join(f"def test_{number}(): assert False" for number in range(MOST_AGAIN + 1))
    assert lane_of(tmp_path, many).settled(FAILED, []) == FAILED
    assert "Once more" not in capfd.readouterr().out


@pytest.mark.parametrize("code", [0, 2, FOUND_NONE, -9])
def test_a_run_that_ended_otherwise_is_as_it_was(code: int, tmp_path: Path) -> None:
    assert lane_of(tmp_path, "def test_broken(): assert False").settled(code, []) == code
