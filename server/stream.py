"""Server-sent events as bytes: split at event boundaries, looked into only where usage or an error may be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from server.dialect import error_bytes, is_anthropic
from server.errors import WireError, engine_error

BOUNDARY = b"\n\n"
DONE = b"data: [DONE]\n\n"
MAX_EVENT_BYTES = 16 * 1024 * 1024
LAST_EVENTS = tuple(
    f"event: {name}\n".encode()
    for name in ("message_stop", "response.completed", "response.incomplete", "response.failed")
)


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def read(cls, found: Any) -> Usage | None:
        """From OpenAI's or Anthropic's field names; None when there is no such object."""
        if not isinstance(found, dict):
            return None
        prompt = found.get("prompt_tokens", found.get("input_tokens"))
        completion = found.get("completion_tokens", found.get("output_tokens"))
        if not isinstance(prompt, int):
            return None
        return cls(prompt, completion if isinstance(completion, int) else 0)


class EventReader:
    """What passes through one stream: keeps the bytes, notes usage, error and end, drops what was not asked for."""

    def __init__(self, path: str, keeps_usage: bool) -> None:
        self.path = path
        self.keeps_usage = keeps_usage
        self.usage: Usage | None = None
        self.error: dict[str, Any] | None = None
        self.events = 0
        self.is_ended = False
        self._rest = b""

    def feed(self, chunk: bytes) -> bytes:
        """The bytes that may go on to the client now: whole events only."""
        data = self._rest + chunk if self._rest else chunk
        if data.endswith(BOUNDARY) and data.find(BOUNDARY) == len(data) - 2:
            self._rest = b""
            return self._pass(data)
        *events, self._rest = data.split(BOUNDARY)
        if len(self._rest) > MAX_EVENT_BYTES:
            raise ValueError("An event of the engine's stream is too large.")
        return b"".join(self._pass(event + BOUNDARY) for event in events)

    def closing(self, failure: WireError | None) -> bytes:
        """What ends the stream when the engine did not: an error event, and `[DONE]` where that is the form."""
        if self.is_ended:
            return b""
        body = b"" if failure is None or self.error is not None else error_event(self.path, failure)
        return body + (DONE if ends_with_done(self.path) else b"")

    def _pass(self, event: bytes) -> bytes:
        self.events += 1
        if event == DONE:
            self.events -= 1
            self.is_ended = True
            return event
        if event.startswith(LAST_EVENTS):
            self.is_ended = True
        if b'"error"' in event:
            return self._pass_error(event)
        return self._pass_usage(event) if b'"usage"' in event else event

    def _pass_usage(self, event: bytes) -> bytes:
        found = data_of(event)
        usage = Usage.read(found.get("usage"))
        for wrapper in ("message", "response"):
            if isinstance(found.get(wrapper), dict):
                usage = usage or Usage.read(found[wrapper].get("usage"))
        if usage is not None:
            self.usage = usage
        elif self.usage is not None and isinstance(found.get("usage"), dict):  # Anthropic's last event: output only
            self.usage = Usage(self.usage.prompt_tokens, int(found["usage"].get("output_tokens") or 0))
        if found.get("choices") == [] and usage is not None:
            self.events -= 1
            return event if self.keeps_usage else b""
        return event

    def _pass_error(self, event: bytes) -> bytes:
        found = data_of(event).get("error")
        if not isinstance(found, dict):  # an ordinary event with a field of that name, null for example
            return self._pass_usage(event) if b'"usage"' in event else event
        code = found.get("code")
        status = code if isinstance(code, int) and 400 <= code < 600 else 500
        failure = engine_error(status, str(found.get("message") or "The engine failed."), found.get("param"))
        self.error = failure.error
        self.events -= 1
        return error_event(self.path, failure)


def data_of(event: bytes) -> dict[str, Any]:
    """The JSON object in an event's data lines; empty when there is none."""
    lines = [line[5:].lstrip() for line in event.split(b"\n") if line.startswith(b"data:")]
    try:
        found = json.loads(b"\n".join(lines))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def error_event(path: str, failure: WireError) -> bytes:
    """An error in the middle of a stream, in the form that the route's clients read."""
    if is_anthropic(path):
        return b"event: error\ndata: " + error_bytes(path, failure) + BOUNDARY
    if path == "/v1/responses":
        flat = {"type": "error", "code": failure.error["code"], "message": failure.error["message"], **failure.body}
        return b"event: error\ndata: " + json.dumps({**flat, "sequence_number": 0}).encode() + BOUNDARY
    return b"data: " + failure.as_json() + BOUNDARY


def ends_with_done(path: str) -> bool:
    return path in ("/v1/chat/completions", "/v1/completions")
