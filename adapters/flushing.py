"""Files that reach the disk while they are written, and have their name once they are whole.

One thread syncs: a file in pieces as it grows, and once more at its end, while the next one is being computed.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from adapters.durable import sync

FLUSH_BYTES = 128 << 20
PARTIAL = ".partial"


class Flusher:
    """Begin files with `begin`; at the end of the block all that were finished are on the disk under their names."""

    def __enter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1)
        self._open: list[Output] = []
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            for output in self._open if kind is None else ():
                output.settle()
        finally:
            self._thread.shutdown()
            for output in self._open:
                output.close()

    def begin(self, path: Path) -> Output:
        """A new file for `path`; the one before last is waited for, so that at most two are open."""
        while len(self._open) > 1:
            earlier = self._open.pop(0)
            try:
                earlier.settle()
            finally:
                earlier.close()
        partial = path.with_name(path.name + PARTIAL)
        handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        output = Output(path, handle, self._thread)
        self._open.append(output)
        return output


@dataclass
class Output:
    """One file in work: write through `handle`, say how much with `wrote`, end with `finish`."""

    path: Path
    handle: int
    thread: ThreadPoolExecutor
    _unsynced_bytes: int = 0
    _work: list[Future[None]] = field(default_factory=list)

    def wrote(self, size: int) -> None:
        """Begin to sync what is there when enough has come together and the disk is idle; raises OSError."""
        self._unsynced_bytes += size
        if self._unsynced_bytes >= FLUSH_BYTES and all(work.done() for work in self._work):
            self.settle()
            self._unsynced_bytes = 0
            self._work.append(self.thread.submit(os.fdatasync, self.handle))

    def finish(self) -> None:
        """Everything is written: sync it and give it its name, in the background."""
        self._work.append(self.thread.submit(self._seal))

    def settle(self) -> None:
        """Wait for what was begun; raises OSError of the disk."""
        while self._work:
            self._work.pop(0).result()

    def close(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)
        self.handle = -1

    def _seal(self) -> None:
        os.fsync(self.handle)
        self.path.with_name(self.path.name + PARTIAL).rename(self.path)
        sync(self.path.parent)
