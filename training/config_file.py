"""A run's settings from a YAML file: the names of `TrainingConfig`, each value checked against its setting's type.

The file is read as text scalars, lists and one mapping, and nothing else: tags, anchors and aliases are refused before
anything is built, so no file makes an object or grows when it is read. `from` stands for what `--from` says.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from adapters.errors import ConfigInvalid
from training.config import TrainingConfig

MAX_BYTES = 64_000
MAX_DEPTH = 2  # one mapping, and lists in it
FROM = "from"
SET_BY_FROM = ("initial_adapter", "parent")
NOTHING = ("", "~", "null", "Null", "NULL")
TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")


def read_config(path: Path) -> dict[str, Any]:
    """The settings in the file, and `from` where it has it; an empty value leaves one open. Raises ConfigInvalid."""
    import yaml  # only where a file is given: every command's --help reads the settings' names from here

    text = _text(path)
    try:
        _check_events(path, yaml.parse(text, Loader=yaml.BaseLoader))
        _check_keys(path, yaml.compose(text, Loader=yaml.BaseLoader))
        value = yaml.load(text, Loader=yaml.BaseLoader)  # noqa: S506 - BaseLoader makes text, lists and mappings only
    except yaml.YAMLError as error:
        raise _invalid(path, f"is not YAML: {' '.join(str(error).split())[:300]}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _invalid(path, "must be one mapping of settings, `epochs: 3` a line")
    return {key: _typed(path, key, item) for key, item in value.items() if item not in NOTHING}


def settable() -> dict[str, Any]:
    """Name and type of every setting that a file or a flag gives."""
    hints = get_type_hints(TrainingConfig)
    return {item.name: hints[item.name] for item in fields(TrainingConfig) if item.name not in SET_BY_FROM}


def split_list(text: str) -> tuple[str, ...]:
    """`a, b` as a tuple, the way that flags write lists."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _invalid(path, f"cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise _invalid(path, f"has more than {MAX_BYTES:,} bytes, the most a file of settings may have")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _invalid(path, f"is not UTF-8 (byte {error.start})") from error


def _check_events(path: Path, events: Iterator[Any]) -> None:
    """Refuse what a file of settings never needs, before the loader follows it."""
    import yaml

    depth = 0
    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _invalid(path, f"has an anchor or alias in line {line}: write the value out")
        if getattr(event, "tag", None):
            raise _invalid(path, f"has the tag {event.tag!r} in line {line}: write plain values")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise _invalid(path, f"is nested deeper than {MAX_DEPTH} levels in line {line}")


def _check_keys(path: Path, root: Any) -> None:
    """Each key is a setting, once."""
    import yaml

    if not isinstance(root, yaml.MappingNode):
        return
    known, seen = [*settable(), FROM], set()
    for node, _ in root.value:
        key, line = str(node.value), node.start_mark.line + 1
        if key not in known:
            near = difflib.get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}."
            raise ConfigInvalid(f"{path}:{line}: there is no setting {key[:80]!r}; {hint}", param=key[:80])
        if key in seen:
            raise ConfigInvalid(f"{path}:{line}: {key} is set twice.", param=key)
        seen.add(key)


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


def _invalid(path: Path, what: str) -> ConfigInvalid:
    return ConfigInvalid(f"{path} {what}.", param="config")
