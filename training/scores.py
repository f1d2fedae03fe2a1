"""How answers are compared with what was expected: as text, as one JSON object, or as a tool call.

A tool call counts as an object: its name is the label, its arguments are fields. It comes as the text that the model
writes, in `<tool_call>` blocks (Qwen's form); a server's parsed `tool_calls` are put into that form first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from adapters.errors import InvalidRequest

TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
LABEL_OF_A_CALL = "name"


@dataclass(frozen=True)
class Scores:
    """Shares of 1 over `n` rows. `field_f1` is micro-averaged over (field, value) pairs, the label left out."""

    n: int
    exact_match: float
    json_valid: float
    label_accuracy: float
    field_f1: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def score(expected: Sequence[str], answers: Sequence[str], label: str = "intent") -> Scores:
    """Compare answers with what was expected, row by row; an answer that is no object counts as an empty one.

    An expected text that is no object is compared as text, without the white space around it.
    """
    refuse_unpaired(expected, answers)
    exact = valid = labels = shared = wanted = given = 0
    for right_text, answer_text in zip(expected, answers, strict=True):
        right, answer = parse_answer(right_text), parse_answer(answer_text)
        valid += answer is not None
        exact += is_equal(right_text, answer_text)
        labels += _canonical((answer or {}).get(label)) == _canonical((right or {}).get(label))
        right_fields, answer_fields = fields(right, label), fields(answer, label)
        shared += len(right_fields & answer_fields)
        wanted += len(right_fields)
        given += len(answer_fields)
    n = len(expected)
    field_f1 = 2 * shared / (wanted + given) if wanted + given else 1.0
    return Scores(n, exact / n, valid / n, labels / n, field_f1)


def refuse_unpaired(expected: Sequence[str], answers: Sequence[str]) -> None:
    """Raises InvalidRequest where there are no rows, or not one answer for each."""
    if len(expected) != len(answers) or not expected:
        raise InvalidRequest(f"{len(answers)} answers cannot be scored against {len(expected)} expected ones.")


def is_equal(expected: str, answer: str) -> bool:
    """Whether the answer is the expected text, or the expected object whatever the order of its keys."""
    wanted = parse_answer(expected)
    return parse_answer(answer) == wanted if wanted is not None else spoken(answer) == spoken(expected)


def telling_scores(expected: Sequence[str], answers: Sequence[str], label: str | None = None) -> dict[str, Any]:
    """The scores that mean something for these rows: exact match always, the others where objects are expected.

    `label` is the field that is the label; None takes `label_of`.
    """
    label = label or label_of(expected)
    scores = score(expected, answers, label or "")
    made: dict[str, Any] = {"rows": scores.n, "exact_match": scores.exact_match}
    objects = [parse_answer(text) for text in expected]
    if all(value is not None for value in objects):
        made["json_valid"] = scores.json_valid
        if label is not None and any(label in (value or {}) for value in objects):
            made |= {"label": label, "label_accuracy": scores.label_accuracy}
        if any(fields(value, label or "") for value in objects):
            made["field_f1"] = scores.field_f1
    return made


def label_of(expected: Sequence[str]) -> str | None:
    """The field that is the rows' label: the first that all of them have, with a text that enough of them share."""
    objects = [parse_answer(text) for text in expected]
    found = [value for value in objects if value is not None]
    if not found or len(found) < len(objects):
        return None
    most = max(2, len(found) // 2)
    for key in found[0]:
        values = [value.get(key) for value in found]
        if all(isinstance(value, str) for value in values) and len(set(map(str, values))) <= most:
            return key
    return None


def parse_answer(text: str) -> dict[str, Any] | None:
    """The object that an answer is: its JSON, or its tool calls; None for anything else."""
    answer = spoken(text)
    calls = TOOL_CALL.findall(answer)
    if not calls:
        return parse_object(answer)
    parsed = [parse_object(call.strip()) for call in calls]
    if any(call is None or not isinstance(call.get("name"), str) for call in parsed):
        return None
    return object_of_calls([(str(call["name"]), call.get("arguments")) for call in parsed if call is not None])


def object_of_calls(calls: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Tool calls, each a name and its arguments, as one flat object; those after the first are numbered."""
    made: dict[str, Any] = {}
    for index, (name, arguments) in enumerate(calls):
        prefix = f"{index + 1}." if index else ""
        made[f"{prefix}{LABEL_OF_A_CALL}"] = name
        if isinstance(arguments, Mapping):
            made |= {f"{prefix}arguments.{key}": value for key, value in arguments.items()}
        elif arguments is not None:
            made[f"{prefix}arguments"] = arguments
    return made


def written(content: str, calls: Iterable[Mapping[str, Any]] | None) -> str:
    """An answer with its tool calls as Qwen's templates write them, however they came."""
    blocks = [_block(call["function"]) for call in calls or ()]
    return "\n".join([*([content] if content.strip() else []), *blocks])


def _block(function: Mapping[str, Any]) -> str:
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = parse_object(arguments) or arguments
    call = {"name": function.get("name"), "arguments": arguments}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, or None. Nothing is cut out of surrounding prose."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def spoken(text: str) -> str:
    """An answer without its reasoning and the white space around it, as a server with a reasoning parser gives it."""
    return text.rpartition("</think>")[2].strip()


def fields(value: dict[str, Any] | None, label: str) -> set[tuple[str, str]]:
    """The fields of an object by name, value and type, its label left out."""
    return {(key, _canonical(field)) for key, field in (value or {}).items() if key != label}


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
