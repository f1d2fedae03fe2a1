"""A `hotshoe serve` of the bench's own: state in a temporary folder, stopped at the end whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import httpx

from bench.client import Target


@dataclass(frozen=True)
class Served:
    """A running server: its gateway, its engine's own socket, and how long it took to be ready."""

    gateway: Target
    engine: Target
    ready_seconds: float
    log: Path  # what the server writes, both of its streams
    pid: int

    def system(self) -> dict[str, object]:
        body: dict[str, object] = httpx.get(f"{self.gateway.url}/v1/system", timeout=10).json()
        return body

    def start_phases(self) -> dict[str, float]:
        """Where the seconds of the engine's start went, in order."""
        engine = self.system()["engine"]
        assert isinstance(engine, dict)
        return {str(name): float(seconds) for name, seconds in engine["start_phases_seconds"].items()}

    def base_id(self) -> str:
        return str(httpx.get(f"{self.gateway.url}/v1/models", timeout=10).json()["data"][0]["id"])


def publish(
    gateway_url: str, name: str, files: Mapping[str, Path], headers: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Upload an adapter whose parts are these files, and wait until it is ready; raises RuntimeError if it is not."""
    url, parts = f"{gateway_url}/v1/adapters", {part: path.read_bytes() for part, path in files.items()}
    answer = httpx.post(url, data={"name": name}, files=parts, params={"wait": 120}, headers=headers, timeout=300)
    if answer.status_code != 201 or answer.json()["status"] != "ready":
        raise RuntimeError(f"{name} was not published: {answer.status_code} {answer.text[:500]}")


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serve(
    *flags: str,
    timeout_seconds: float = 300,
    home: Path | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Served]:
    """Start `hotshoe serve` with these flags and wait for /ready; its state goes afterwards, unless `home` is given."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        port = free_port()
        state = home or Path(folder) / "home"
        variables = {**os.environ, "HOTSHOE_HOME": str(state), "TMPDIR": folder, **environment}
        variables.pop("HOTSHOE_API_KEY", None)
        hotshoe = str(Path(sys.executable).with_name("hotshoe"))
        command = [hotshoe, "serve", "--port", str(port), *flags]
        with (Path(folder) / "server.log").open("w") as log:
            started = time.monotonic()
            server = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)
            try:
                url = f"http://127.0.0.1:{port}"
                wait_ready(server, url, started + timeout_seconds, Path(log.name))
                ready_seconds = time.monotonic() - started
                engine_socket = next(path for place in (state, Path(folder)) for path in place.rglob("engine.sock"))
                yield Served(
                    Target("gateway", url),
                    Target("engine", "http://engine", engine_socket),
                    ready_seconds,
                    Path(log.name),
                    server.pid,
                )
            finally:
                server.send_signal(signal.SIGTERM)
                try:
                    server.wait(60)
                except subprocess.TimeoutExpired:
                    server.kill()
                    server.wait()


def wait_ready(server: subprocess.Popen[bytes], url: str, deadline: float, log: Path) -> None:
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"hotshoe serve ended with {server.returncode}:\n{log.read_text()[-2000:]}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready", timeout=2).status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"not ready in time:\n{log.read_text()[-2000:]}")
