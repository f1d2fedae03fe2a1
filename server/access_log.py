"""One line of JSON for each request that ended: who, what and how long, and nothing of what was said.

Every field is the server's own word, or a name that the registry holds: no path, query, header or body as a client sent
it, and never a key, only its id. JSON escapes control characters, so that no value starts a line or moves a terminal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from adapters.errors import ConfigInvalid
from server.lines import LineWriter, OpenFile

STDERR, NONE = "stderr", "none"
FIELDS = (
    "request_id",
    "client",
    "tenant",
    "key",
    "method",
    "route",
    "status",
    "outcome",
    "model",
    "prompt_tokens",
    "completion_tokens",
    "queue_seconds",
    "first_token_seconds",
    "seconds",
    "request_bytes",
    "response_bytes",
)
CLOSE_SECONDS = 1.0

log = structlog.get_logger("hotshoe.access")


class AccessLog:
    """Where the lines go: among the server's own on standard error, to a file, or nowhere."""

    def __init__(self, where: str, on_lost: Callable[[], object]) -> None:
        """Raises ConfigInvalid for a file that cannot be written."""
        self._where = where
        self._writer: LineWriter | None = None
        if where in (STDERR, NONE):
            return
        try:
            self._file = OpenFile(Path(where))
        except OSError as error:
            raise ConfigInvalid(
                f"access_log {where} cannot be written ({error.strerror}): give a file in a folder that is there and "
                "writable, `stderr` or `none`.",
                param="access_log",
            ) from error
        self._writer = LineWriter(self._file, on_lost)

    def write(self, record: Mapping[str, Any]) -> None:
        """Have one request's line written; never waits."""
        if self._writer is not None:
            head = {"event": "request", "timestamp": datetime.now(UTC).isoformat().replace("+00:00", "Z")}
            self._writer.write(json.dumps({**head, **record}))
        elif self._where == STDERR:
            log.info("request", **record)

    def close(self) -> None:
        """Write what waits; may be called twice."""
        if self._writer is not None:
            self._writer.close(CLOSE_SECONDS)
