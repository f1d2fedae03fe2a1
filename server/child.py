"""A process of ours that works for the server: started without secrets, followed line by line, ended by signals to its
group. It ends by itself when our end of its stdin closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.tasks import at_most

MAX_LINE_BYTES = 64 << 20  # the report of a large model is one line
LAST_WORDS = 4000  # letters of what it complained
SILENT_SECONDS = 3600.0  # a process that says nothing for so long hangs: a step takes less
LEAVE_SECONDS = 5.0  # to go after SIGTERM
KEPT_VARIABLES = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH"),
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HOTSHOE_CACHE", "XDG_CACHE_HOME"),
)


@dataclass(frozen=True, slots=True)
class Program:
    """`python -m MODULE SPEC`, its complaints appended to `log`.

    `kind` is the field that every message of it has. `names` are for paths of ours: what it tells has them instead.
    `variables` are for this process alone.
    """

    module: str
    spec: Path
    log: Path
    kind: str
    names: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)


class Child:
    """A program that runs, in a process group of its own."""

    def __init__(self, process: asyncio.subprocess.Process, program: Program) -> None:
        self.process = process
        self.program = program
        self._was_asked = False

    @classmethod
    async def start(cls, program: Program) -> Child:
        """Start it; it tells what it does on its stdout, one JSON object a line."""
        with program.log.open("ab") as complaints:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", program.module, str(program.spec)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=complaints,
                env={**environment(), **program.variables},
                start_new_session=True,
                limit=MAX_LINE_BYTES,
            )
        return cls(process, program)

    @property
    def is_there(self) -> bool:
        return self.process.returncode is None

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        """What it tells, until it ends; other lines are skipped. Raises TimeoutError when it hangs."""
        if self.process.stdout is None:
            raise RuntimeError("the child was started without pipes")
        while True:
            async with asyncio.timeout(SILENT_SECONDS):
                line = await _line(self.process.stdout)
            if not line:
                return
            with contextlib.suppress(ValueError):
                message = json.loads(renamed(line.decode(), self.program.names))
                if isinstance(message, dict) and isinstance(message.get(self.program.kind), str):
                    yield message

    def terminate(self) -> None:
        """SIGTERM: it ends in order. A second one would disturb that, and is not sent."""
        if not self._was_asked:
            self._was_asked = True
            self._send(signal.SIGTERM)

    def end(self) -> None:
        """SIGKILL to all of its group, which may outlive it: what it started holds a model in memory."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    async def gone(self) -> None:
        """SIGKILL to all of its group; returns when it is gone. Nobody may read its messages any more."""
        self.end()
        if self.process.stdout is not None:
            with contextlib.suppress(ValueError):
                await self.process.stdout.read()  # a pipe that is full would keep it from being waited for
        await self.process.wait()

    async def leave(self) -> None:
        """SIGTERM, and SIGKILL where it does not go; returns when it is gone. Its messages may be read meanwhile."""
        self.terminate()
        await at_most(LEAVE_SECONDS, self.process.wait())
        self.end()
        await at_most(LEAVE_SECONDS, self.process.wait())

    def last_words(self) -> str:
        """The end of what it complained."""
        with contextlib.suppress(OSError):
            return self.program.log.read_bytes()[-LAST_WORDS:].decode(errors="replace").strip()
        return ""

    def _send(self, number: signal.Signals) -> None:
        if self.is_there:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)


async def end_group(process: asyncio.subprocess.Process) -> None:
    """SIGTERM to a process and its own children, SIGKILL when they do not go; returns when it is gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        await at_most(LEAVE_SECONDS, process.wait())


async def _line(output: asyncio.StreamReader) -> bytes:
    """The next line; of one that is too long what fits."""
    try:
        return await output.readline()
    except ValueError:  # longer than the limit, and dropped
        return b"\n"


def renamed(text: str, names: Mapping[str, str]) -> str:
    """A text with names instead of paths; longer paths first, since one may begin with another."""
    for path in sorted(names, key=len, reverse=True):
        text = text.replace(path, names[path])
    return text


def environment() -> dict[str, str]:
    """What our programs need of ours, and no key or secret; no hub is asked for anything.

    They get half of the cores: with a thread on each, those that wait for one another would wait for serving.
    """
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2))}
    return {**threads, **kept, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONUNBUFFERED": "1"}
