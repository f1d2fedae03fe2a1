"""What a version is served with: its defaults read and checked at upload, and put into a request that leaves them out.

The defaults are a request's own fields within a request's bounds, and no value that the engine would refuse in every
request: nobody could then use the version without knowing why.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from adapters import strict_json
from adapters.errors import AdapterRefused, InvalidRequest, NotServable, Problem
from adapters.serving import SERVING_FILE, TEMPLATE_KWARGS, THINKING
from adapters.types import AdapterVersion
from server.bounds import NUMBERS, check_bounds, check_depth
from server.fields import FIELDS, names, shown

MAX_SERVING_BYTES = 16 * 1024
SAMPLING = names(
    "frequency_penalty max_tokens min_p presence_penalty repetition_penalty temperature top_k top_p"
)  # each with its bounds in NUMBERS
TAKEN = SAMPLING | {"stop", TEMPLATE_KWARGS}
WHOLE = names("max_tokens top_k")
ABOVE_ZERO = names("max_tokens repetition_penalty top_p")
# What a field is called on a route, where it has another name there; and what else in a request stands for it.
OTHER_NAMES: Mapping[str, Mapping[str, str]] = {
    "/v1/responses": {"max_tokens": "max_output_tokens"},
    "/v1/messages": {"stop": "stop_sequences"},
}
SAME_AS = {"max_tokens": "max_completion_tokens"}
# The field of a route by which a client says whether to think: then no default says it.
THINKING_FIELDS = {
    "/v1/chat/completions": "reasoning_effort",
    "/v1/responses": "reasoning",
    "/v1/messages": "thinking",
}
TEMPLATE_ROUTES = ("/v1/chat/completions", "/tokenize")  # where the engine takes a template with a request
RENDERING_ROUTES = (*TEMPLATE_ROUTES, "/v1/responses", "/v1/messages")
TEMPLATE_SETTING = "HOTSHOE_ALLOW_CHAT_TEMPLATES"


def read_serving(raw: bytes) -> dict[str, Any]:
    """The defaults in an upload's `serving` part; raises AdapterRefused with everything that is wrong with them."""
    try:
        found = strict_json.parse_json(raw)
        if not isinstance(found, dict):
            raise strict_json.JsonInvalid("is not an object")
        check_depth(found)
    except strict_json.JsonInvalid as error:
        raise _refused([Problem(error.code, SERVING_FILE, str(error))]) from None
    except InvalidRequest as error:
        raise _refused([Problem(error.code, SERVING_FILE, error.message)]) from None
    given = {name: value for name, value in found.items() if value is not None}
    problems = [problem for name, value in given.items() for problem in _problems(name, value)]
    if problems:
        raise _refused(problems)
    return {name: _plain(value) for name, value in given.items() if value != {}}


def with_defaults(path: str, body: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The body with every default that the route has a field for and the body does not set. Null sets nothing.

    `chat_template_kwargs` are filled up key by key; a list such as `stop` is the client's or the version's, whole.
    """
    made, taken = dict(body), FIELDS[path].taken
    for name, value in defaults.items():
        field, other = OTHER_NAMES.get(path, {}).get(name, name), SAME_AS.get(name, "")
        if field not in taken or body.get(other) is not None or not _is_meant(path, field, body):
            continue
        if name == TEMPLATE_KWARGS:
            made[field] = _filled_up(path, body, value)
        elif body.get(field) is None:
            made[field] = value
    return made


def served_as(path: str, body: Mapping[str, Any], version: AdapterVersion, *, is_allowed: bool) -> dict[str, Any]:
    """The body as the version answers it; raises NotServable where its own template cannot be used."""
    made = with_defaults(path, body, version.serving) if version.serving else dict(body)
    if version.chat_template is None or not _is_meant(path, TEMPLATE_KWARGS, body) or path not in RENDERING_ROUTES:
        return made
    if path not in TEMPLATE_ROUTES:
        raise NotServable(
            f"{version.ref} has a chat template of its own, which the engine does not take on {path}: "
            "use /v1/chat/completions.",
            param="model",
        )
    if not is_allowed:
        raise NotServable(
            f"{version.ref} has a chat template of its own, and this server no longer allows them: its operator sets "
            f"{TEMPLATE_SETTING}=true.",
            param="model",
        )
    return {**made, "chat_template": version.chat_template}


def _filled_up(path: str, body: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    """The template's arguments: the client's, and the defaults that it leaves out."""
    given = {} if body.get(TEMPLATE_KWARGS) is None else body[TEMPLATE_KWARGS]
    if not isinstance(given, Mapping):
        return given  # the engine says what is wrong with it
    is_said = body.get(THINKING_FIELDS.get(path, "")) is not None
    kept = {key: value for key, value in defaults.items() if not (is_said and key == THINKING)}
    return {**given, **{key: value for key, value in kept.items() if given.get(key) is None}}


def _is_meant(path: str, field: str, body: Mapping[str, Any]) -> bool:
    """A template and what it is given only mean something for messages, which /tokenize need not have."""
    return field != TEMPLATE_KWARGS or path != "/tokenize" or "messages" in body


def _problems(name: str, value: Any) -> Iterator[Problem]:
    if name not in TAKEN:
        near = difflib.get_close_matches(name[:64], sorted(TAKEN), n=1, cutoff=0.75)
        advice = f"Did you mean {near[0]}?" if near else f"The defaults are: {', '.join(sorted(TAKEN))}."
        yield Problem("unknown_parameter", f"{SERVING_FILE}.{shown(name)}", "is no default of a version", advice)
        return
    try:
        check_bounds({name: value})
    except InvalidRequest as error:
        yield Problem(error.code, f"{SERVING_FILE}.{name}", error.message)
        return
    trouble = _trouble(name, value)
    if trouble:
        yield Problem("invalid_request", f"{SERVING_FILE}.{name}", trouble)


def _trouble(name: str, value: Any) -> str | None:
    """What the engine would say of it in every request."""
    if name in NUMBERS:
        if name in WHOLE and isinstance(value, float) and not value.is_integer():
            return "must be a whole number"
        return "must be above 0" if name in ABOVE_ZERO and value <= 0 else None
    if name == TEMPLATE_KWARGS:
        return None if isinstance(value, dict) else "must be an object"
    texts = value if isinstance(value, list) else [value]
    return (
        None if all(isinstance(text, str) and text for text in texts) else "must be a text or texts, none of them empty"
    )


def _plain(value: Any) -> Any:
    """1.0 is 1: two spellings of the same defaults are the same version."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refused(problems: list[Problem]) -> AdapterRefused:
    first = problems[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return AdapterRefused(
        f"{first.path} {first.message.removesuffix('.')}{more}.", param="serving", problems=tuple(problems)
    )
