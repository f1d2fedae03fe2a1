"""The rows of a gate from a file that was sent before: JSONL of conversations that end in the right answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapters.errors import DataInvalid, Problem
from adapters.strict_json import JsonInvalid, parse_json
from training.scores import written

PURPOSE = "evals"
MAX_PROBLEMS = 50
ADVICE = 'A row is {"messages": [..., {"role": "assistant", "content": "the right answer"}]}, beside it its tools.'


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows as a gate has them; raises DataInvalid with the lines that are none."""
    rows: list[dict[str, Any]] = []
    problems: list[Problem] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(_row(parse_json(line)))
        except JsonInvalid as error:
            problems.append(Problem(error.code, f"line {number}", str(error), ADVICE))
    if problems or not rows:
        problems = problems[:MAX_PROBLEMS] or [Problem("file_empty", "line 1", "there are no rows in it", ADVICE)]
        first = problems[0]
        raise DataInvalid(f"{first.path} {first.message}.", param="file", problems=tuple(problems))
    return rows


def _row(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not set(value) <= {"messages", "tools"}:
        raise JsonInvalid("is not an object of messages and tools", code="row_invalid")
    messages = value.get("messages")
    if not isinstance(messages, list) or len(messages) < 2 or not all(isinstance(one, dict) for one in messages):
        raise JsonInvalid("has no messages before its answer", code="row_invalid")
    answer = messages[-1]
    content, calls = answer.get("content") or "", answer.get("tool_calls") or []
    if answer.get("role") != "assistant" or not isinstance(content, str) or not _are_calls(calls):
        raise JsonInvalid("does not end in an assistant's text or tool calls", code="row_invalid")
    row = {"messages": messages[:-1], "expected": written(content, calls)}
    return row | ({"tools": value["tools"]} if value.get("tools") else {})


def _are_calls(calls: Any) -> bool:
    return isinstance(calls, list) and all(
        isinstance(call, dict) and isinstance(call.get("function"), dict) for call in calls
    )
