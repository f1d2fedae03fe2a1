"""JSON schemas that a request brings, for its answer or for tools: bounded before the engine compiles a grammar.

Counts are of the whole request, so that many small schemas cost no more than one. A reference may lead back to where it
stands (a list of lists, a tree), but only through something that takes a character of output.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapters.errors import InvalidRequest
from adapters.strict_json import JsonInvalid, parse_json
from server.bounds import check_depth

MAX_ENUM_VALUES, MAX_PROPERTIES, MAX_NODES = 1000, 500, 5000
MAX_PATTERN_CHARACTERS, MAX_PATTERN_SIZE = 256, 1000
MAX_BOUND = 100_000
MAX_REFERENCES = 200
PLACES = (
    ("structured_outputs", "json"),
    ("response_format", "json_schema", "schema"),
    ("text", "format", "schema"),
    ("output_config", "format", "schema"),
)
BOUNDS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
IN_PLACE = ("allOf", "anyOf", "oneOf")  # what these hold stands where they stand: no output between
PIECES = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{(\d*),?(\d*)\}|.", re.DOTALL)


@dataclass(slots=True)
class Tally:
    """What the schemas of one request come to, so far."""

    param: str
    nodes: int = 0
    enum_values: int = 0
    properties: int = 0
    references: list[tuple[Mapping[str, Any], str]] = field(default_factory=list)


def check_schemas(body: Mapping[str, Any]) -> None:
    """Raises InvalidRequest with the field that holds too large, too repetitive or circular a schema."""
    counts = Tally("")
    for param, schema in schemas_of(body):
        counts.param = param
        if isinstance(schema, str):
            schema = _parsed(schema, param)
            check_depth({param: schema})
        if isinstance(schema, dict):
            _count(schema, counts)
            _check_references(schema, param)
    _check_choice(body.get("structured_outputs"))


def schemas_of(body: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every place where a request may hold a schema, with the field's name."""
    for path in PLACES:
        yield ".".join(path[:2]), _inside(body, *path)
    tools = body.get("tools")
    for tool in tools if isinstance(tools, list) else ():
        if isinstance(tool, dict):
            yield "tools", _inside(tool, "function", "parameters") or tool.get("parameters") or tool.get("input_schema")


def _inside(value: Any, *names: str) -> Any:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _parsed(text: str, param: str) -> Any:
    try:
        return parse_json(text.encode())
    except (JsonInvalid, UnicodeEncodeError) as error:
        raise InvalidRequest(f"{param} is a text that is no JSON: it {error}.", param=param) from None


def _count(schema: Mapping[str, Any], counts: Tally) -> None:
    waiting: list[Any] = [schema]
    while waiting:
        node = waiting.pop()
        counts.nodes += 1
        _limit("schema nodes", counts.nodes, MAX_NODES, counts.param)
        if isinstance(node, list):
            waiting += [one for one in node if isinstance(one, dict | list)]
            continue
        _count_keywords(node, counts)
        waiting += [one for name, one in node.items() if name != "enum" and isinstance(one, dict | list)]


def _count_keywords(node: Mapping[str, Any], counts: Tally) -> None:
    values, properties, patterns = node.get("enum"), node.get("properties"), node.get("patternProperties")
    if isinstance(values, list):
        counts.enum_values += len(values)
        _limit("enum values", counts.enum_values, MAX_ENUM_VALUES, counts.param)
    if isinstance(properties, dict):
        counts.properties += len(properties)
        _limit("properties", counts.properties, MAX_PROPERTIES, counts.param)
    for pattern in (node.get("pattern"), *(patterns if isinstance(patterns, dict) else ())):
        if isinstance(pattern, str):
            _check_pattern(pattern, counts.param)
    for name in BOUNDS:
        value = node.get(name)
        if isinstance(value, int | float) and not 0 <= value <= MAX_BOUND:
            raise InvalidRequest(f"{name} in a schema must be between 0 and {MAX_BOUND}.", param=counts.param)


def _check_pattern(pattern: str, param: str) -> None:
    _limit("characters in a pattern", len(pattern), MAX_PATTERN_CHARACTERS, param)
    _limit(
        "characters in a pattern once its counted repeats are written out",
        _written_out(pattern),
        MAX_PATTERN_SIZE,
        param,
    )


def _written_out(pattern: str) -> int:
    """How long the pattern is with every `x{2,5}` as five times x; groups multiply."""
    outer: list[int] = []
    size = last = 0
    for piece in PIECES.finditer(pattern):
        text, low, high = piece.group(), *piece.groups(default="")
        if text == "(":
            outer.append(size)
            size = last = 0
        elif text == ")" and outer:
            last, size = size, outer.pop() + size
        elif low or high:
            size += last * (max(1, int(low or 1), int(high or 1)) - 1)
        else:
            last = 1
            size += 1
        if size > MAX_PATTERN_SIZE:
            return size
    return size


def _check_references(schema: Mapping[str, Any], param: str) -> None:
    """References lead into the same schema, and never round to themselves without any output between."""
    found = [node for node in _nodes(schema) if isinstance(node.get("$ref"), str)]
    _limit("references", len(found), MAX_REFERENCES, param)
    for node in found:
        _check_circle(schema, node, param)


def _check_circle(schema: Mapping[str, Any], start: Mapping[str, Any], param: str) -> None:
    seen, waiting = {id(start)}, _stands_in(schema, start, param)
    while waiting:
        node = waiting.pop()
        if node is start:
            raise InvalidRequest(f"{param} has a reference that leads round to itself.", param=param)
        if id(node) not in seen:
            seen.add(id(node))
            waiting += _stands_in(schema, node, param)


def _stands_in(schema: Mapping[str, Any], node: Mapping[str, Any], param: str) -> list[Mapping[str, Any]]:
    """The schemas that stand in this one's place."""
    found = [one for name in IN_PLACE if isinstance(node.get(name), list) for one in node[name]]
    if isinstance(node.get("$ref"), str):
        found.append(_target(schema, node["$ref"], param))
    return [one for one in found if isinstance(one, dict)]


def _target(schema: Mapping[str, Any], reference: str, param: str) -> Any:
    if reference == "#":
        return schema
    node: Any = schema
    for part in reference[2:].split("/") if reference.startswith("#/") else [""]:
        node = node.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(node, dict) else None
    if node is None:
        raise InvalidRequest(f"{param} has a $ref that names nothing in the same schema.", param=param)
    return node


def _nodes(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    waiting: list[Any] = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
        waiting += [one for one in (node.values() if isinstance(node, dict) else node) if isinstance(one, dict | list)]


def _check_choice(outputs: Any) -> None:
    choice = outputs.get("choice") if isinstance(outputs, dict) else None
    if isinstance(choice, list):
        _limit("entries", len(choice), MAX_ENUM_VALUES, "structured_outputs.choice")


def _limit(what: str, count: int, most: int, param: str) -> None:
    if count > most:
        raise InvalidRequest(f"{param} has more than {most} {what}, which is the limit.", param=param)
