"""Texts inside of a record, wherever they stand: each is changed, and what is around them stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from training.data.jsontext import RowInvalid, decode

DEEPEST = 200  # levels of JSON in a text; deeper ones are changed as the text that they are
STRUCTURE = ("role", "from", "type")  # keys whose values are no texts


def changed(value: Any, change: Callable[[str], str]) -> Any:
    """The value with `change` applied to every text in it; JSON inside of a text stays JSON."""
    if isinstance(value, str):
        return _text(value, change)
    if isinstance(value, dict):
        return {key: item if key in STRUCTURE else changed(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [changed(item, change) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return _number(value, change)
    return value


def alike(one: Any, other: Any) -> bool:
    """Whether two values are equal, JSON inside of their texts compared as what it says."""
    if isinstance(one, str) and isinstance(other, str):
        return one == other or (_is_json(one) and _decoded(one) is not None and _decoded(one) == _decoded(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


def _text(text: str, change: Callable[[str], str]) -> str:
    """Pseudonyms need no escape in JSON, so only JSON that has escapes itself is read and written again."""
    if "\\" not in text or not _is_json(text):
        return change(text)
    value = _decoded(text)
    if value is None:
        return change(text)
    made = changed(value, change)
    if made == value:
        return text
    separators = (", ", ": ") if '": ' in text else (",", ":")
    return json.dumps(made, ensure_ascii=text.isascii(), separators=separators)


def _number(number: int, change: Callable[[str], str]) -> int | str:
    made = change(str(number))
    return int(made) if made.isdecimal() else made


def _is_json(text: str) -> bool:
    return text.lstrip()[:1] in ("{", "[")


def _decoded(text: str) -> Any:
    """What JSON says; None for what is none, and for what is nested too deeply to be walked through."""
    try:
        value = decode(text)
    except RowInvalid:
        return None
    return value if _depth(value) <= DEEPEST else None


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level:
        level = [item for one in level for item in _inside(one)]
        depth += 1
    return depth


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
