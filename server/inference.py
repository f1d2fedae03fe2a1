"""An inference request's body: read once, checked for what clients may not set, and rewritten for the engine.

What the fields mean is the engine's business; here are only the ones that would reach past it (templates, cache salts,
ids, other people's tensors), and numbers so large that the engine would have to work to refuse them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapters.errors import InvalidRequest, UnknownParameter
from server.errors import JsonInvalid

STREAM_OPTION_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
FORBIDDEN_FIELDS = (
    "chat_template",
    "cache_salt",
    "lora_request",
    "prompt_embeds",
    "kv_transfer_params",
    "priority",
    "request_id",
    "vllm_xargs",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "guided_regex",
    "guided_grammar",
    "previous_input_messages",
)
FORBIDDEN_IN_STRUCTURED_OUTPUTS = ("regex", "grammar", "structural_tag")
# Field -> smallest and largest value. Wide: they keep nonsense out, the engine keeps its own limits.
BOUNDS: Mapping[str, tuple[float, float]] = {
    "n": (1, 128),
    "best_of": (1, 128),
    "max_tokens": (0, 1_000_000),
    "max_completion_tokens": (0, 1_000_000),
    "max_output_tokens": (0, 1_000_000),
    "min_tokens": (0, 1_000_000),
    "top_logprobs": (0, 100),
    "prompt_logprobs": (0, 100),
    "logprobs": (0, 100),
    "temperature": (0, 100),
    "seed": (-(2**63), 2**63 - 1),
    "top_k": (-1, 10_000_000),
    "truncate_prompt_tokens": (-1, 10_000_000),
}
MAX_STOP_STRINGS, MAX_LOGIT_BIAS, MAX_TEMPLATE_KWARGS_BYTES = 64, 1024, 4096
MEDIA_WORDS = ("image", "audio", "video", "file")


@dataclass(frozen=True)
class InferenceRequest:
    """One checked body. `has_usage` says whether the client asked for the usage chunk itself."""

    path: str
    model: str
    body: dict[str, Any]

    @property
    def is_stream(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def has_usage(self) -> bool:
        options = self.body.get("stream_options")
        return isinstance(options, dict) and bool(options.get("include_usage"))

    def for_engine(self, engine_model: str) -> bytes:
        """The bytes the engine gets: the version's engine name, and always the usage chunk."""
        body = {**self.body, "model": engine_model}
        if self.is_stream and self.path in STREAM_OPTION_PATHS:
            body["stream_options"] = {**(self.body.get("stream_options") or {}), "include_usage": True}
        try:
            return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
        except UnicodeEncodeError:
            raise JsonInvalid("The body has half of a surrogate pair (\\ud800 to \\udfff) in a string.") from None
        except ValueError:
            raise JsonInvalid("The body has a number that is not finite.") from None


def read_request(path: str, raw: bytes, base_id: str) -> InferenceRequest:
    """Parse and check a body; raises JsonInvalid, UnknownParameter or InvalidRequest."""
    body = parse_object(raw)
    model = body.get("model", base_id if path in ("/tokenize", "/detokenize") else None)
    if not isinstance(model, str) or not model:
        raise InvalidRequest("model must name the base or an adapter: NAME, NAME@3 or NAME@ALIAS.", param="model")
    check_fields(path, body)
    return InferenceRequest(path, model, body)


def parse_object(raw: bytes) -> dict[str, Any]:
    """One JSON object, with no key twice and no NaN; raises JsonInvalid."""
    try:
        found = json.loads(raw, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RecursionError:
        raise JsonInvalid("The body is nested too deeply.") from None
    except UnicodeDecodeError:
        raise JsonInvalid("The body is not UTF-8.") from None
    except json.JSONDecodeError as error:
        raise JsonInvalid(f"The body is not JSON: {error.msg} at byte {error.pos}.") from None
    except ValueError as error:
        raise JsonInvalid(f"The body is not JSON that is taken here: {error}"[:200]) from None
    if not isinstance(found, dict):
        raise JsonInvalid("The body must be a JSON object.")
    return found


def check_fields(path: str, body: Mapping[str, Any]) -> None:
    """Raises for fields that clients may not set, and for values out of bounds."""
    for name in FORBIDDEN_FIELDS:
        if body.get(name) is not None:
            raise UnknownParameter(f"{name} may not be set by clients of this server.", param=name)
    structured = body.get("structured_outputs")
    if isinstance(structured, dict):
        for name in FORBIDDEN_IN_STRUCTURED_OUTPUTS:
            if structured.get(name) is not None:
                raise UnknownParameter(
                    f"structured_outputs.{name} may not be set: use a JSON schema or a choice.",
                    param=f"structured_outputs.{name}",
                )
    for name, (least, most) in BOUNDS.items():
        _check_bounds(name, body.get(name), least, most)
    _check_sizes(body)
    if path == "/v1/responses":
        _check_stateless(body)
    _check_media(body.get("messages") or body.get("input"))


def _check_bounds(name: str, value: Any, least: float, most: float) -> None:
    if value is None or isinstance(value, bool | str | list | dict):  # of the wrong type: the engine says so
        return
    if not math.isfinite(value) or not least <= value <= most:
        raise InvalidRequest(f"{name} must be between {least} and {most}.", param=name)


def _check_sizes(body: Mapping[str, Any]) -> None:
    stop, bias, kwargs = body.get("stop"), body.get("logit_bias"), body.get("chat_template_kwargs")
    if isinstance(stop, list) and len(stop) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop has {len(stop)} strings; at most {MAX_STOP_STRINGS} are taken.", param="stop")
    if isinstance(bias, dict) and len(bias) > MAX_LOGIT_BIAS:
        raise InvalidRequest(
            f"logit_bias has {len(bias)} tokens; at most {MAX_LOGIT_BIAS} are taken.", param="logit_bias"
        )
    if isinstance(kwargs, dict):
        if "chat_template" in kwargs:
            raise UnknownParameter("chat_template may not be set by clients.", param="chat_template_kwargs")
        if len(json.dumps(kwargs)) > MAX_TEMPLATE_KWARGS_BYTES:
            raise InvalidRequest(
                f"chat_template_kwargs is larger than {MAX_TEMPLATE_KWARGS_BYTES} bytes.", param="chat_template_kwargs"
            )


def _check_stateless(body: Mapping[str, Any]) -> None:
    for name in ("store", "previous_response_id", "background", "conversation"):
        if body.get(name) not in (None, False):
            raise InvalidRequest(
                f"{name} needs stored responses, and this server keeps none: send the whole conversation in `input`.",
                param=name,
            )


def _check_media(messages: Any) -> None:
    """The bases here read text; a media part would have the engine open a URL before it says so."""
    if not isinstance(messages, list):
        return
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            names = [part.get("type"), *part] if isinstance(part, dict) else []
            if any(word in name for name in names if isinstance(name, str) for word in MEDIA_WORDS):
                raise InvalidRequest("Only text parts are taken: the base reads no media.", param="messages")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice in one object.")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON.")
