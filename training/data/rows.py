"""A row as the template takes it, made of messages in OpenAI's shape.

A message may hold `tool_calls`, `tool_call_id`, `name`, `reasoning_content`, and an assistant's `weight`: 0 keeps the
turn as context and learns nothing from it. The older `function_call` and the role `function` are written as tool calls
and answers. Tools become what the engine makes of them: its keys in its order. Other keys are counted, not obeyed.
https://platform.openai.com/docs/api-reference/fine-tuning/chat-input
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.data.jsontext import RowInvalid, check_text, decode, kind

ROLES = ("system", "user", "assistant", "tool")
MESSAGE_KEYS = {
    *("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "weight", "function_call"),
}
TOOL_KEYS, FUNCTION_KEYS = {"type", "function"}, {"name", "description", "parameters", "strict"}


@dataclass(frozen=True)
class Place:
    """Where a row was read: its file's name, its line there (of Parquet: its row), its number in the file, from 1."""

    source: str
    line: int
    number: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Row:
    """One conversation as the template takes it: null contents are "", tool arguments are objects."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None
    weights: tuple[int, ...]  # one a message; 1 only for assistant turns that are learned
    place: Place
    form: str  # how the row was written; a key of training.data.forms.COLUMNS

    def learned_turns(self, supervise: str = "all") -> list[int]:
        """Indices of the messages that are learned: those of weight 1, or only the last of them."""
        turns = [index for index, weight in enumerate(self.weights) if weight]
        return turns[-1:] if supervise == "last" else turns


@dataclass(frozen=True)
class Draft:
    """A row's messages as they were found, each with the name that problems cite it by, and its tools."""

    messages: Sequence[tuple[str, Any]]
    tools: tuple[Mapping[str, Any], ...] | None = None
    context: int = 0  # so many messages at the beginning are context, whoever speaks


def is_thought(message: Mapping[str, Any]) -> bool:
    """An assistant's turn has reasoning: beside its content, or in a think block there; an empty block is none."""
    before, closing, _ = message["content"].partition("</think>")
    written = before.rpartition("<think>")[2] if closing else ""
    return bool((message.get("reasoning_content") or written).strip())


def build_row(draft: Draft, form: str, place: Place, ignored: Counter[str]) -> Row:
    """The draft as a row, every message checked; raises RowInvalid."""
    read = [_message(message, where, ignored) for where, message in draft.messages]
    messages = tuple(message for message, _ in read)
    if messages[-1]["role"] != "assistant":
        raise RowInvalid(
            "no_answer",
            f"the last message is the {messages[-1]['role']}'s, so nothing is learned from it.",
            "end the row with an assistant message",
        )
    weights = tuple(weight if index >= draft.context else 0 for index, (_, weight) in enumerate(read))
    if not any(weights):
        raise RowInvalid("nothing_supervised", "every assistant turn has weight 0.", "give one turn weight 1")
    check_text([messages, draft.tools])
    return Row(messages, draft.tools, weights, place, form)


def read_tools(value: Any, ignored: Counter[str], *, key: str = "tools") -> tuple[Mapping[str, Any], ...] | None:
    """The declared tools as the engine renders them: a list, or the JSON text of one. Functions may stand alone."""
    if isinstance(value, str) and value.strip():
        value = decode(value)
    if value is None or value == [] or value == "":
        return None
    if not isinstance(value, list):
        raise RowInvalid("tools_invalid", f"`{key}` is a JSON {kind(value)}, not a list.")
    return tuple(_tool(tool, f"{key}[{index}]", ignored) for index, tool in enumerate(value))


