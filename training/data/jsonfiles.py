"""What a data file is written in, told by its first bytes and its name, and JSON Lines and JSON as records.

A reader yields a record for each row, good or bad, and goes on after a bad one as long as it can tell where the next
begins; it raises RowInvalid for what is wrong with the file. Text is UTF-8; a byte order mark is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from training.data.forms import DECIDING
from training.data.jsontext import RowInvalid, decode, extent

FORMATS = {"jsonl": "JSON Lines", "json": "JSON", "csv": "CSV", "parquet": "Parquet"}
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
LONGEST_LINE_BYTES = 16_000_000
LARGEST_JSON_BYTES = 1_000_000_000
HEAD_BYTES = 65_536
PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "a ZIP archive or an Excel workbook",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\xfd7zXZ": "xz",
    b"ARROW1": "Arrow IPC",
    b"SQLite format 3": "SQLite",
}
MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


@dataclass(frozen=True)
class Record:
    """One row as it was found: its line (a Parquet file's row), its number in the file, and its value or its error."""

    line: int
    number: int
    value: Any = None
    error: RowInvalid | None = None


def detect_format(path: Path, file: BinaryIO) -> str:
    """One of FORMATS; raises RowInvalid where the bytes are none of them. The file is left at its beginning."""
    head = file.read(HEAD_BYTES)
    file.seek(0)
    if head.startswith(b"PAR1"):
        return "parquet"
    _refuse_packed(head)
    suffix = path.suffix.lower()
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if SUFFIXES.get(suffix) == "parquet":
        raise RowInvalid("format_invalid", "it is named Parquet, but does not begin with PAR1.", "write it once more")
    if SUFFIXES.get(suffix) == "json":
        return "jsonl" if first == b"{" and _is_lines(file) else "json"
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    if first in (b"{", b"["):
        return "jsonl" if first == b"{" and _is_lines(file) else "json"
    known = " ".join(SUFFIXES)
    raise RowInvalid(
        "format_invalid", "neither its name nor its first bytes say what it is.", f"name it one of {known}"
    )


def json_lines(file: BinaryIO) -> Iterator[Record]:
    """One row a line; empty lines are none."""
    number = 0
    for line, text in _lines(file):
        if text is not None and not text.strip():
            continue
        number += 1
        try:
            yield Record(line, number, decode_line(text, line))
        except RowInvalid as error:
            yield Record(line, number, error=error)


def decode_line(text: bytes | None, line: int) -> Any:
    """The value of one line, None standing for one that is too long to be read; raises RowInvalid."""
    if text is None:
        raise RowInvalid(
            "row_too_long", f"the line is longer than {LONGEST_LINE_BYTES:,} bytes, the most that is read."
        )
    try:
        return decode(text.decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise RowInvalid("not_utf8", f"byte {error.start} is not UTF-8.", "save the file as UTF-8") from None


def json_rows(file: BinaryIO) -> Iterator[Record]:
    """The rows of a list, or of the one list in an object; an object that is itself a row is the only one."""
    content = file.read(LARGEST_JSON_BYTES + 1)
    if len(content) > LARGEST_JSON_BYTES:
        limit = f"the file is larger than {LARGEST_JSON_BYTES:,} bytes, the most that is read of JSON."
        raise RowInvalid("row_too_long", limit, "write it as JSON Lines, one row a line")
    text = _utf8(content)
    start = _rows_at(text)
    if start is None:
        yield _element(text, 0, len(text), 1, 1)
    else:
        yield from _elements(text, start)


def not_utf8(content: bytes) -> RowInvalid:
    """The error for a file that is not UTF-8: its first line that is none, and how many more there are."""
    lines = [number for number, line in enumerate(content.split(b"\n"), start=1) if not _is_utf8(line)]
    more = f" and {len(lines) - 1:,} more lines" if len(lines) > 1 else ""
    return RowInvalid(
        "not_utf8",
        f"line {lines[0]:,}{more} are not UTF-8." if more else f"line {lines[0]:,} is not UTF-8.",
        "save it as UTF-8, in Excel as 'CSV UTF-8'; or: iconv -f WINDOWS-1252 -t UTF-8",
    )


def _refuse_packed(head: bytes) -> None:
    for magic, name in PACKED.items():
        if head.startswith(magic):
            raise RowInvalid("format_invalid", f"it is {name}, which is not read.", "unpack it, or save it as CSV")
    for mark, name in MARKS.items():
        if head.startswith(mark):
            raise RowInvalid("not_utf8", f"it is {name}.", "save it as UTF-8; or: iconv -f UTF-16 -t UTF-8")
    if head.count(0) * 4 > len(head):  # a NUL here and there is an error of its row
        raise RowInvalid("not_utf8", "it is full of NUL bytes: UTF-16 without a mark, or no text.", "save it as UTF-8")


def _is_lines(file: BinaryIO) -> bool:
    """Whether the first line is an object by itself and something follows it."""
    lines = (text for _, text in _lines(file) if text is None or text.strip())
    first, second = next(lines, None), next(lines, None)
    file.seek(0)
    if first is None or second is None:
        return False
    try:
        return isinstance(decode_line(first, 1), dict)
    except RowInvalid as error:
        return error.code == "duplicate_key"


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Each line with its number from 1; None for one that is too long, of which only a part is held at a time."""
    number = 0
    while text := file.readline(LONGEST_LINE_BYTES + 1):
        number += 1
        if len(text) <= LONGEST_LINE_BYTES or text.endswith(b"\n"):
            yield number, text
            continue
        while text and not text.endswith(b"\n"):
            text = file.readline(LONGEST_LINE_BYTES)
        yield number, None


def _utf8(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise not_utf8(content) from None


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


_SPACE = re.compile(r"[ \t\r\n]*")


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _rows_at(text: str) -> int | None:
    """Where the list of rows begins; None where the whole is one row."""
    start = _skip(text, 0)
    if start == len(text):
        raise RowInvalid("no_rows", "the file is empty.")
    if text[start] == "[":
        return start
    if text[start] != "{":
        raise RowInvalid("json_invalid", "it is neither a JSON list nor an object.")
    members = list(_members(text, start))
    if any(key in deciding for key, _ in members for deciding in DECIDING.values()):
        return None
    lists = [(key, at) for key, at in members if text[at] == "["]
    if len(lists) != 1:
        names = ", ".join(key for key, _ in lists or members) or "nothing"
        raise RowInvalid("row_invalid", f"the object must hold one list of rows; it holds {names}.")
    return lists[0][1]


def _members(text: str, at: int) -> Iterator[tuple[str, int]]:
    """The keys of the object at `at`, each with where its value begins; raises RowInvalid where it is broken."""
    at = _skip(text, at + 1)
    while text[at : at + 1] == '"':
        end = extent(text, at)
        key, at = str(decode(text[at:end])), _skip(text, end)
        if text[at : at + 1] != ":":
            raise _broken(text, at, "':'")
        start = _skip(text, at + 1)
        yield key, start
        at = _skip(text, extent(text, start))
        if text[at : at + 1] != ",":
            break
        at = _skip(text, at + 1)
    if text[at : at + 1] != "}":
        raise _broken(text, at, "'}'")


def _elements(text: str, at: int) -> Iterator[Record]:
    """The elements of the list at `at`, each by its line and number."""
    line, counted, number = 1, 0, 0
    at = _skip(text, at + 1)
    if text[at : at + 1] == "]":
        return
    while True:
        line, counted, number = line + text.count("\n", counted, at), at, number + 1
        try:
            end = extent(text, at)
        except RowInvalid as error:
            message = f"index {number - 1}: {error.message} What follows cannot be read."
            yield Record(line, number, error=RowInvalid(error.code, message))
            return
        yield _element(text, at, end, line, number)
        at = _skip(text, end)
        if text[at : at + 1] != ",":
            break
        at = _skip(text, at + 1)
    if text[at : at + 1] != "]":
        yield Record(line, number + 1, error=_broken(text, at, "',' or ']'"))


def _element(text: str, start: int, end: int, line: int, number: int) -> Record:
    try:
        return Record(line, number, decode(text[start:end]))
    except RowInvalid as error:
        return Record(line, number, error=error)


def _broken(text: str, at: int, expected: str) -> RowInvalid:
    line = text.count("\n", 0, at) + 1
    return RowInvalid("json_invalid", f"not JSON: expected {expected} in line {line}.", "the file may be cut short")
