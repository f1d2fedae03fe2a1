"""The demo's folder, environment and children: commands as a user types them, one server, nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.agent_routing.console import Console, StepFailed

MARKER = "HOTSHOE_DEMO"  # in the environment of every child and of their children, so that they can be found
OWN_FILE = ".made-by-hotshoe-demo"
READY_SECONDS = 240.0
GRACE_SECONDS = 40.0


class Workshop:
    """One run of the demo in its own folder: `HOTSHOE_HOME` lies in it, and the server listens on a free port."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder = folder.resolve()
        self.console = console
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.mark = f"{os.getpid()}-{time.time_ns()}"
        self.env = {
            **{
                key: value
                for key, value in os.environ.items()
                if not key.startswith("HOTSHOE_") or key == "HOTSHOE_CACHE"
            },
            "HOTSHOE_HOME": str(self.folder / "home"),
            "HOTSHOE_URL": self.url,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            MARKER: self.mark,
        }
        self._server: subprocess.Popen[bytes] | None = None

    def clear(self) -> None:
        """Begin with an empty folder; one that the demo did not make is not touched."""
        if self.folder.exists() and any(self.folder.iterdir()):
            if not (self.folder / OWN_FILE).is_file():
                raise StepFailed(f"{self.folder} is not empty and was not made by the demo: name another with --out.")
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / OWN_FILE).write_text("This folder is emptied when the demo runs again.\n")

    def hotshoe(self, *arguments: str | Path) -> None:
        """Run a `hotshoe` command, its output shown; raises StepFailed with the command when it fails."""
        command = self._command(arguments)
        self.console.lines(f"$ hotshoe {' '.join(command[1:])}")
        code = self._run(command, capture=False)[0]
        if code:
            raise StepFailed(f"`hotshoe {' '.join(command[1:])}` ended with exit code {code}.")

    def hotshoe_json(self, *arguments: str | Path) -> Any:
        """Run a `hotshoe` command with --json; returns what it printed, raises StepFailed when it fails."""
        command = [*self._command(arguments), "--json"]
        self.console.lines(f"$ hotshoe {' '.join(command[1:-1])}")
        code, output = self._run(command, capture=True)
        if code:
            raise StepFailed(f"`hotshoe {' '.join(command[1:])}` ended with exit code {code}: {why(output)}")
        return json.loads(output)

    def python(self, script: Path, *arguments: str | Path) -> None:
        """Run a script of its own in this environment's Python; raises StepFailed when it fails."""
        command = [sys.executable, str(script), *map(str, arguments)]
        code, output = self._run(command, capture=True)
        if code:
            raise StepFailed(f"{script.name} ended with exit code {code}: {why(output)}")

    def get(self, path: str) -> Any:
        """GET a JSON document from the server."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as response:  # noqa: S310 - our own loopback URL
            return json.load(response)

    @contextlib.contextmanager
    def server(self) -> Iterator[float]:
        """A running `hotshoe serve`, stopped in the end; gives the seconds until it was ready."""
        begun = time.monotonic()
        command = self._command(("serve", "--port", str(self.port)))
        self.console.lines(f"$ hotshoe {' '.join(command[1:])}  (output in {self.folder / 'serve.log'})")
        with (self.folder / "serve.log").open("wb") as log:
            self._server = subprocess.Popen(
                command, env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            self._wait_ready(self._server)
            yield time.monotonic() - begun
        finally:
            stop(self._server)

    def sweep(self, grace_seconds: float = 10.0) -> list[int]:
        """End every process that carries this run's mark, children of children too; returns those that were left."""
        found = self._marked()
        for number, wait in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, 5.0)):
            left = self._marked()
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)
            deadline = time.monotonic() + wait
            while self._marked() and time.monotonic() < deadline:
                time.sleep(0.1)
        return found

    def _command(self, arguments: tuple[str | Path, ...]) -> list[str]:
        return [str(Path(sys.executable).with_name("hotshoe")), *map(str, arguments)]

    def _run(self, command: list[str], *, capture: bool) -> tuple[int, str]:
        child = subprocess.Popen(
            command,
            env=self.env,
            cwd=self.folder,
            stdout=subprocess.PIPE if capture else None,
            stderr=subprocess.STDOUT if capture and "--json" not in command else None,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = child.communicate()
        finally:
            stop(child)
        return child.returncode, output or ""

    def _wait_ready(self, server: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if server.poll() is not None:
                tail = (self.folder / "serve.log").read_text("utf-8", "replace").strip()[-800:]
                raise StepFailed(f"`hotshoe serve` ended with exit code {server.returncode}: {tail}")
            with (
                contextlib.suppress(OSError, urllib.error.URLError),
                urllib.request.urlopen(  # noqa: S310
                    f"{self.url}/ready", timeout=2
                ),
            ):
                return
            time.sleep(0.25)
        raise StepFailed(f"The server was not ready within {READY_SECONDS:.0f} s; see {self.folder / 'serve.log'}.")

    def _marked(self) -> list[int]:
        needle = f"{MARKER}={self.mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if needle in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found


def why(output: str) -> str:
    """What a failed command said: the message of its JSON error, else the end of its output."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(output)["error"]["message"])
    return output.strip()[-500:]


def stop(child: subprocess.Popen[Any]) -> None:
    """End a child: a polite signal, then, after the grace, one to its whole group that cannot be refused."""
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
