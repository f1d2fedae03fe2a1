"""The four ways in which rows are written, told apart by their columns, and each as messages.

chat               `messages` (OpenAI), beside it `tools`, or the older `functions`
prompt_completion  `prompt` and `completion`: texts, or lists of messages; only the completion is learned
alpaca             `instruction`, `input`, `output`; also `history`, a list of earlier [question, answer]
sharegpt           `conversations` of from/value (human, gpt, system, function_call, observation, tool) or role/content

The last three may have `system` and `tools`. A row whose columns belong to two of them is an error that names both.
https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from training.data.jsontext import RowInvalid, decode, kind
from training.data.rows import Draft, Place, Row, build_row, read_tools, tool_call

DECIDING = {
    "chat": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
}
COLUMNS = {
    "chat": ("messages", "tools", "functions"),
    "prompt_completion": ("prompt", "completion", "system", "tools", "functions"),
    "alpaca": ("instruction", "input", "output", "system", "history", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
}
TITLES = {
    "chat": "chat messages",
    "prompt_completion": "prompt/completion",
    "alpaca": "Alpaca",
    "sharegpt": "ShareGPT",
}
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "function_call",
}


def detect(columns: Iterable[str]) -> str:
    """Which form has these columns; raises RowInvalid where none has, or two have."""
    names = list(columns)
    found = {form: [name for name in names if name in deciding] for form, deciding in DECIDING.items()}
    forms = [form for form, present in found.items() if present]
    if len(forms) > 1:
        which = " and ".join(f"{_quoted(found[form])} ({TITLES[form]})" for form in forms)
        raise RowInvalid(
            "form_ambiguous", f"it has columns of {len(forms)} forms: {which}.", "remove all but one form's"
        )
    if forms:
        return forms[0]
    wanted = "; ".join(" and ".join(f"`{name}`" for name in deciding) for deciding in DECIDING.values())
    raise RowInvalid(
        "row_invalid",
        f"no column of a form that is read; it has {_quoted(names[:8]) or 'none'}.",
        f"name the columns {wanted}",
    )


def parse_row(value: Any, place: Place, ignored: Counter[str]) -> Row:
    """One decoded row of any form; raises RowInvalid. Keys that mean nothing are counted in `ignored`."""
    if not isinstance(value, dict):
        raise RowInvalid("row_invalid", f"the row is a JSON {kind(value)}, not an object.")
    form = detect(value)
    ignored.update(key for key in value if key not in COLUMNS[form])
    return build_row(_DRAFTS[form](value, ignored), form, place, ignored)


def _chat(row: Mapping[str, Any], ignored: Counter[str]) -> Draft:
    return Draft(_messages(row["messages"], "messages"), _declared(row, ignored))


def _prompt_completion(row: Mapping[str, Any], ignored: Counter[str]) -> Draft:
    before = _with_system(row, _said(row, "prompt", "user"))
    after = _said(row, "completion", "assistant")
    return Draft(before + after, _declared(row, ignored), context=len(before))


def _alpaca(row: Mapping[str, Any], ignored: Counter[str]) -> Draft:
    asked = [text for text in (_text(row, "instruction"), _text(row, "input")) if text.strip()]
    if not asked:
        raise RowInvalid("content_invalid", "both `instruction` and `input` are empty.")
    answer = _text(row, "output")
    if not answer.strip():
        raise RowInvalid("empty_turn", "`output` is empty.", "remove the row or write the answer")
    messages = _with_system(row, _history(row.get("history")))
    messages.append(("instruction", {"role": "user", "content": "\n".join(asked)}))
    messages.append(("output", {"role": "assistant", "content": answer}))
    return Draft(messages, _declared(row, ignored))


def _sharegpt(row: Mapping[str, Any], ignored: Counter[str]) -> Draft:
    found = _messages(row["conversations"], "conversations")
    said = [(where, _spoken(message, where, ignored)) for where, message in found]
    return Draft(_with_system(row, said), _declared(row, ignored))


_DRAFTS: dict[str, Callable[[Mapping[str, Any], Counter[str]], Draft]] = {
    "chat": _chat,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
}


def _messages(value: Any, column: str) -> list[tuple[str, Any]]:
    """The column's messages, each with its name; a column of JSON text (CSV) is decoded."""
    if isinstance(value, str):
        value = _json_column(value, column)
    if not isinstance(value, list) or not value:
        raise RowInvalid("row_invalid", f"`{column}` must be a list with at least one message.")
    return [(f"{column}[{index}]", message) for index, message in enumerate(value)]


