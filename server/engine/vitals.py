"""How an engine's life is judged: what the kernel tells of its processes, and what follows from two looks a second."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import psutil

CORE_TITLES = ("::EngineCore", "::Worker")  # in the titles that vLLM gives the processes it cannot live without
LONGEST_LOOK_SECONDS = 3.0  # what one look counts at most: our own process may have been stopped, or the machine
UNREADY_SECONDS = 4.0  # without an answer of the health route
STOPPED_SECONDS = 30.0  # nobody went on with it
HANG_SECONDS = 120.0  # without an answer of the health route; or of the core, while it does nothing
BUSY_HANG_SECONDS = 1800.0  # without an answer of the core while it computes: one step of a large base can take minutes
DEAD = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
IDLE_SHARE = 0.01  # of one CPU: a process that waits for a lock uses less, a starved one more


@dataclass(frozen=True, slots=True)
class Vitals:
    """What the kernel says of an engine's processes at one moment."""

    gone: str | None = None  # one that the engine cannot live without
    stopped: str | None = None  # one that was stopped by a signal and has not gone on
    core_cpu_seconds: float = 0.0  # of everything below the API process, since its start


class Processes:
    """The processes of an engine that has started: its leader and all below it. Found once: that reads all of /proc."""

    def __init__(self, leader_pid: int) -> None:
        self._all: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error, OSError):  # it died just now, which its parent is told in another way
            leader = psutil.Process(leader_pid)
            self._all = [leader, *leader.children(recursive=True)]
        self._cores = {process.pid for process in self._all[1:] if is_core(process)}

    def look(self) -> Vitals:
        """A few small reads from /proc."""
        gone, stopped, seconds = None, None, 0.0
        for place, process in enumerate(self._all):
            try:
                with process.oneshot():
                    status, times = process.status(), process.cpu_times()
            except psutil.NoSuchProcess:
                status, times = psutil.STATUS_DEAD, None
            except (psutil.Error, OSError):  # nothing is known of it, as when no file can be opened
                continue
            if status in DEAD and process.pid in self._cores:
                gone = f"process {process.pid}"
            if status == psutil.STATUS_STOPPED:
                stopped = f"process {process.pid}"
            if times is not None and place > 0:
                seconds += times.user + times.system
        return Vitals(gone, stopped, seconds)


def is_core(process: psutil.Process) -> bool:
    """It is one of those without which vLLM is dead, by its title."""
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return any(part in title for part in CORE_TITLES)


class Watch:
    """Whether an engine is ready, and why it has to be replaced. Pure: it is told what was seen, and when.

    An engine that is slow is left alone. What is counted against it is certain (a process is gone, or was stopped and
    nobody goes on with it) or cannot be slowness: an event loop that has not turned for two minutes, a core that
    neither answered nor computed for as long. One that computes has half an hour for a step.
    """

    def __init__(self, now: float) -> None:
        self.is_ready = True
        self._looked_at = now
        self._unanswered = self._stopped = self._silent = 0.0  # seconds
        self._core_cpu_seconds: float | None = None  # as of the core's last answer

    def core_answered(self) -> None:
        """A call that goes through the core came back."""
        self._silent = 0.0
        self._core_cpu_seconds = None

    def look(self, now: float, vitals: Vitals, health: int | None) -> str | None:
        """Take in one look, with the health route's status (None: no answer); says why the engine must be replaced."""
        seconds = min(now - self._looked_at, LONGEST_LOOK_SECONDS)
        self._looked_at = now
        self._unanswered = self._unanswered + seconds if health is None else 0.0
        self._stopped = self._stopped + seconds if vitals.stopped else 0.0
        self._silent += seconds
        if self._core_cpu_seconds is None:
            self._core_cpu_seconds = vitals.core_cpu_seconds
        reason = self._reason(vitals, health)
        is_answering = health == 200 or (health is None and self._unanswered < UNREADY_SECONDS)
        self.is_ready = reason is None and vitals.stopped is None and is_answering
        return reason

    def _reason(self, vitals: Vitals, health: int | None) -> str | None:
        if vitals.gone or health == 503:
            return f"its core is dead{f' ({vitals.gone})' if vitals.gone else ''}"
        if self._stopped > STOPPED_SECONDS:
            return f"{vitals.stopped} was stopped and did not go on for {STOPPED_SECONDS:g} s"
        if self._unanswered > HANG_SECONDS:
            return f"no answer for {HANG_SECONDS:g} s"
        used = vitals.core_cpu_seconds - (self._core_cpu_seconds or 0.0)
        if self._silent > HANG_SECONDS and used < IDLE_SHARE * self._silent:
            return f"its core did not answer for {HANG_SECONDS:g} s and did nothing"
        if self._silent > BUSY_HANG_SECONDS:
            return f"its core did not answer for {BUSY_HANG_SECONDS:g} s"
        return None
