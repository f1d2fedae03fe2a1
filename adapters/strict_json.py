"""JSON from strangers: no duplicate keys, no NaN, bounded numbers and depth, nothing that cannot be written back."""

from __future__ import annotations

import json
from typing import Any, NoReturn

MAX_INTEGER_DIGITS = 20
MAX_SHOWN = 80
DIGITS_AS_ZEROS = bytes.maketrans(b"123456789", b"0" * 9)
LONG_NUMBER = b"0" * (MAX_INTEGER_DIGITS + 1)  # once digits are zeros; ten times as quick to find as by a pattern


class JsonInvalid(ValueError):
    """The bytes are not JSON that we take. `code` is `json_invalid` or `duplicate_key`."""

    def __init__(self, message: str, code: str = "json_invalid") -> None:
        super().__init__(message)
        self.code = code


def parse_json(data: bytes, *, max_values: int | None = None) -> Any:
    """The value in `data`: UTF-8 without a byte order mark, keys unique, finite numbers; raises JsonInvalid.

    The caller bounds the size. `max_values` bounds what is parsed at all, by counting commas and brackets before.
    Depth is bounded by the parser, whose recursion error becomes JsonInvalid too.
    """
    if data[:3] == b"\xef\xbb\xbf":
        raise JsonInvalid("starts with a UTF-8 byte order mark; save it as UTF-8 without one")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise JsonInvalid("is UTF-16; save it as UTF-8")
    if max_values is not None and sum(data.count(mark) for mark in (b",", b"[", b"{")) > max_values:
        raise JsonInvalid(f"holds more than {max_values:,} values")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer if LONG_NUMBER in data.translate(DIGITS_AS_ZEROS) else None,
            parse_float=_float,
            parse_constant=_constant,
        )
        if b"\\u" in data:  # a lone surrogate, which only an escape can make, parses but cannot be encoded
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except JsonInvalid:
        raise
    except RecursionError:
        raise JsonInvalid("is nested too deeply") from None
    except UnicodeEncodeError:
        raise JsonInvalid("holds half of a surrogate pair, which is no character") from None
    except UnicodeDecodeError as error:
        raise JsonInvalid(f"is not UTF-8 (byte {error.start})") from None
    except ValueError as error:
        raise JsonInvalid(f"is not JSON: {str(error)[:MAX_SHOWN]}") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonInvalid(f"has the key {twice[:MAX_SHOWN]!r} twice", code="duplicate_key")
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_INTEGER_DIGITS:
        raise JsonInvalid(f"holds an integer of {len(text)} digits; at most {MAX_INTEGER_DIGITS} are taken")
    return int(text)


def _float(text: str) -> float:
    value = float(text) if len(text) <= 400 else float("inf")
    if value in (float("inf"), float("-inf")):
        raise JsonInvalid(f"holds the number {text[:MAX_SHOWN]}, which is too large")
    return value


def _constant(text: str) -> NoReturn:
    raise JsonInvalid(f"holds {text}, which is not JSON")
