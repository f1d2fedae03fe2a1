"""A file's scalars as a setting's type: numbers that YAML took for text, flags in any spelling, lists of names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Convert = Callable[[Any], Any]
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0", "none", "null", "")


def number(value: Any) -> float | None:
    """A finite number; `1e-4` is text to YAML 1.1 and a number to every trainer."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "none", "null")):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a number")
    try:
        found = float(value)
    except ValueError:
        raise ValueError("a number") from None
    if not math.isfinite(found):
        raise ValueError("a finite number")
    return found


def whole(value: Any) -> int | None:
    found = number(value)
    if found is None:
        return None
    if found != int(found):
        raise ValueError("a whole number")
    return int(found)


def flag(value: Any) -> bool | None:
    """True or false; `auto` and the name of a way (`unsloth`, `offload`, `full`) count as true."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return value != 0
    if not isinstance(value, str):
        raise ValueError("true or false")
    return value.strip().lower() not in FALSE


def strict_flag(value: Any) -> bool | None:
    """True or false and nothing else."""
    if isinstance(value, str) and value.strip().lower() not in TRUE + FALSE:
        raise ValueError("true or false")
    return flag(value)


def text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, list | dict):
        raise ValueError("one text")
    return str(value).strip() or None


def lower(value: Any) -> str | None:
    found = text(value)
    return found.lower() if found is not None else None


def names(value: Any) -> tuple[str, ...] | str | None:
    """A list of names, as a list or with commas; `all` and `all-linear` are `all`."""
    if value is None or value is False:
        return None
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError("a list of names")
    if len(value) == 1 and value[0] in ("all", "all-linear"):
        return "all"
    return tuple(value) or None


def present(value: Any) -> bool:
    """Whether anything is set at all."""
    return value not in (None, False, "", [], {}, 0, 0.0, "none", "None", "no")
