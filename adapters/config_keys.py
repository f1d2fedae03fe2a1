"""Names inside an adapter_config.json: pattern keys that are literal after all, misspelt fields, odd values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from adapters.lora_fields import LOOK_ALIKES

MAX_PATTERNS = 4096
MAX_NAME_CHARACTERS = 256
MAX_COMPARED_KEYS = 200
LITERAL_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", re.ASCII)


def literal_name(key: str) -> str | None:
    """The module name a pattern key stands for, `^` first when it has to be the whole name; None for a real pattern.

    PEFT matches `(.*\\.)?(key)$`, so a literal name is a suffix, `^name` the whole name, and `\\.` a dot.
    """
    if len(key) > MAX_NAME_CHARACTERS:
        return None
    plain = key.removesuffix("$").replace("\\.", ".")
    return plain if LITERAL_NAME.fullmatch(plain.removeprefix("^")) else None


def look_alike(config: Mapping[str, Any], field: str) -> str | None:
    """The key that was probably meant to be `field`: a known other name, or the same but for case and separators."""
    names = {*LOOK_ALIKES[field], re.sub(r"[^a-z0-9]", "", field)}
    plain = {re.sub(r"[^a-z0-9]", "", key[:40].lower()): key for key in config if isinstance(key, str)}
    found = next((plain[name] for name in sorted(names & set(plain))), None)
    if found or field == "r":
        return found
    close = get_close_matches(re.sub(r"[^a-z0-9]", "", field), list(plain)[:MAX_COMPARED_KEYS], n=1, cutoff=0.8)
    return plain[close[0]] if close else None


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_PATTERNS and all(isinstance(item, str) for item in value)


def _is_token_indices(value: Any) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [value]
    return all(isinstance(item, list) and all(type(index) is int and index >= 0 for index in item) for item in lists)


EXPORT_ONLY_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "use_dora": lambda value: value is True,
    "lora_bias": lambda value: value is True,
    "modules_to_save": _is_strings,
    "trainable_token_indices": _is_token_indices,
}
