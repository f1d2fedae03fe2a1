"""Chat rows from a JSONL file: one object with `messages` a line, in OpenAI's shape. Every bad row is reported at once.

A row may also hold `tools`. A message may hold `tool_calls`, `tool_call_id`, `name`, `reasoning_content`, and an
assistant's `weight`: 0 keeps the turn as context and learns nothing from it. Other keys are counted, not obeyed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import DataInvalid, Problem

ROLES = ("system", "user", "assistant", "tool")
MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "weight"}
ROW_KEYS = {"messages", "tools"}
LONGEST_LINE_BYTES = 16_000_000


class RowInvalid(Exception):
    """One thing that is wrong with the row at hand: a stable code, and what to do about it."""

    def __init__(self, code: str, message: str, advice: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.advice = code, message, advice


@dataclass(frozen=True)
class Row:
    """One conversation as the template takes it: null contents are "", tool arguments are objects. `line` is from 1."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None
    weights: tuple[int, ...]  # one a message; 1 only for assistant turns that are learned
    line: int
    source: str  # file name, as problems cite it

    def learned_turns(self, supervise: str = "all") -> list[int]:
        """Indices of the messages that are learned: those of weight 1, or only the last of them."""
        turns = [index for index, weight in enumerate(self.weights) if weight]
        return turns[-1:] if supervise == "last" else turns

    @property
    def place(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class DataFile:
    """A file's rows with its digest, and the keys it holds that mean nothing here."""

    path: Path
    rows: list[Row]
    digest: str
    ignored_keys: Mapping[str, int] = field(default_factory=dict)


def read_chat(path: Path) -> DataFile:
    """All rows of a chat JSONL file; raises DataInvalid with every problem of every row, by file and line."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataInvalid(f"{path} {what}; expected a file of JSON lines.", param="data")
    digest, rows = hashlib.sha256(), []
    problems: list[Problem] = []
    ignored: Counter[str] = Counter()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            digest.update(line)
            if not line.strip():
                continue
            try:
                rows.append(parse_row(_decode(line, number), number, path.name, ignored))
            except RowInvalid as error:
                problems.append(Problem(error.code, f"{path}:{number}", error.message, error.advice))
    if problems:
        raise bad_rows(path, problems, len(rows) + len(problems))
    if not rows:
        raise DataInvalid(f"{path} has no rows.", param="data")
    return DataFile(path, rows, f"sha256:{digest.hexdigest()}", dict(ignored))


def bad_rows(path: Path, problems: list[Problem], total: int) -> DataInvalid:
    """The one error for a file with bad rows."""
    return DataInvalid(
        f"{len(problems)} of {total} rows of {path} cannot be used.", param="data", problems=tuple(problems)
    )


def parse_row(value: Any, line: int, source: str, ignored: Counter[str]) -> Row:
    """One decoded line as a row; raises RowInvalid."""
    if not isinstance(value, dict):
        raise RowInvalid("row_invalid", f"the row is a JSON {_kind(value)}, not an object with `messages`.")
    if "messages" not in value:
        keys = ", ".join(sorted(map(str, value))[:8]) or "(none)"
        raise RowInvalid("row_invalid", f"no `messages`; the row has {keys}.", 'write {"messages": [{"role": …}, …]}')
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        raise RowInvalid("row_invalid", "`messages` must be a list with at least one message.")
    ignored.update(key for key in value if key not in ROW_KEYS)
    read = [_message(message, index, ignored) for index, message in enumerate(messages)]
    if messages[-1].get("role") != "assistant":
        raise RowInvalid(
            "no_answer",
            f"the last message is the {messages[-1]['role']}'s, so nothing is learned from it.",
            "end the row with an assistant message",
        )
    weights = tuple(weight for _, weight in read)
    if not any(weights):
        raise RowInvalid("nothing_supervised", "every assistant turn has weight 0.", "give one turn weight 1")
    return Row(tuple(message for message, _ in read), _tools(value.get("tools")), weights, line, source)


def _decode(line: bytes, number: int) -> Any:
    if len(line) > LONGEST_LINE_BYTES:
        raise RowInvalid("row_too_long", f"the line is {len(line):,} bytes; at most {LONGEST_LINE_BYTES:,} are read.")
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        return json.loads(text, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise RowInvalid("not_utf8", f"byte {error.start} is not UTF-8.", "save the file as UTF-8") from None
    except RecursionError:
        raise RowInvalid("json_invalid", "the JSON is nested too deeply.") from None
    except ValueError as error:
        raise RowInvalid("json_invalid", f"not JSON: {error}.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RowInvalid("duplicate_key", f"the key {twice!r} occurs twice in one object.")
    return made


def _message(message: Any, index: int, ignored: Counter[str]) -> tuple[dict[str, Any], int]:
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise RowInvalid("row_invalid", f"{where} is a JSON {_kind(message)}, not an object.")
    role = message.get("role")
    if role not in ROLES:
        raise RowInvalid("role_invalid", f"{where}.role is {role!r}; it must be one of {', '.join(ROLES)}.")
    if "function_call" in message:
        raise RowInvalid("row_invalid", f"{where}.function_call is the old form.", "write it as `tool_calls`")
    weight = _weight(message, where)
    made: dict[str, Any] = {"role": role, "content": _content(message, where)}
    for key in ("name", "tool_call_id", "reasoning_content"):
        _copy_text(message, key, where, made)
    if message.get("tool_calls"):
        made["tool_calls"] = _tool_calls(message, where)
    elif role == "assistant" and weight and not made["content"].strip():
        raise RowInvalid("empty_turn", f"{where} has neither content nor tool_calls.", "remove it or give it weight 0")
    ignored.update(f"messages[].{key}" for key in message if key not in MESSAGE_KEYS)
    return made, weight


def _weight(message: Mapping[str, Any], where: str) -> int:
    if "weight" not in message:
        return int(message["role"] == "assistant")
    weight = message["weight"]
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
    raise RowInvalid("content_invalid", f"{where}.content is a JSON {_kind(content)}, not text.")


def _copy_text(message: Mapping[str, Any], key: str, where: str, made: dict[str, Any]) -> None:
    value = message.get(key)
    if value is None:
        return
    if not isinstance(value, str):
        raise RowInvalid("row_invalid", f"{where}.{key} is a JSON {_kind(value)}, not text.")
    made[key] = value


def _tool_calls(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    calls = message["tool_calls"]
    if message["role"] != "assistant" or not isinstance(calls, list):
        raise RowInvalid("tool_calls_invalid", f"{where}.tool_calls must be a list, on an assistant message.")
    return [_tool_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowInvalid("tool_calls_invalid", f"{where} must have function.name and function.arguments.")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # Qwen2.5's template would encode the text once more; the engine parses it, too
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise RowInvalid("tool_calls_invalid", f"{where}.function.arguments is not JSON: {error}.") from None
    if not isinstance(arguments, dict):
        raise RowInvalid("tool_calls_invalid", f"{where}.function.arguments must be an object.")
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _tools(tools: Any) -> tuple[Mapping[str, Any], ...] | None:
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(map(_is_tool, tools)):
        raise RowInvalid("tools_invalid", '`tools` must be a list of {"type": "function", "function": {"name": …}}.')
    return tuple(tools)


def _is_tool(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
