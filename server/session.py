"""Which of an alias's two versions a request gets: the same for all of a conversation, else as chance has it.

What names a conversation is the header `x-hotshoe-session`, or else the request's `user` (Anthropic's
`metadata.user_id`). Its place between 0 and 1 is a hash under the server's pepper, so it is the same after a restart,
nobody outside can choose it, and a larger share only adds conversations to the candidate's.
"""

from __future__ import annotations

import hashlib
import hmac
import random
from collections.abc import Iterable, Mapping
from typing import Any

from adapters.errors import InvalidRequest
from adapters.types import AdapterVersion, Split
from server.dialect import is_anthropic

HEADER = "x-hotshoe-session"
MAX_SESSION_BYTES = 512
PURPOSE = "place in an alias's split"


def session_of(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The session that the header names, None without it; raises InvalidRequest for two, or one that is too long."""
    found = [value for name, value in headers if name == HEADER.encode()]
    if len(found) > 1:
        raise InvalidRequest(f"The request has {len(found)} {HEADER} headers; send one.", param=HEADER)
    if found and len(found[0]) > MAX_SESSION_BYTES:
        raise InvalidRequest(
            f"{HEADER} has {len(found[0])} bytes; at most {MAX_SESSION_BYTES} are taken: send an id.", param=HEADER
        )
    return found[0].decode("utf-8", "surrogateescape") or None if found else None


def user_of(path: str, body: Mapping[str, Any]) -> str | None:
    """The end user that a checked body names."""
    if is_anthropic(path):
        metadata = body.get("metadata")
        user = metadata.get("user_id") if isinstance(metadata, dict) else None
    else:
        user = body.get("user")
    return user if isinstance(user, str) and user else None


def chosen(split: Split, tenant: str, session: str | None, pepper: bytes) -> AdapterVersion:
    """The version that a request of the tenant's gets; `split` has a candidate that may answer."""
    if split.candidate is None:
        return split.version
    place = random.random() if session is None else place_of(split, tenant, session, pepper)  # noqa: S311 - no secret
    return split.candidate if place < split.share else split.version


def place_of(split: Split, tenant: str, session: str, pepper: bytes) -> float:
    """Where the conversation lies, from 0 up to 1: one place for tenant, adapter, alias and session."""
    version = split.version
    parts = (PURPOSE, tenant, version.tenant, version.name, split.alias or "", session)
    digest = hmac.new(pepper, "\0".join(parts).encode("utf-8", "surrogateescape"), hashlib.sha256).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
