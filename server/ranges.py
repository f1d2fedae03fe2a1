"""What part of some bytes a request wants: If-None-Match, Range and If-Range as RFC 9110 has them, for one range.

More than one range, another unit than bytes, and what cannot be read as a range are answered with the whole, as a
server may (section 14.2).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from server.errors import RangeNotSatisfiable

ONE_RANGE = re.compile(r"bytes\s*=\s*(\d{0,20})\s*-\s*(\d{0,20})", re.ASCII | re.IGNORECASE)
OK, PARTIAL, NOT_MODIFIED = 200, 206, 304


@dataclass(frozen=True, slots=True)
class Asked:
    """The status of the answer, and the bytes in it: from `start` up to `end`."""

    status: int
    start: int
    end: int


def asked_part(headers: Mapping[str, str], etag: str, size_bytes: int, *, is_get: bool = True) -> Asked:
    """What to answer with; names of headers are lower-case. Raises RangeNotSatisfiable. Only a GET has ranges."""
    known = headers.get("if-none-match")
    if known is not None and _is_among(known, etag):
        return Asked(NOT_MODIFIED, 0, 0)
    whole = Asked(OK, 0, size_bytes)
    wanted, unchanged = headers.get("range"), headers.get("if-range")
    if not is_get or wanted is None or (unchanged is not None and unchanged.strip() != etag):
        return whole
    found = ONE_RANGE.fullmatch(wanted.strip())
    if found is None or not any(found.groups()):
        return whole
    first, last = found.groups()
    if not first:
        start, end = max(0, size_bytes - int(last)), size_bytes
    else:
        start, end = int(first), min(int(last) + 1, size_bytes) if last else size_bytes
        if last and int(last) < start:
            return whole  # no range at all (section 14.1.1)
    if start >= size_bytes:
        raise RangeNotSatisfiable(
            f"Range {wanted[:60]!r} begins behind the end: there are {size_bytes} bytes.", size_bytes=size_bytes
        )
    return Asked(PARTIAL, start, end)


def _is_among(listed: str, etag: str) -> bool:
    """Weak comparison: what is W/ counts too."""
    return listed.strip() == "*" or etag in [one.strip().removeprefix("W/") for one in listed.split(",")]
