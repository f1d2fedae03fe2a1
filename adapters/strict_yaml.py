"""A YAML file of settings, read as scalars, lists and mappings and nothing else.

Tags, anchors, aliases, deep nesting and a key that stands twice are refused before anything is built from the file: no
file makes an object, grows when it is read, or sets a value that another line quietly takes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from adapters.errors import ConfigInvalid

MAX_BYTES = 64_000


class Setting(NamedTuple):
    """What stands at one key of the file, and its line, counted from 1."""

    value: Any
    line: int


def read_mapping(path: Path, *, max_depth: int, as_text: bool) -> dict[str, Setting]:
    """The one mapping in the file, its scalars as text or as YAML's own types; raises ConfigInvalid.

    `max_depth` counts the mapping itself. An empty file is an empty mapping.
    """
    import yaml  # only where a file is given: every command's --help imports what reads settings

    text = _text(path)
    loader = yaml.BaseLoader if as_text else yaml.SafeLoader
    try:
        _check_events(path, yaml.parse(text, Loader=yaml.BaseLoader), max_depth)
        root = yaml.compose(text, Loader=yaml.BaseLoader)
        _check_keys(path, root)
        value = yaml.load(text, Loader=loader)  # noqa: S506 - neither loader makes more than plain values
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none, by the second loader
        raise _invalid(path, f"is not YAML: {' '.join(str(error).split())[:300]}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _invalid(path, "must be one mapping of settings, one `name: value` a line")
    lines = {str(node.value): node.start_mark.line + 1 for node, _ in root.value} if root else {}
    return {str(key): Setting(item, lines.get(str(key), 1)) for key, item in value.items()}


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


def _check_events(path: Path, events: Iterator[Any], max_depth: int) -> None:
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
        if depth > max_depth:
            raise _invalid(path, f"is nested deeper than {max_depth} levels in line {line}")


def _check_keys(path: Path, node: Any) -> None:
    """No mapping has a key twice."""
    import yaml

    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(path, item)
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if (name := str(key.value)) in seen:
                raise ConfigInvalid(f"{path}:{key.start_mark.line + 1}: {name[:80]} is set twice.", param=name[:80])
            seen.add(name)
            _check_keys(path, value)


def _invalid(path: Path, what: str) -> ConfigInvalid:
    return ConfigInvalid(f"{path} {what}.", param="config")
