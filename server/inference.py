"""An inference request's body: read once, checked for what clients may not set, and rewritten for the engine.

What the fields mean is the engine's business. Here are their names (fields.py), how large they may be (bounds.py), the
schemas they bring (output_schema.py), and what would have the engine reach past the request: stored state and media.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapters import strict_json
from adapters.errors import InvalidRequest
from server import fields
from server.bounds import check_bounds, check_depth
from server.engine.base import WEIGHT
from server.errors import JsonInvalid
from server.output_schema import check_schemas
from server.session import user_of

STREAM_OPTION_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
NO_MODEL_PATHS = frozenset({"/tokenize", "/detokenize"})
STATELESS = ("store", "previous_response_id", "background", "conversation")
FORMATS = ("text", "json_object", "json_schema")
OWN_TOOLS = (None, "function", "custom")
MEDIA_WORDS = ("image", "audio", "video", "file")


@dataclass(frozen=True)
class InferenceRequest:
    """One checked body, less the fields without effect. `has_usage`: the client asked for the usage chunk itself."""

    path: str
    model: str
    body: dict[str, Any]
    cache_salt: str = ""  # of the tenant: the engine shares cached prefixes among requests of one salt only
    weight: float = 1.0  # of the steps of the engine that its tenant and priority get
    user: str | None = None  # the end user that the body names: keeps a conversation on one version

    @property
    def is_stream(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def has_usage(self) -> bool:
        options = self.body.get("stream_options")
        return isinstance(options, dict) and bool(options.get("include_usage"))

    def for_engine(self, engine_model: str) -> bytes:
        """What the engine gets: the version's engine name, always the usage chunk, the tenant's salt and weight."""
        body = {**self.body, "model": engine_model}
        if self.is_stream and self.path in STREAM_OPTION_PATHS:
            body["stream_options"] = {**(self.body.get("stream_options") or {}), "include_usage": True}
        if self.cache_salt:
            body["cache_salt"] = self.cache_salt
        if self.weight != 1.0:
            body["vllm_xargs"] = {WEIGHT: self.weight}
        return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def read_request(path: str, raw: bytes, base_id: str) -> InferenceRequest:
    """Parse and check a body; raises JsonInvalid, UnknownParameter or InvalidRequest."""
    body = parse_object(raw)
    check_depth(body)
    model = body.get("model", base_id if path in NO_MODEL_PATHS else None)
    if not isinstance(model, str) or not model:
        raise InvalidRequest("model must name the base or an adapter: NAME, NAME@3 or NAME@ALIAS.", param="model")
    if path == "/v1/responses":
        _check_stateless(body)
    fields.check_names(path, body)
    check_bounds(body)
    _check_outputs(body)
    check_schemas(body)
    for name in ("messages", "input", "system"):
        _check_media(name, body.get(name))
    return InferenceRequest(path, model, fields.taken_of(path, body), user=user_of(path, body))


def parse_object(raw: bytes) -> dict[str, Any]:
    """One JSON object, with no key twice, no NaN and no half of a surrogate pair; raises JsonInvalid."""
    try:
        found = strict_json.parse_json(raw)
    except strict_json.JsonInvalid as error:
        raise JsonInvalid(f"The body {error}.") from None
    if not isinstance(found, dict):
        raise JsonInvalid("The body must be a JSON object.")
    return found


def _check_stateless(body: Mapping[str, Any]) -> None:
    for name in STATELESS:
        if body.get(name) not in (None, False):
            raise InvalidRequest(
                f"{name} needs stored responses, and this server keeps none: send the whole conversation in `input`.",
                param=name,
            )


def _check_outputs(body: Mapping[str, Any]) -> None:
    """Of the output formats only those without a grammar of the client's, of the tools only the client's own."""
    wanted, stream = body.get("response_format"), body.get("stream")
    if isinstance(wanted, dict) and wanted.get("type") not in FORMATS:
        raise InvalidRequest(f"response_format.type must be {', '.join(FORMATS)}.", param="response_format")
    if stream not in (None, True, False):
        raise InvalidRequest("stream must be true or false.", param="stream")
    tools = body.get("tools")
    for tool in tools if isinstance(tools, list) else ():
        if isinstance(tool, dict) and tool.get("type") not in OWN_TOOLS:
            raise InvalidRequest("Only function tools are taken: this server runs no tools itself.", param="tools")


def _check_media(name: str, messages: Any) -> None:
    """The bases here read text; a media part would have the engine open a URL before it says so."""
    waiting = list(messages) if isinstance(messages, list) else []
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict):
            continue
        words = [str(part.get("type")), *(word for word, value in part.items() if value is not None)]
        if any(media in word for word in words for media in MEDIA_WORDS):
            raise InvalidRequest("Only text parts are taken: the base reads no media.", param=name)
        for inner in (part.get("content"), part.get("output")):
            waiting += inner if isinstance(inner, list) else []