def _json_column(text: str, column: str) -> Any:
    try:
        return decode(text) if text.strip() else None
    except RowInvalid as error:
        raise RowInvalid(error.code, f"`{column}` is text: {error.message}", error.advice) from None


def _said(row: Mapping[str, Any], column: str, role: str) -> list[tuple[str, Any]]:
    """The messages of `prompt` or `completion`: its text in one, or its list."""
    value = row.get(column)
    if isinstance(value, list):
        return _messages(value, column)
    text = _text(row, column)
    if not text.strip():
        state = "is empty" if column in row else "is missing"
        raise RowInvalid("empty_turn", f"`{column}` {state}.", f"give the row a `{column}`, or remove it")
    return [(column, {"role": role, "content": text})]


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise RowInvalid("content_invalid", f"`{column}` is a JSON {kind(value)}, not text.", "write it as text")
    return value or ""


def _with_system(row: Mapping[str, Any], messages: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The messages after the row's `system`, where it has one."""
    text = _text(row, "system")
    if not text:
        return messages
    where, first = messages[0] if messages else ("", None)
    if isinstance(first, dict) and first.get("role") == "system":
        raise RowInvalid("row_invalid", f"both `system` and {where} are a system prompt.", "remove one")
    return [("system", {"role": "system", "content": text}), *messages]


def _history(value: Any) -> list[tuple[str, Any]]:
    """Earlier turns of an Alpaca row: pairs of what was asked and answered, oldest first."""
    if isinstance(value, str):
        value = _json_column(value, "history")
    if value is not None and not isinstance(value, list):
        raise RowInvalid("row_invalid", f"`history` is a JSON {kind(value)}, not a list of [question, answer].")
    messages: list[tuple[str, Any]] = []
    for index, pair in enumerate(value or []):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowInvalid("row_invalid", f"history[{index}] is not a list of two texts, [question, answer].")
        messages.append((f"history[{index}][0]", {"role": "user", "content": pair[0]}))
        messages.append((f"history[{index}][1]", {"role": "assistant", "content": pair[1]}))
    return messages


def _spoken(message: Any, where: str, ignored: Counter[str]) -> Any:
    """One ShareGPT message in OpenAI's shape; one that already has it is returned as it is."""
    if not isinstance(message, dict) or "from" not in message:
        return message
    speaker = SPEAKERS.get(message["from"]) if isinstance(message["from"], str) else None
    if speaker is None:
        known = ", ".join(SPEAKERS)
        raise RowInvalid("role_invalid", f"{where}.from is {message['from']!r}; it must be one of {known}.")
    if "role" in message or "content" in message:
        raise RowInvalid("row_invalid", f"{where} has from/value and role/content.", "keep one of them")
    value = message.get("value")
    if not isinstance(value, str):
        raise RowInvalid("content_invalid", f"{where}.value is a JSON {kind(value)}, not text.")
    rest = {key: item for key, item in message.items() if key not in ("from", "value", "weight")}
    ignored.update(f"conversations[].{key}" for key in rest)
    weight = {"weight": message["weight"]} if "weight" in message else {}
    if speaker == "function_call":
        return {"role": "assistant", **weight, **_called(value, where)}
    return {"role": speaker, "content": value, **weight}


def _called(value: str, where: str) -> dict[str, Any]:
    """A function_call's text: a call or a list of calls as JSON, after the reasoning where there is some."""
    before, closing, calls = value.rpartition("</think>")
    try:
        found = decode(calls)
    except RowInvalid as error:
        raise RowInvalid("tool_calls_invalid", f"{where}.value is no call: {error.message}") from None
    listed = found if isinstance(found, list) else [found]
    if not listed:
        raise RowInvalid("tool_calls_invalid", f"{where}.value is an empty list of calls.")
    made = [tool_call({"function": call}, f"{where}.value[{index}]") for index, call in enumerate(listed)]
    return {"content": before + closing, "tool_calls": made}


def _declared(row: Mapping[str, Any], ignored: Counter[str]) -> tuple[Mapping[str, Any], ...] | None:
    """The row's tools, under either name."""
    tools = read_tools(row.get("tools"), ignored)
    functions = read_tools(row.get("functions"), ignored, key="functions")
    if tools and functions:
        raise RowInvalid("tools_invalid", "the row has both `tools` and the older `functions`.", "keep `tools`")
    return tools or functions


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
