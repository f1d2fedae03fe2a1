"""Keeps what a job's processes hold in main memory within a limit: the kernel does, where it lets us, else we look.

A control group of its own ends exactly the job, at once. It needs a group that was handed to us: of version 2 one that
systemd has delegated (`Delegate=memory`, `DelegateSubgroup=`), of version 1 our own where it may be written. Elsewhere
the job's processes are looked at twice a second. RLIMIT_AS would not do: torch reserves more addresses than it uses.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import structlog

from server.machine import process_tree, read_machine, rss_of

log = structlog.get_logger("hotshoe.jobs")
SHARE_OF_FREE = 0.85  # of what is available when a job starts, where no limit is set
PREFIX = "hotshoe-"  # of a group's name, before the server's process id
CLOSE_TRIES, CLOSE_PAUSE_SECONDS = 20, 0.1  # processes leave a group a little after they have ended
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
            return place.group(f"{PREFIX}{os.getpid()}-{name}", limit_bytes)
    log.info("a job's memory is watched, not limited by the kernel", job=name)
    return Watched(limit_bytes)


def sweep_groups(root: Path = Path("/")) -> None:
    """Remove the groups of jobs whose server was killed; one that is not empty stays."""
    for place in _places(root):
        for left in place.folder.glob(f"{PREFIX}*"):
            server = left.name.removeprefix(PREFIX).partition("-")[0]
            if server.isdigit() and not psutil.pid_exists(int(server)):
                with suppress(OSError):
                    left.rmdir()


def default_limit_bytes() -> int:
    """Most of what is free now, of the machine or of a container's limit, so that serving is never short of it."""
    ours = read_machine(None).main_bytes - rss_of(process_tree(os.getpid()))
    return int(SHARE_OF_FREE * max(0, min(psutil.virtual_memory().available, ours)))


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
            _write(self.folder / "cgroup.procs", str(pid))

    def is_over(self) -> bool:
        with suppress(OSError):
            lines = (line.split() for line in (self.folder / self.kills).read_text("ascii").splitlines())
            return any(words[0] == "oom_kill" and int(words[1]) > 0 for words in lines if len(words) == 2)
        return False

    def close(self) -> None:
        for _ in range(CLOSE_TRIES):
            try:
                self.folder.rmdir()
            except OSError as error:
                reason = str(error)
                time.sleep(CLOSE_PAUSE_SECONDS)
            else:
                return
        log.warning("control group stays", folder=self.folder.name, reason=reason)


@dataclass(frozen=True)
class Place:
    """Where a group may be made, with the files of its version."""

    folder: Path
    limit: str
    kills: str
    others: tuple[tuple[str, str], ...] = ()  # written too, where there is such a file
    enabling: str = ""

    def group(self, name: str, limit_bytes: int) -> Group:
        """Raises OSError where none can be made."""
        if self.enabling:  # what a group's children may be limited in is its owner's to say
            _write(self.folder / self.enabling, "+memory")
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        try:
            _write(folder / self.limit, str(limit_bytes))
            for file, value in self.others:
                with suppress(OSError):
                    _write(folder / file, value.format(limit_bytes))
            return Group(folder, limit_bytes, self.kills)
        except OSError:
            with suppress(OSError):
                folder.rmdir()
            raise


def _write(file: Path, value: str) -> None:
    """Into a file of the kernel's: one that is not there is not made."""
    with file.open("r+", encoding="ascii") as opened:
        opened.write(value)


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
                    yield Place(above, "memory.max", "memory.events", others, "cgroup.subtree_control")
        elif "memory" in controllers.split(","):
            own = root / "sys/fs/cgroup/memory" / inside
            yield Place(own, "memory.limit_in_bytes", "memory.oom_control", (("memory.memsw.limit_in_bytes", "{}"),))
