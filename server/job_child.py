"""The process that trains one job: started without secrets, followed line by line, ended by signals to its group."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.jobs import Order

MAX_LINE_BYTES = 8 << 20
LAST_WORDS = 4000  # letters of what it complained
SILENT_SECONDS = 3600.0  # a process that says nothing for so long hangs: a step takes less
KEPT_VARIABLES = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH"),
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HOTSHOE_CACHE", "XDG_CACHE_HOME"),
)


class JobChild:
    """`python -m training.jobs SPEC` in a process group of its own; it ends when our end of its stdin closes."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, names: Mapping[str, str]) -> None:
        self.process = process
        self.log = log
        self.names = names
        self._was_asked = False

    @classmethod
    async def start(
        cls, order: Order, names: Mapping[str, str], variables: Mapping[str, str] | None = None
    ) -> JobChild:
        """The order's folder gets the order and the log of what the process complains.

        `names` are for paths of ours: what the process tells has them instead. `variables` are of this job alone.
        """
        path, log = Path(order.folder) / "spec.json", Path(order.folder) / "worker.log"
        await asyncio.to_thread(path.write_text, order.text(), "utf-8")
        with log.open("ab") as complaints:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "training.jobs", str(path)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=complaints,
                env={**environment(), **(variables or {})},
                start_new_session=True,
                limit=MAX_LINE_BYTES,
            )
        return cls(process, log, names)

    @property
    def is_there(self) -> bool:
        return self.process.returncode is None

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        """What it tells, until it ends; other lines are skipped. Raises TimeoutError when it hangs."""
        if self.process.stdout is None:
            raise RuntimeError("the child was started without pipes")
        while True:
            async with asyncio.timeout(SILENT_SECONDS):
                line = await self._line(self.process.stdout)
            if not line:
                return
            with contextlib.suppress(ValueError):
                message = json.loads(renamed(line.decode(), self.names))
                if isinstance(message, dict) and isinstance(message.get("kind"), str):
                    yield message

    async def _line(self, output: asyncio.StreamReader) -> bytes:
        """The next line; of one that is too long what fits."""
        try:
            return await output.readline()
        except ValueError:  # longer than the limit, and dropped
            return b"\n"

    def terminate(self) -> None:
        """SIGTERM: it saves its step and ends. A second one would end it while it saves, and is not sent."""
        if not self._was_asked:
            self._was_asked = True
            self._send(signal.SIGTERM)

    def end(self) -> None:
        """SIGKILL to all of its group."""
        self._send(signal.SIGKILL)

    async def gone(self) -> None:
        """SIGKILL to all of its group; returns when it is gone. Nobody may read its messages any more."""
        self.end()
        if self.process.stdout is not None:
            with contextlib.suppress(ValueError):
                await self.process.stdout.read()  # a pipe that is full would keep it from being waited for
        await self.process.wait()

    def last_words(self) -> str:
        """The end of what it complained."""
        with contextlib.suppress(OSError):
            return self.log.read_bytes()[-LAST_WORDS:].decode(errors="replace").strip()
        return ""

    def _send(self, number: signal.Signals) -> None:
        if self.is_there:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)


def renamed(text: str, names: Mapping[str, str]) -> str:
    """A text with names instead of paths; longer paths first, since one may begin with another."""
    for path in sorted(names, key=len, reverse=True):
        text = text.replace(path, names[path])
    return text


def environment() -> dict[str, str]:
    """What training needs of ours, and no key or secret; no hub is asked for anything.

    It gets half of the cores: with a thread on each, those that wait for one another would wait for serving.
    """
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2))}
    return {**threads, **kept, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONUNBUFFERED": "1"}
