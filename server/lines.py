"""Lines for a file or a pipe, written by a thread of its own: whoever has a line to write never waits for the disk.

When the place is full or nobody reads the pipe, up to `limit` lines wait; then lines are lost, and counted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

LIMIT = 10_000


class LineWriter:
    """Writes whole lines to what `opened` gives. `on_lost` hears of each line that was lost, from any thread."""

    def __init__(
        self, opened: Callable[[], int], on_lost: Callable[[], object] = lambda: None, limit: int = LIMIT
    ) -> None:
        self.on_lost = on_lost
        self._opened = opened
        self._waiting: queue.Queue[bytes | None] = queue.Queue(limit)
        self._is_cut = False  # the last line was only written in part
        self._thread = threading.Thread(target=self._run, name="lines", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """Have the line written; returns at once."""
        try:
            self._waiting.put_nowait(line.encode("utf-8", "backslashreplace") + b"\n")
        except queue.Full:
            self.on_lost()

    def close(self, seconds: float) -> None:
        """Write what waits, for at most this long."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=seconds)
        self._thread.join(seconds)

    def _run(self) -> None:
        while (line := self._waiting.get()) is not None:
            try:
                self._write(b"\n" + line if self._is_cut else line)
            except OSError:
                self.on_lost()

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            descriptor = self._opened()
            while left:
                left = left[os.write(descriptor, left) :]
            self._is_cut = False
        except OSError:
            self._is_cut = self._is_cut or len(left) < len(data)
            raise


class OpenFile:
    """A file that is appended to, opened anew when its path means another file: after it was moved or removed."""

    def __init__(self, path: Path) -> None:
        """Raises OSError: also for a pipe that nobody reads yet."""
        self.path = path
        self._descriptor = self._open()
        self._identity = self._identity_of(os.fstat(self._descriptor))

    def __call__(self) -> int:
        """The descriptor to write to now; raises OSError."""
        try:
            found = self._identity_of(self.path.stat())
        except FileNotFoundError:
            found = None
        if found != self._identity:
            descriptor = self._open()
            os.close(self._descriptor)
            self._descriptor, self._identity = descriptor, self._identity_of(os.fstat(descriptor))
        return self._descriptor

    def close(self) -> None:
        os.close(self._descriptor)

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(self.path, flags, 0o640)
        os.set_blocking(descriptor, True)
        return descriptor

    @staticmethod
    def _identity_of(found: os.stat_result) -> tuple[int, int]:
        return found.st_dev, found.st_ino


class LineHandler(logging.Handler):
    """A logging handler that waits for nobody."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self.writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        self.writer.write(self.format(record))

    def close(self) -> None:
        self.writer.close(1.0)
        super().close()
