"""Keeps what a job's processes hold in main memory within a limit: the kernel does, where it lets us, else we look.

A control group of its own ends exactly the job, at once. It needs a group that was handed to us: of version 2 one that
systemd has delegated (`Delegate=memory`, `DelegateSubgroup=`), of version 1 our own where it may be written. Elsewhere
the job's processes are looked at twice a second. RLIMIT_AS would not do: torch reserves more addresses than it uses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import structlog

from server.machine import process_tree, rss_of

log = structlog.get_logger("hotshoe.jobs")
SHARE_OF_FREE = 0.85  # of what is available when a job starts, where no limit is set
DELEGATED = "user.delegate"  # systemd's mark on a group whose inside is ours


class MemoryLimit(Protocol):
    """What holds one job's processes within `limit_bytes`."""

    @property
    def limit_bytes(self) -> int:
        """What they may hold."""

    def take(self, pid: int) -> None:
        """Hold this process, and all that it starts from here on."""

    def is_over(self) -> bool:
        """The processes have held more than they may. Where the kernel does not end them, the caller has to."""

    def close(self) -> None:
        """No process is held any more."""


def limit_memory(limit_bytes: int, name: str, root: Path = Path("/")) -> MemoryLimit:
    """The best that this machine has; `root` is where /proc and /sys are looked for."""
    for place in _places(root):
        with suppress(OSError):
            return place.group(name, limit_bytes)
    return Watched(limit_bytes)


def default_limit_bytes() -> int:
    """Most of what is available now, so that serving is never short of it."""
    return int(SHARE_OF_FREE * psutil.virtual_memory().available)


@dataclass
class Watched:
    """The processes are looked at; resident bytes, shared ones counted for each."""

    limit_bytes: int
    _pid: int | None = None
    _was_over: bool = False

    def take(self, pid: int) -> None:
        self._pid = pid

    def is_over(self) -> bool:
        if self._pid is not None and rss_of(process_tree(self._pid)) > self.limit_bytes:
            self._was_over = True
        return self._was_over

    def close(self) -> None:
        self._pid = None


@dataclass(frozen=True)
class Group:
    """A control group with a limit; `kills` is the file that counts what the kernel has ended in it."""

    folder: Path
    limit_bytes: int
    kills: str

    def take(self, pid: int) -> None:
        with suppress(ProcessLookupError):  # it has ended already
            (self.folder / "cgroup.procs").write_text(str(pid), "ascii")

    def is_over(self) -> bool:
        with suppress(OSError):
            lines = (line.split() for line in (self.folder / self.kills).read_text("ascii").splitlines())
            return any(words[0] == "oom_kill" and int(words[1]) > 0 for words in lines if len(words) == 2)
        return False

    def close(self) -> None:
        try:
            self.folder.rmdir()
        except OSError as error:  # a process is still ending; an empty group costs nothing
            log.warning("control group stays", folder=self.folder.name, reason=str(error))


@dataclass(frozen=True)
class Place:
    """Where a group may be made, with the files of its version."""

    folder: Path
    limit: str
    kills: str
    others: tuple[tuple[str, str], ...] = ()  # written too, where there is such a file

    def group(self, name: str, limit_bytes: int) -> Group:
        """Raises OSError where none can be made."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        try:
            (folder / self.limit).write_text(str(limit_bytes), "ascii")
            for file, value in self.others:
                with suppress(OSError):
                    (folder / file).write_text(value.format(limit_bytes), "ascii")
            return Group(folder, limit_bytes, self.kills)
        except OSError:
            with suppress(OSError):
                folder.rmdir()
            raise


def _places(root: Path) -> Iterator[Place]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for controllers, path in (line.split(":", 2)[1:] for line in lines if line.count(":") >= 2):
        inside = path.lstrip("/")
        if not controllers:
            above = (root / "sys/fs/cgroup" / inside).parent
            with suppress(OSError):
                if os.getxattr(above, DELEGATED) == b"1":
                    others = (("memory.swap.max", "0"), ("memory.oom.group", "1"))
                    yield Place(above, "memory.max", "memory.events", others)
        elif "memory" in controllers.split(","):
            own = root / "sys/fs/cgroup/memory" / inside
            yield Place(own, "memory.limit_in_bytes", "memory.oom_control", (("memory.memsw.limit_in_bytes", "{}"),))
