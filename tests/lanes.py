"""The tests as two runs of pytest at once, for machines of two cores; words behind go to both.

    python -m tests.lanes [PYTEST_OPTION...]

Tests of the server mostly wait for engines; those of training compute. The second run has one thread and a lower
priority, so that the first, which has bounds on time, does not notice it; what it says is printed when both have ended.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

COMPUTING = ("tests/adapters", "tests/bench", "tests/training")
FOUND_NONE = 5  # pytest's exit code where options leave no test of a lane


def main() -> int:
    """Exit code 0 where both runs passed."""
    options = sys.argv[1:]
    with tempfile.TemporaryFile() as said:
        second = subprocess.Popen(
            ["nice", *_pytest(*COMPUTING, "-o", "cache_dir=.pytest_cache/second", *options)],
            stdout=said,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            codes = [subprocess.call(_pytest("tests", *(f"--ignore={part}" for part in COMPUTING), *options))]
            codes.append(second.wait())
        finally:
            second.terminate()
            second.wait()
        print(f"\nBeside them, {', '.join(COMPUTING)}:", flush=True)
        said.seek(0)
        shutil.copyfileobj(said, sys.stdout.buffer)
    sys.stdout.flush()
    return exit_code(codes)


def exit_code(codes: Sequence[int]) -> int:
    """0 where a run passed and none failed; a run may have found no test of what was asked for."""
    return next((code for code in codes if code not in (0, FOUND_NONE)), min(codes))


def _pytest(*words: str) -> list[str]:
    return [str(Path(sys.executable).with_name("pytest")), *words]


if __name__ == "__main__":
    sys.exit(main())
