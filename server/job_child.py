"""The process that trains one job: started niced and without secrets, followed line by line, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 1 << 20
LAST_WORDS = 4000  # letters of what it complained
KEPT_VARIABLES = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH"),
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HOTSHOE_CACHE", "XDG_CACHE_HOME"),
)


class JobChild:
    """`python -m training.job SPEC` in a process group of its own; it ends when our end of its stdin closes."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, names: Mapping[str, str]) -> None:
        self.process = process
        self.log = log
        self.names = names

    @classmethod
    async def start(cls, spec: Mapping[str, Any], folder: Path, names: Mapping[str, str]) -> JobChild:
        """`folder` gets the spec and the log of what the process complains.

        `names` are for paths of ours: what the process tells has them instead.
        """
        path, log = folder / "spec.json", folder / "worker.log"
        await asyncio.to_thread(path.write_text, json.dumps(spec), "utf-8")
        with log.open("ab") as complaints:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "training.job", str(path)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=complaints,
                env=environment(),
                start_new_session=True,
                limit=MAX_LINE_BYTES,
            )
        return cls(process, log, names)

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        """What it tells, until it ends; a line that is none of its own is skipped."""
        if self.process.stdout is None:
            raise RuntimeError("the child was started without pipes")
        async for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                message = json.loads(self._renamed(line.decode()))
                if isinstance(message, dict) and isinstance(message.get("kind"), str):
                    yield message

    def _renamed(self, text: str) -> str:
        for path, name in self.names.items():
            text = text.replace(path, name)
        return text

    async def end(self, *, grace_seconds: float = 0.0) -> None:
        """SIGTERM, after which it saves its step, and SIGKILL when the grace is over; returns when it is gone."""
        if grace_seconds:
            self._send(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), grace_seconds)
        self._send(signal.SIGKILL)
        await self.process.wait()

    def last_words(self) -> str:
        """The end of what it complained."""
        with contextlib.suppress(OSError):
            return self.log.read_bytes()[-LAST_WORDS:].decode(errors="replace").strip()
        return ""

    def _send(self, number: signal.Signals) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)


def environment() -> dict[str, str]:
    """What training needs of ours, and no key or secret; no hub is asked for anything."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    return {**kept, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONUNBUFFERED": "1"}