def _tool(tool: Any, where: str, ignored: Counter[str]) -> dict[str, Any]:
    if isinstance(tool, dict) and "function" not in tool and "name" in tool:
        tool = {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        advice = 'write {"type": "function", "function": {"name": …, "parameters": {…}}}'
        raise RowInvalid("tools_invalid", f"{where} has no function with a name.", advice)
    if tool.get("type", "function") != "function":
        raise RowInvalid("tools_invalid", f"{where}.type is {tool['type']!r}; only functions can be called.")
    for key, expected in (("description", str), ("parameters", dict), ("strict", bool)):
        if function.get(key) is not None and not isinstance(function[key], expected):
            raise RowInvalid("tools_invalid", f"{where}.function.{key} is a JSON {kind(function[key])}.")
    ignored.update(f"tools[].{name}" for name in tool if name not in TOOL_KEYS)
    ignored.update(f"tools[].function.{name}" for name in function if name not in FUNCTION_KEYS)
    # The engine's own order, with its nulls: what it renders is what has to be trained on.
    made = {key: function.get(key) for key in ("name", "description", "parameters")}
    if function.get("strict") is not None:
        made["strict"] = function["strict"]
    return {"type": "function", "function": made}


def _message(message: Any, where: str, ignored: Counter[str]) -> tuple[dict[str, Any], int]:
    if not isinstance(message, dict):
        raise RowInvalid("row_invalid", f"{where} is a JSON {kind(message)}, not an object.")
    role = "tool" if message.get("role") == "function" else message.get("role")
    if role not in ROLES:
        raise RowInvalid("role_invalid", f"{where}.role is {role!r}; it must be one of {', '.join(ROLES)}.")
    weight = _weight(message, where)
    made: dict[str, Any] = {"role": role, "content": _content(message, where)}
    for key in ("name", "tool_call_id", "reasoning_content"):
        _copy_text(message, key, where, made)
    calls = _tool_calls(message, where)
    if calls:
        made["tool_calls"] = calls
    elif role == "assistant" and weight and not made["content"].strip():
        raise RowInvalid("empty_turn", f"{where} has neither content nor tool_calls.", "remove it or give it weight 0")
    ignored.update(f"messages[].{key}" for key in message if key not in MESSAGE_KEYS)
    return made, weight


def _weight(message: Mapping[str, Any], where: str) -> int:
    weight = message.get("weight")
    if weight is None:
        return int(message["role"] == "assistant")
    if isinstance(weight, bool) or not isinstance(weight, int) or weight not in (0, 1):
        raise RowInvalid("weight_invalid", f"{where}.weight is {weight!r}; it must be 0 or 1.")
    if message["role"] != "assistant":
        raise RowInvalid(
            "weight_invalid", f"{where}.weight is on a {message['role']} message; only an assistant has one."
        )
    return weight


def _content(message: Mapping[str, Any], where: str) -> str:
    content = message.get("content")
    if content is None:
        if message["role"] == "assistant":
            return ""
        raise RowInvalid("content_invalid", f"{where} ({message['role']}) has no content.")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        texts = [part for part in parts if isinstance(part, str)]
        if texts and len(texts) == len(content):
            return "\n".join(texts)  # as the engine joins text parts
        raise RowInvalid("content_invalid", f"{where}.content holds something else than text parts.")
    raise RowInvalid("content_invalid", f"{where}.content is a JSON {kind(content)}, not text.")


def _copy_text(message: Mapping[str, Any], key: str, where: str, made: dict[str, Any]) -> None:
    value = message.get(key)
    if value is None:
        return
    if not isinstance(value, str):
        raise RowInvalid("row_invalid", f"{where}.{key} is a JSON {kind(value)}, not text.")
    made[key] = value


def _tool_calls(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    calls, legacy = message.get("tool_calls"), message.get("function_call")
    if calls and legacy:
        raise RowInvalid("tool_calls_invalid", f"{where} has both tool_calls and the older function_call.")
    if not calls and not legacy:
        return []
    if message["role"] != "assistant":
        raise RowInvalid("tool_calls_invalid", f"{where} calls a tool, but only an assistant message may.")
    if legacy:
        return [tool_call({"function": legacy}, f"{where}.function_call")]
    if not isinstance(calls, list):
        raise RowInvalid("tool_calls_invalid", f"{where}.tool_calls is a JSON {kind(calls)}, not a list.")
    return [tool_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]


def tool_call(call: Any, where: str) -> dict[str, Any]:
    """One call with its arguments as an object; the engine, too, parses arguments that are JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowInvalid("tool_calls_invalid", f"{where} must have a function's name and arguments.")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments:  # Qwen2.5's template would encode the text once more
        try:
            arguments = decode(arguments)
        except RowInvalid as error:
            raise RowInvalid("tool_calls_invalid", f"{where}: the arguments are {error.message}") from None
    if arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowInvalid("tool_calls_invalid", f"{where}: the arguments are a JSON {kind(arguments)}, not an object.")
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}
