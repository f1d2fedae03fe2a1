"""What an error is on the wire: one table from class to HTTP status and OpenAI type, and one body everywhere.

HotshoeError (the tree in adapters/errors.py), and of the service alone:
├── Unauthenticated     invalid_api_key       no key, or not one of ours
├── Forbidden           forbidden             the caller may not do this: scope, Host or Origin
├── RouteNotFound       route_not_found       no such path
├── MethodNotAllowed    method_not_allowed    the path exists, with other methods
├── HeadersTooLarge     headers_too_large     the headers are over 64 KB
├── EncodingNotAllowed  encoding_not_allowed  a compressed request body
├── JsonInvalid         json_invalid          the body is not one JSON document
├── Unprocessable       unprocessable         the body is JSON, and not what the route takes
├── PayloadTimeout      payload_timeout       the body stopped coming
├── RangeNotSatisfiable range_not_satisfiable the part that is asked for begins behind the end
├── GateNotPassed       gate_not_passed       a version scores less than its adapter's gate wants of a promote
├── RateLimited         rate_limit_exceeded   the key or its tenant has used its minute, or its concurrent requests
└── EngineRefused       (the engine's code)   the engine's own answer, normalised
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from adapters import errors
from adapters.errors import HotshoeError


class Unauthenticated(HotshoeError):
    code = "invalid_api_key"


class Forbidden(HotshoeError):
    code = "forbidden"


class RouteNotFound(HotshoeError):
    code = "route_not_found"


class MethodNotAllowed(HotshoeError):
    code = "method_not_allowed"


class EncodingNotAllowed(HotshoeError):
    code = "encoding_not_allowed"


class HeadersTooLarge(HotshoeError):
    code = "headers_too_large"


class JsonInvalid(HotshoeError):
    code = "json_invalid"


class Unprocessable(HotshoeError):
    code = "unprocessable"


class PayloadTimeout(HotshoeError):
    code = "payload_timeout"


class RangeNotSatisfiable(HotshoeError):
    """A range of something that has `size_bytes`."""

    code = "range_not_satisfiable"

    def __init__(self, message: str, *, size_bytes: int = 0, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.size_bytes = size_bytes


class GateNotPassed(errors.Conflict):
    code = "gate_not_passed"


class RateLimited(HotshoeError):
    code = "rate_limit_exceeded"


INVALID, AUTH, PERMISSION, NOT_FOUND, CONFLICT, LIMIT, SERVER, BUSY = (
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "conflict_error",
    "rate_limit_error",
    "server_error",
    "overloaded_error",
)

# Class -> (HTTP status, OpenAI error type). A class without its own row is a bug; a test says so.
STATUS: dict[type[HotshoeError], tuple[int, str]] = {
    HotshoeError: (500, SERVER),
    errors.InvalidRequest: (400, INVALID),
    errors.NameInvalid: (400, INVALID),
    errors.DigestInvalid: (400, INVALID),
    errors.LengthMismatch: (400, INVALID),
    errors.UnknownParameter: (400, INVALID),
    JsonInvalid: (400, INVALID),
    Unauthenticated: (401, AUTH),
    Forbidden: (403, PERMISSION),
    errors.NotFound: (404, NOT_FOUND),
    errors.ModelNotFound: (404, NOT_FOUND),
    RouteNotFound: (404, NOT_FOUND),
    MethodNotAllowed: (405, INVALID),
    PayloadTimeout: (408, INVALID),
    errors.Conflict: (409, CONFLICT),
    errors.NotServable: (409, CONFLICT),
    GateNotPassed: (409, CONFLICT),
    errors.IdempotencyReused: (409, CONFLICT),
    errors.SourceChanged: (409, CONFLICT),
    errors.AlreadyRunning: (409, CONFLICT),
    errors.LeaseLost: (409, CONFLICT),
    errors.MergeBaseMissing: (409, CONFLICT),
    errors.OutputExists: (409, CONFLICT),
    errors.GenerationMismatch: (412, CONFLICT),
    errors.PayloadTooLarge: (413, INVALID),
    EncodingNotAllowed: (415, INVALID),
    RangeNotSatisfiable: (416, INVALID),
    HeadersTooLarge: (431, INVALID),
    errors.QuotaExceeded: (429, LIMIT),
    RateLimited: (429, LIMIT),
    errors.AdapterRefused: (422, INVALID),
    errors.BaseMismatch: (422, INVALID),
    errors.DataInvalid: (422, INVALID),
    errors.DataBlocked: (422, INVALID),
    errors.ConfigInvalid: (422, INVALID),
    Unprocessable: (422, INVALID),
    errors.BaseInvalid: (500, SERVER),
    errors.TrainingStopped: (500, SERVER),
    errors.MemoryLacking: (500, SERVER),
    errors.ScoreTooLow: (500, SERVER),
    errors.TrainingInterrupted: (500, SERVER),
    errors.MergeFailed: (500, SERVER),
    errors.ParityFailed: (500, SERVER),
    errors.StorageDamaged: (500, SERVER),
    errors.StateNewer: (500, SERVER),
    errors.EngineFailed: (502, SERVER),
    errors.SourceUnavailable: (502, SERVER),
    errors.EngineUnavailable: (503, BUSY),
    errors.EngineBusy: (503, BUSY),
    errors.AdapterLoading: (503, BUSY),
    errors.RegistryBusy: (503, BUSY),
    errors.StorageFull: (507, SERVER),
}
PERMANENT = (  # OpenAI's client would send a 409 and a 429 twice more; these stay as they are
    *(errors.Conflict, GateNotPassed, errors.IdempotencyReused, errors.MergeBaseMissing, errors.OutputExists),
    errors.QuotaExceeded,
)
DEFAULT_RETRY_AFTER_SECONDS = 2.0
TOO_LONG = "context_length_exceeded"
TYPE_OF_STATUS = {401: AUTH, 403: PERMISSION, 404: NOT_FOUND, 409: CONFLICT, 429: LIMIT, 503: BUSY}


@dataclass(frozen=True, slots=True)
class WireError:
    """An error as it leaves: status, body, and the headers that go with it."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]

    def as_json(self) -> bytes:
        return json.dumps(self.body).encode()

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.body["error"]
        return error


