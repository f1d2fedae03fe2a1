"""JSON as data files hold it, read strictly: what Python's reader lets pass and JSON forbids is a bad row.

Refused are duplicate keys, NaN and infinities (also 1e999), integers of thousands of digits, nesting that exhausts the
stack, and text that no tokenizer takes: half a surrogate pair, NUL.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from adapters.errors import Problem

MOST_DIGITS = 4_000  # of an integer; Python's own limit for text is 4,300


class RowInvalid(Exception):
    """One thing that is wrong with the row at hand: a stable code, and what to do about it."""

    def __init__(self, code: str, message: str, advice: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.advice = code, message, advice

    def problem(self, path: str) -> Problem:
        """As one of the problems of an error, at the row's place."""
        return Problem(self.code, path, self.message, self.advice)


def decode(text: str) -> Any:
    """The one JSON value that the text is; raises RowInvalid."""
    try:
        return _STRICT.decode(text)
    except RecursionError:
        raise RowInvalid("json_invalid", "the JSON is nested too deeply.") from None
    except ValueError as error:
        raise RowInvalid("json_invalid", f"not JSON: {error}.") from None


def extent(text: str, start: int) -> int:
    """Where the JSON value that begins at `start` ends, whatever its numbers and keys are; raises RowInvalid."""
    try:
        return _LENIENT.raw_decode(text, start)[1]
    except RecursionError:
        raise RowInvalid("json_invalid", "the JSON is nested too deeply.") from None
    except ValueError as error:
        raise RowInvalid("json_invalid", f"not JSON: {error}.") from None


def check_text(value: Any) -> None:
    """Raise RowInvalid where a value of texts, lists and objects holds what JSON or a tokenizer cannot."""
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
        written.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise RowInvalid(
            "text_invalid", f"it holds {half}, half a surrogate pair.", "a character was cut in two; write it whole"
        ) from None
    except RecursionError:
        raise RowInvalid("json_invalid", "the values are nested too deeply.") from None
    except (TypeError, ValueError) as error:
        raise RowInvalid("row_invalid", f"a value that JSON has not: {error}.") from None
    if "\\u0000" in written and _holds_nul(value):
        raise RowInvalid("text_invalid", "its text holds a NUL character.", "remove it; the file may be damaged")


def kind(value: Any) -> str:
    """What JSON calls the value."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _holds_nul(value: Any) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any(map(_holds_nul, value)) or any(map(_holds_nul, value.values()))
    return isinstance(value, list | tuple) and any(map(_holds_nul, value))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RowInvalid("duplicate_key", f"the key {twice!r} occurs twice in one object.")
    return made


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise RowInvalid("json_invalid", f"a number of {len(text):,} digits; at most {MOST_DIGITS:,} are read.")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise RowInvalid("json_invalid", f"the number {text[:20]} is too large.")
    return value


def _constant(text: str) -> None:
    raise RowInvalid("json_invalid", f"{text} is not JSON.", "write null, or leave it out")


_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer, parse_float=_number, parse_constant=_constant)
_LENIENT = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)
