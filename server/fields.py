"""Which fields a request of each inference route may name: an allow-list, compared with vLLM's own models by a test.

A field is taken (the engine knows what it means), refused (vLLM names it, and it would reach past a client's own
request), or idle: OpenAI's or Anthropic's clients send it, it has no effect here, and it is taken at the values that
ask for nothing else. Every other name is a mistake of the client's, and is answered as one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adapters.errors import InvalidRequest, UnknownParameter

MAX_SHOWN = 64
MAX_TEXT, MAX_PAIRS, MAX_PAIR_KEY = 512, 16, 64


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


SAMPLING = names(
    "frequency_penalty ignore_eos include_stop_str_in_output logit_bias min_p presence_penalty repetition_penalty seed "
    "skip_special_tokens stop stop_token_ids temperature top_k top_p"
)
GENERATION = SAMPLING | names(
    "add_special_tokens allowed_token_ids bad_words echo length_penalty logprob_token_ids logprobs max_tokens "
    "min_tokens n prompt_logprobs repetition_detection response_format return_token_ids "
    "return_token_offsets return_tokens_as_token_ids spaces_between_special_tokens stream stream_interval "
    "stream_options structured_outputs thinking_token_budget truncate_prompt_tokens truncation_side use_beam_search "
    "user watermarking"
)
# What vLLM names and no client may set: HOSTILE A6, and what selects engine internals or other requests' state.
REFUSED = names(
    "cache_salt ec_transfer_params kv_transfer_params media_io_kwargs mm_payload mm_processor_kwargs priority "
    "request_id return_mm_kwargs routed_experts_prompt_start session_id vllm_xargs"
)
TEXT, PAIRS = "a text", "an object of texts"
OPENAI_IDLE: Mapping[str, Any] = {
    "user": TEXT,
    "safety_identifier": TEXT,
    "prompt_cache_key": TEXT,
    "prompt_cache_retention": ("in_memory",),
    "metadata": PAIRS,
    "store": (False,),
    "service_tier": ("auto", "default"),
    "parallel_tool_calls": (True, False),
    "audio": (),
    "background": (False,),
    "conversation": (),
    "moderation": (),
    "prediction": (),
    "prompt_cache_options": (),
}
ANTHROPIC_IDLE: Mapping[str, Any] = {
    "metadata": PAIRS,
    "service_tier": ("auto", "standard_only"),
    "cache_control": ({"type": "ephemeral"}, {"type": "ephemeral", "ttl": "5m"}, {"type": "ephemeral", "ttl": "1h"}),
    "container": (),
    "inference_geo": (),
    "speed": ("standard",),
}


@dataclass(frozen=True, slots=True)
class RouteFields:
    """One route's fields. A name may be taken and idle: then its value is checked, and the engine gets it too."""

    taken: frozenset[str]
    refused: frozenset[str] = REFUSED
    idle: Mapping[str, Any] = field(default_factory=dict)


