"""Whose clients read a path's answers: OpenAI's, and under /v1/messages Anthropic's, each with its error body."""

from __future__ import annotations

import json
from typing import Any

from server.errors import WireError

MESSAGES = "/v1/messages"
INVALID = "invalid_request_error"
# HTTP status -> Anthropic's error type; any other 4xx is an invalid request, any other 5xx their api_error.
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def is_anthropic(path: str) -> bool:
    return path == MESSAGES or path.startswith(MESSAGES + "/")


def error_body(path: str, error: WireError) -> dict[str, Any]:
    """The error as the path's clients read it."""
    if not is_anthropic(path):
        return error.body
    kind = ANTHROPIC_TYPES.get(error.status, INVALID if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.error["message"]}}


def error_bytes(path: str, error: WireError) -> bytes:
    return json.dumps(error_body(path, error)).encode()


def request_id_headers(path: str, request_id: str) -> list[tuple[bytes, bytes]]:
    """Under which header names the clients look for the request's id."""
    names = (b"x-request-id", b"request-id") if is_anthropic(path) else (b"x-request-id",)
    return [(name, request_id.encode()) for name in names]