def to_wire(error: HotshoeError) -> WireError:
    """The answer that stands for an error of ours."""
    status, kind = STATUS[type(error)]
    body = {**error.as_dict(), "type": kind}
    headers = {}
    retry_after = error.retry_after_seconds
    if retry_after is None and status == 503:
        retry_after = DEFAULT_RETRY_AFTER_SECONDS
    if retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_after)))
    if type(error) in PERMANENT:
        headers["x-should-retry"] = "false"
    if isinstance(error, PayloadTimeout):
        headers["connection"] = "close"  # the rest of the body may still come, and is no request
    if isinstance(error, RangeNotSatisfiable):
        headers["content-range"] = f"bytes */{error.size_bytes}"
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    return WireError(status, {"error": body}, headers)


def unexpected() -> WireError:
    """What a client is told of a bug of ours: nothing but that it happened; the log has the rest."""
    return to_wire(HotshoeError("Something failed inside the server; its log names the request id of this answer."))


def from_engine(status: int, raw: bytes) -> WireError:
    """The engine's error answer in our body: a string code, a type by status, and no echo of the request's content."""
    try:
        found = json.loads(raw)
    except ValueError:
        found = None
    error = found.get("error") if isinstance(found, dict) else None
    error = error if isinstance(error, dict) else {}
    message = str(error.get("message") or f"The engine answered {status}.")
    status = status if 400 <= status < 600 else 500
    return engine_error(status, message, error.get("param"))


def engine_error(status: int, message: str, param: Any = None) -> WireError:
    """One error of the engine, normalised."""
    kind = TYPE_OF_STATUS.get(status, INVALID if status < 500 else SERVER)
    code = "engine_failed" if status >= 500 else _engine_code(status, message)
    message = without_content(message)
    if code == TOO_LONG:
        message += f" ({code})"  # LangChain looks for the code in the words
    body = {
        "code": code,
        "message": message,
        "param": param.removeprefix("body.") if isinstance(param, str) else None,
        "type": kind,
    }
    headers = {"retry-after": str(int(DEFAULT_RETRY_AFTER_SECONDS))} if status == 503 else {}
    return WireError(status, {"error": body}, headers)


def _engine_code(status: int, message: str) -> str:
    if re.search(r"context length|max_model_len|longer than the maximum", message):
        return TOO_LONG
    return {404: "not_found", 422: "unprocessable"}.get(status, "invalid_request")


def without_content(message: str) -> str:
    """The message without the request's values that validators like to quote, and at most 1,000 characters long."""
    for pattern in (r",?\s*'input':.*", r",?\s*input_value=.*", r",?\s*\"input\":.*"):
        message = re.sub(pattern, " ...", message, flags=re.DOTALL)
    message = message.replace("\r", " ").replace("\n", " ")
    return message if len(message) <= 1000 else message[:997] + "..."
