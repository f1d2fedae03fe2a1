"""The tests as two runs of pytest at once, for machines of two cores; words behind go to both.

    python -m tests.lanes [PYTEST_OPTION...]

Tests of the server mostly wait for engines; those of training and of its jobs compute. The second run has one thread
and a lower priority, so that the first, which has bounds on time, does not notice it; what it says is printed when both
have ended.
A test or a few that fail beside all that are run once more by themselves: what fails again is broken, what passes then
depends on time, and is named as a test to mend.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPUTING = ("tests/adapters", "tests/bench", "tests/exports", "tests/jobs", "tests/training")
FAILED = 1  # pytest's exit code where tests failed and nothing else was wrong
FOUND_NONE = 5  # pytest's exit code where options leave no test of a lane
MOST_AGAIN = 3  # tests of a lane: more are no accident of time


@dataclass(frozen=True, slots=True)
class Lane:
    """A run of pytest; `cache` is where it keeps the names of what failed, below the checkout."""

    cache: str
    words: tuple[str, ...]

    def command(self, *options: str) -> list[str]:
        pytest = str(Path(sys.executable).with_name("pytest"))
        return [pytest, "-o", f"cache_dir={self.cache}", *self.words, *options]

    def failed(self) -> list[str]:
        """Names of the tests that failed in the last run."""
        try:
            return sorted(json.loads((ROOT / self.cache / "v/cache/lastfailed").read_bytes()))
        except FileNotFoundError:
            return []

    def settled(self, code: int, options: Sequence[str]) -> int:
        """The exit code after a second try of the few tests that failed; `code` is that of the run before."""
        failed = self.failed()
        if code != FAILED or not 0 < len(failed) <= MOST_AGAIN:
            return code
        print(f"\nOnce more, by themselves: {', '.join(failed)}", flush=True)
        code = subprocess.call(self.command("--last-failed", *options))
        if code == 0:
            print(f"\nDEPENDS ON TIME (failed beside others, passed alone; to mend): {', '.join(failed)}", flush=True)
        return code


WAITING = Lane(".pytest_cache/first", ("tests", *(f"--ignore={part}" for part in COMPUTING)))
BESIDE = Lane(".pytest_cache/second", COMPUTING)


def main() -> int:
    """Exit code 0 where both runs passed."""
    options = sys.argv[1:]
    with tempfile.TemporaryFile() as said:
        second = subprocess.Popen(
            ["nice", *BESIDE.command("--cache-clear", *options)],
            stdout=said,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            codes = [subprocess.call(WAITING.command("--cache-clear", *options)), second.wait()]
        finally:
            second.terminate()
            second.wait()
        print(f"\nBeside them, {', '.join(COMPUTING)}:", flush=True)
        said.seek(0)
        shutil.copyfileobj(said, sys.stdout.buffer)
    sys.stdout.flush()
    lanes = (WAITING, BESIDE)
    return exit_code([lane.settled(code, options) for lane, code in zip(lanes, codes, strict=True)])


def exit_code(codes: Sequence[int]) -> int:
    """0 where a run passed and none failed; a run may have found no test of what was asked for."""
    return next((code for code in codes if code not in (0, FOUND_NONE)), min(codes))


if __name__ == "__main__":
    sys.exit(main())
