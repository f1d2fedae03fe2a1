"""How large the values of a request may be: wide limits that keep nonsense from the engine, which has its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from adapters.errors import InvalidRequest, UnknownParameter

MAX_DEPTH = 64
MAX_TEMPLATE_KWARGS_BYTES = 4096
MAX_PROMPTS, MAX_BIAS, MAX_TOOLS, MAX_STOP_CHARACTERS = 256, 1024, 128, 1024
# Field -> smallest and largest value of a number. A text of digits is not a number: the engine would read it as one.
NUMBERS: Mapping[str, tuple[float, float]] = {
    "n": (1, 128),
    "best_of": (1, 128),
    "max_tokens": (0, 1_000_000),
    "max_completion_tokens": (0, 1_000_000),
    "max_output_tokens": (0, 1_000_000),
    "max_tool_calls": (0, 1_000_000),
    "min_tokens": (0, 1_000_000),
    "thinking_token_budget": (-1, 1_000_000),
    "top_logprobs": (0, 100),
    "prompt_logprobs": (0, 100),
    "logprobs": (0, 100),
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "repetition_penalty": (0, 100),
    "length_penalty": (-100, 100),
    "seed": (-(2**63), 2**63 - 1),
    "top_k": (-1, 10_000_000),
    "truncate_prompt_tokens": (-1, 10_000_000),
    "stream_interval": (1, 1_000_000),
}
SWITCHES = frozenset({"logprobs"})  # numbers on one route, true or false on another
LISTS: Mapping[str, int] = {
    "stop": 64,
    "stop_sequences": 64,
    "bad_words": 128,
    "stop_token_ids": 1024,
    "logprob_token_ids": 128,
    "allowed_token_ids": 262_144,
    "tools": MAX_TOOLS,
    "documents": 128,
    "include": 32,
}


def check_bounds(body: Mapping[str, Any]) -> None:
    """Raises InvalidRequest for a value that no request can need, UnknownParameter for a template among the kwargs."""
    for name, (least, most) in NUMBERS.items():
        if name in body:
            _check_number(name, body[name], least, most)
    for name, most in LISTS.items():
        value = body.get(name)
        if isinstance(value, list) and len(value) > most:
            raise InvalidRequest(f"{name} has {len(value)} entries; at most {most} are taken.", param=name)
    for name in ("stop", "stop_sequences", "bad_words"):
        _check_texts(name, body.get(name))
    _check_bias(body.get("logit_bias"))
    _check_template_kwargs(body.get("chat_template_kwargs"))
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) and len(prompt) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt has {len(prompt)} prompts; at most {MAX_PROMPTS} are taken.", param="prompt")


def check_depth(body: Mapping[str, Any]) -> None:
    """Raises InvalidRequest for lists and objects inside each other beyond what anything in a request needs."""
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise InvalidRequest(f"The body is nested more than {MAX_DEPTH} deep, which is the limit.")


def _check_number(name: str, value: Any, least: float, most: float) -> None:
    if value is None or (name in SWITCHES and isinstance(value, bool)):
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{name} must be a number between {least} and {most}.", param=name)
    if not least <= value <= most:
        raise InvalidRequest(f"{name} must be between {least} and {most}.", param=name)


def _check_texts(name: str, value: Any) -> None:
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and len(text) > MAX_STOP_CHARACTERS:
            raise InvalidRequest(
                f"{name} has a text of {len(text)} characters; at most {MAX_STOP_CHARACTERS} are taken.", param=name
            )


def _check_bias(bias: Any) -> None:
    if not isinstance(bias, dict):
        return
    if len(bias) > MAX_BIAS:
        raise InvalidRequest(f"logit_bias has {len(bias)} tokens; at most {MAX_BIAS} are taken.", param="logit_bias")
    for token, value in bias.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise InvalidRequest("logit_bias must have token ids as keys.", param="logit_bias")
        if not isinstance(value, int | float) or not -100 <= value <= 100:
            raise InvalidRequest("logit_bias must have values between -100 and 100.", param="logit_bias")


def _check_template_kwargs(kwargs: Any) -> None:
    if not isinstance(kwargs, dict):
        return
    for name in ("chat_template", "tokenize", "conversation"):
        if name in kwargs:
            full = f"chat_template_kwargs.{name}"
            raise UnknownParameter(f"{full} may not be set by clients of this server.", param=full)
    size = len(json.dumps(kwargs))
    if size > MAX_TEMPLATE_KWARGS_BYTES:
        raise InvalidRequest(
            f"chat_template_kwargs has {size} bytes; at most {MAX_TEMPLATE_KWARGS_BYTES} are taken.",
            param="chat_template_kwargs",
        )
