"""Child processes of the bench: each ends with the bench, and where one fails its last words are told."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

READY_SECONDS = 600.0


@dataclass(frozen=True)
class Process:
    """A running child, what it writes, and when it was started."""

    name: str
    child: subprocess.Popen[bytes]
    log: Path
    begin: float

    def until(self, is_ready: Callable[[], bool]) -> float:
        """Seconds from its start until it is ready; raises RuntimeError with its last words."""
        while time.monotonic() - self.begin < READY_SECONDS:
            if self.child.poll() is not None:
                break
            if is_ready():
                return time.monotonic() - self.begin
            time.sleep(0.1)
        raise RuntimeError(f"{self.name} did not become ready:\n{self.log.read_text(errors='replace')[-2000:]}")


@contextlib.contextmanager
def process(name: str, command: list[str], folder: Path, more: Mapping[str, str]) -> Iterator[Process]:
    """A child with a process group of its own, which is ended with the block."""
    path = folder / f"{name}.log"
    with path.open("wb") as log:
        begin = time.monotonic()
        child = subprocess.Popen(
            lasting(command), stdout=log, stderr=log, env={**os.environ, **more}, start_new_session=True
        )
        try:
            yield Process(name, child, path, begin)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(20)
            with contextlib.suppress(ProcessLookupError):  # whoever of the group is left
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def lasting(command: list[str]) -> list[str]:
    """The command as one that ends with this process, however that ends."""
    return [sys.executable, "-m", "server.engine.lifeline", str(os.getpid()), *command]


def is_up(url: str, socket: Path | None = None) -> bool:
    """The address answers 200, on this Unix socket where one is given."""
    with (
        contextlib.suppress(httpx.TransportError),
        httpx.Client(transport=httpx.HTTPTransport(uds=str(socket) if socket else None), timeout=2) as client,
    ):
        return client.get(url).status_code == 200
    return False
