"""How commands speak to a server: `HOTSHOE_URL`, `HOTSHOE_API_KEY`, and the server's errors as ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from adapters.errors import AdapterRefused, EngineUnavailable, HotshoeError, Problem

if TYPE_CHECKING:
    import httpx

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_SECONDS = 60.0


class ServerRefused(HotshoeError):
    """The server's own answer to a command: its code and message."""

    def __init__(self, status: int, error: dict[str, Any]) -> None:
        super().__init__(str(error.get("message") or f"The server answered {status}."), param=error.get("param"))
        self.status = status
        self.server_code = str(error.get("code") or "internal_error")

    @property
    def wire_code(self) -> str:
        return self.server_code


class Unreachable(EngineUnavailable):
    """No server answers at the URL."""

    code = "unreachable"


class Client:
    """One connection to a server's own routes."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def get(self, path: str, **options: Any) -> Any:
        return self.call("GET", path, **options)

    def post(self, path: str, **options: Any) -> Any:
        return self.call("POST", path, **options)

    def call(self, method: str, path: str, **options: Any) -> Any:
        """The answer's JSON; raises what the server refused as our errors, Unreachable when nobody answers."""
        import httpx

        try:
            response = self.http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise unreachable(self.http, error) from error
        if response.is_error:
            raise error_of(response.status_code, response.content)
        return response.json()


@contextmanager
def open_client(timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[Client]:
    """A client for `HOTSHOE_URL`, with `HOTSHOE_API_KEY` when there is one."""
    import httpx

    with httpx.Client(base_url=server_url(), headers=auth_headers(), timeout=timeout_seconds) as http:
        yield Client(http)


def server_url() -> str:
    """The server's address without a path: `HOTSHOE_URL` may end in /v1 or not."""
    return (os.environ.get("HOTSHOE_URL") or DEFAULT_URL).rstrip("/").removesuffix("/v1")


def auth_headers() -> dict[str, str]:
    key = os.environ.get("HOTSHOE_API_KEY")
    return {"authorization": f"Bearer {key}"} if key else {}


def unreachable(http: httpx.Client, error: Exception) -> Unreachable:
    reason = str(error) or type(error).__name__
    return Unreachable(f"No answer from {http.base_url}: {reason}. Start `hotshoe serve`, or set HOTSHOE_URL.")


def error_of(status: int, content: bytes) -> HotshoeError:
    """The server's error body as an error that the command line knows an exit code for."""
    import json

    try:
        error = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        error = {}
    message = str(error.get("message") or f"The server answered {status}.")
    problems = tuple(
        Problem(str(row["code"]), str(row["path"]), str(row["message"]), str(row.get("advice", "")))
        for row in error.get("problems", ())
    )
    if problems and status == 422:
        return AdapterRefused(message, param=error.get("param"), problems=problems)
    if status == 503:
        return EngineUnavailable(message)
    return ServerRefused(status, error)