FIELDS: Mapping[str, RouteFields] = {
    "/v1/chat/completions": RouteFields(
        GENERATION
        | names(
            "add_generation_prompt chat_template_kwargs continue_final_message documents include_reasoning "
            "max_completion_tokens messages model parallel_tool_calls reasoning_effort return_prompt_text tool_choice "
            "tools top_logprobs"
        ),
        REFUSED | {"chat_template"},
        {**OPENAI_IDLE, "modalities": (["text"],), "verbosity": ("medium",), "web_search_options": ()},
    ),
    "/v1/completions": RouteFields(
        GENERATION | names("model prompt suffix"),
        REFUSED - names("media_io_kwargs mm_processor_kwargs") | {"prompt_embeds"},
        {**OPENAI_IDLE, "best_of": (1,)},
    ),
    "/v1/responses": RouteFields(
        SAMPLING
        | names(
            "background chat_template_kwargs include include_reasoning input instructions max_output_tokens "
            "max_tool_calls metadata model parallel_tool_calls previous_response_id prompt prompt_cache_key reasoning "
            "service_tier store stream structured_outputs text tool_choice tools top_logprobs truncation user "
            "watermarking"
        ),
        REFUSED - names("routed_experts_prompt_start") | names("enable_response_messages previous_input_messages"),
        {**OPENAI_IDLE, "context_management": (), "stream_options": ({}, {"include_obfuscation": False})},
    ),
    "/v1/messages": RouteFields(
        names(
            "chat_template_kwargs max_tokens messages metadata model output_config stop_sequences stream system "
            "temperature thinking tool_choice tools top_k top_p watermarking"
        ),
        names("cache_salt ec_transfer_params kv_transfer_params mm_payload return_mm_kwargs vllm_xargs"),
        ANTHROPIC_IDLE,
    ),
    "/tokenize": RouteFields(
        names(
            "add_generation_prompt add_special_tokens chat_template_kwargs continue_final_message messages model "
            "prompt return_token_strs tools"
        ),
        names("chat_template media_io_kwargs mm_processor_kwargs"),
    ),
    "/detokenize": RouteFields(names("model tokens"), frozenset()),
}
# Objects inside a request whose members are an allow-list as well: field -> members taken.
MEMBERS: Mapping[str, frozenset[str]] = {
    "stream_options": names("include_usage continuous_usage_stats include_obfuscation"),
    "structured_outputs": names("json choice json_object disable_any_whitespace disable_additional_properties"),
}
STRUCTURED_REFUSED = names("regex grammar whitespace_pattern structural_tag _backend _backend_was_auto")


def taken_of(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The client's fields that the engine is given."""
    taken = FIELDS[path].taken
    return {name: value for name, value in body.items() if name in taken}


def check_names(path: str, body: Mapping[str, Any]) -> None:
    """Raises UnknownParameter for what is not this route's, InvalidRequest for an idle field that asks for more."""
    fields = FIELDS[path]
    for name, value in body.items():
        if name in fields.idle:
            _check_idle(name, value, fields.idle[name])
        elif name not in fields.taken and not (name in fields.refused and value is None):
            raise UnknownParameter(_refusal(name, fields), param=shown(name))
    for name, members in MEMBERS.items():
        inside = body.get(name)
        for member, value in inside.items() if isinstance(inside, dict) else ():
            if member not in members and not (member in STRUCTURED_REFUSED and value is None):
                advice = " Use a JSON schema or a choice." if member in STRUCTURED_REFUSED else ""
                full = f"{name}.{shown(member)}"
                raise UnknownParameter(f"{full} may not be set by clients of this server.{advice}", param=full)


def shown(name: str) -> str:
    """A client's field name as an answer may repeat it."""
    return name if len(name) <= MAX_SHOWN and name.isprintable() else "(not printable, or too long)"


def _refusal(name: str, fields: RouteFields) -> str:
    if name in fields.refused or name in REFUSED:
        return f"{name} may not be set by clients of this server."
    near = difflib.get_close_matches(name[:MAX_SHOWN], sorted(fields.taken | set(fields.idle)), n=1, cutoff=0.75)
    return f"Unknown parameter: '{shown(name)}'." + (f" Did you mean '{near[0]}'?" if near else "")


def _check_idle(name: str, value: Any, allowed: Any) -> None:
    if value is None:
        return
    if allowed == TEXT:
        is_right = isinstance(value, str) and len(value) <= MAX_TEXT
        wanted = f"a text of at most {MAX_TEXT} characters"
    elif allowed == PAIRS:
        is_right = isinstance(value, dict) and len(value) <= MAX_PAIRS and all(map(_is_pair, value.items()))
        wanted = f"at most {MAX_PAIRS} texts of at most {MAX_TEXT} characters"
    else:
        is_right = any(type(value) is type(one) and value == one for one in allowed)
        wanted = " or ".join(str(one).lower() if isinstance(one, bool) else str(one) for one in allowed) or "left out"
    if not is_right:
        raise InvalidRequest(f"{name} has no effect here, and can only be {wanted}.", param=name)


def _is_pair(pair: tuple[str, Any]) -> bool:
    key, value = pair
    return len(key) <= MAX_PAIR_KEY and isinstance(value, str) and len(value) <= MAX_TEXT
