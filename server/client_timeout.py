"""How long a request's client waits for the first byte of its answer, where it says so.

`x-hotshoe-timeout` in seconds is ours. Without it OpenAI's and Anthropic's clients are believed: they send the read
timeout that they use, as `x-stainless-read-timeout` (Python) or `x-stainless-timeout` (others), in seconds too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from adapters.errors import InvalidRequest

HEADER = "x-hotshoe-timeout"
SDK_HEADERS = ("x-stainless-read-timeout", "x-stainless-timeout")
MAX_SECONDS = 86_400.0


def timeout_of(headers: Iterable[tuple[bytes, bytes]]) -> float | None:
    """Seconds, or None where nothing is said. Raises InvalidRequest for our header only: a client library's may be
    anything that its own settings are."""
    named: dict[str, list[bytes]] = {}
    for name, value in headers:
        named.setdefault(name.decode("latin-1"), []).append(value)
    ours = named.get(HEADER, [])
    if ours:
        seconds = _seconds(ours[0]) if len(ours) == 1 else None
        if seconds is None:
            raise InvalidRequest(
                f"{HEADER} must be one number of seconds above 0 and at most {MAX_SECONDS:g}, or be left out.",
                param=HEADER,
            )
        return seconds
    for theirs in SDK_HEADERS:
        if (seconds := _seconds(named.get(theirs, [b""])[0])) is not None:
            return seconds
    return None


def _seconds(raw: bytes) -> float | None:
    try:
        seconds = float(raw)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and 0 < seconds <= MAX_SECONDS else None
