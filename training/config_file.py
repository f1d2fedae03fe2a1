"""A run's settings from a YAML file: the names of `TrainingConfig`, each value checked against its setting's type.

`from` stands for what `--from` says.
"""

from __future__ import annotations

import difflib
import types
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from adapters.errors import ConfigInvalid
from adapters.strict_yaml import read_mapping
from training.config import TrainingConfig

MAX_DEPTH = 2  # one mapping, and lists in it
FROM = "from"
SET_BY_FROM = ("initial_adapter", "parent")
NOTHING = ("", "~", "null", "Null", "NULL")
TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")


def read_config(path: Path) -> dict[str, Any]:
    """The settings in the file, and `from` where it has it; an empty value leaves one open. Raises ConfigInvalid."""
    given = read_mapping(path, max_depth=MAX_DEPTH, as_text=True)
    for key, setting in given.items():
        _check_known(path, key, setting.line)
    return {key: _typed(path, key, value) for key, (value, _) in given.items() if value not in NOTHING}


def settable() -> dict[str, Any]:
    """Name and type of every setting that a file or a flag gives."""
    hints = get_type_hints(TrainingConfig)
    return {item.name: hints[item.name] for item in fields(TrainingConfig) if item.name not in SET_BY_FROM}


def split_list(text: str) -> tuple[str, ...]:
    """`a, b` as a tuple, the way that flags write lists."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _check_known(path: Path, key: str, line: int) -> None:
    known = [*settable(), FROM]
    if key not in known:
        near = difflib.get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}."
        raise ConfigInvalid(f"{path}:{line}: there is no setting {key[:80]!r}; {hint}", param=key[:80])


def _typed(path: Path, key: str, value: Any) -> Any:
    wanted = str if key == FROM else settable()[key]
    choices = [kind for kind in _members(wanted) if kind is not type(None)]
    kind = choices[0]
    try:
        if get_origin(kind) is tuple:
            return _list(value)
        if not isinstance(value, str):
            raise ValueError
        if kind is bool:
            return _flag(value)
        return kind(value) if kind in (int, float, Path) else value
    except ValueError as error:
        raise ConfigInvalid(f"{path}: {key} is {_shown(value)}; it must be {_named(kind)}.", param=key) from error


def _members(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(member for part in get_args(hint) for member in _members(part))
    return (str,) if get_origin(hint) is Literal else (hint,)


def _list(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return split_list(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise ValueError


def _flag(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise ValueError
    return text.lower() in TRUE


def _named(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path", str: "text"}
    return names.get(kind, "a list of names")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
