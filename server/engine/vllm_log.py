"""What vLLM's log tells: how far a start has come, and why one failed."""

from __future__ import annotations

import re
from pathlib import Path

# A phase ends with the first line that holds its mark; "routes" ends when the socket answers.
PHASES = (
    ("imports_api_server", "non-default args"),
    ("imports_engine", "Initializing a V1 LLM engine"),
    ("imports_worker", "Starting to load model"),
    ("weights", "Loading weights took"),
    ("slots", "KV cache size"),
    ("kv_cache", "init engine (profile"),
)
LAST_PHASE = "routes"
_ERROR = re.compile(r"(?:\b[A-Za-z_.]*(?:Error|Exception|Interrupt)|error): (.+)")
_WRAPPERS = ("initialization failed", "See root cause above", "See stack trace above", "was cancelled")


class StartLog:
    """Reads a growing log file; `phases` holds the seconds that each phase took, in order."""

    def __init__(self, path: Path, started_at: float) -> None:
        self.path = path
        self.phases: dict[str, float] = {}
        self._begun_at = started_at
        self._offset = path.stat().st_size if path.exists() else 0
        self._start_offset = self._offset

    def read(self, now: float) -> None:
        """Take in what was written since the last call, at time `now` on the clock of `started_at`."""
        with self.path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole, _, _ = text.rpartition(b"\n")
        self._offset += len(whole)
        for name, mark in PHASES:
            if name not in self.phases and mark.encode() in whole:
                self._end(name, now)

    def finish(self, now: float) -> None:
        self._end(LAST_PHASE, now)

    def _end(self, name: str, now: float) -> None:
        self.phases[name] = round(now - self._begun_at, 2)
        self._begun_at = now

    def reason(self) -> str:
        """The last meaningful line of this start: the root error where one is named, else the last line."""
        with self.path.open("rb") as file:
            file.seek(self._start_offset)
            lines = file.read().decode(errors="replace").splitlines()
        return last_meaningful_line(lines)


def last_meaningful_line(lines: list[str]) -> str:
    """The last error that is no mere wrapper of another, else the last line that is not empty."""
    found = [match.group(0) for line in lines if (match := _ERROR.search(line))]
    roots = [error for error in found if not any(wrapper in error for wrapper in _WRAPPERS)]
    if roots:
        return roots[-1].strip()
    written = [line.strip() for line in lines if line.strip()]
    return written[-1] if written else "it wrote nothing"
