"""CSV and Parquet as records: a header or schema first, which has to be of one form, then the rows."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

from training.data.columns import KNOWN, Columns
from training.data.forms import detect
from training.data.jsonfiles import LONGEST_LINE_BYTES, Record, not_utf8
from training.data.jsontext import RowInvalid, kind

DELIMITERS = ",;\t|"
MOST_PARQUET_ROWS = 5_000_000
ROWS_AT_A_TIME = 256


def csv_rows(file: BinaryIO, columns: Columns) -> Iterator[Record]:
    """Rows below a header. The delimiter is the one of `,` `;` tab `|` that makes known columns of the header."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    csv.field_size_limit(LONGEST_LINE_BYTES)  # the module has one limit for all; its own is 131,072
    try:
        header = text.readline(LONGEST_LINE_BYTES)
        text.seek(0)
        delimiter = _delimiter(header, columns)
        yield from _below_header(csv.reader(text, delimiter=delimiter, strict=True), columns)
    except UnicodeDecodeError:
        file.seek(0)
        raise not_utf8(file.read()) from None
    finally:
        text.detach()


def parquet_rows(file: BinaryIO, columns: Columns, *, whole: bool = False) -> Iterator[Record]:
    """The rows of a Parquet file. A null inside a struct is an absent key: there every row has every key.

    Columns that mean nothing here are null, unless `whole`.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise RowInvalid("format_invalid", "reading Parquet needs pyarrow.", "pip install pyarrow") from None
    number = 0
    try:
        table = ParquetFile(file)
        own = table.schema_arrow.names
        names = _checked(columns.names(own))
        read = [before for before, name in zip(own, names, strict=True) if whole or name in KNOWN]
        unread = dict.fromkeys(name for name in names if not whole and name not in KNOWN)
        rows = table.metadata.num_rows
        if rows > MOST_PARQUET_ROWS:
            raise RowInvalid(
                "row_too_long", f"it has {rows:,} rows; at most {MOST_PARQUET_ROWS:,} are read.", "split it"
            )
        for batch in table.iter_batches(ROWS_AT_A_TIME, columns=read):
            for value in _values(batch):
                number += 1
                yield _parquet_record(number, columns.row(value), unread)
    except (ArrowException, OSError) as error:
        after = f" after row {number}" if number else ""
        reason = " ".join(str(error).split())[:200]
        message = f"not Parquet that can be read{after}: {reason}"
        raise RowInvalid("format_invalid", message, "write the file once more") from error


def _below_header(reader: Any, columns: Columns) -> Iterator[Record]:
    number, line = 0, 1
    try:
        header = next(reader, None)
        if header is None:
            return
        names = _checked(columns.names([name.strip().lower() for name in header]))
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                number += 1
                yield _csv_record(line, number, names, cells)
            line = reader.line_num + 1
    except csv.Error as error:
        advice = 'write a quotation mark inside a field as ""; the rows after it cannot be read'
        yield Record(line, number + 1, error=RowInvalid("csv_invalid", f"broken quoting: {error}.", advice))


def _csv_record(line: int, number: int, names: list[str], cells: list[str]) -> Record:
    if len(cells) != len(names):
        message = f"{len(cells)} fields; the header has {len(names)}."
        advice = "put a field that holds the delimiter in quotation marks"
        return Record(line, number, error=RowInvalid("csv_invalid", message, advice))
    return Record(line, number, dict(zip(names, cells, strict=True)))


def _delimiter(header: str, columns: Columns) -> str:
    def known(delimiter: str) -> tuple[int, int]:
        try:
            names = next(csv.reader([header], delimiter=delimiter), [])
        except csv.Error:
            return 0, 0
        return len(KNOWN & {columns.name(name.strip().lower()) for name in names}), len(names)

    return max(DELIMITERS, key=known)


def _checked(names: list[str]) -> list[str]:
    """The names, if no two are equal and they are of one form; raises RowInvalid."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise RowInvalid("duplicate_key", f"the column {twice[0]!r} occurs twice.", "rename one of them")
    detect(names)
    return names


def _values(batch: Any) -> list[Any]:
    """The batch's rows; text that is not UTF-8 makes its row an error and spares the others."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError):  # also UnicodeDecodeError, and times outside of Python's
        return [_value(batch, index) for index in range(batch.num_rows)]


def _value(batch: Any, index: int) -> Any:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return RowInvalid("not_utf8", "its text is not UTF-8.", "write the column as text")
    except (ValueError, OverflowError) as error:
        return RowInvalid("row_invalid", f"a value that cannot be read: {error}.")


def _parquet_record(number: int, value: Any, unread: dict[str, None]) -> Record:
    if isinstance(value, RowInvalid):
        return Record(number, number, error=value)
    try:
        return Record(number, number, {**{name: _present(item) for name, item in value.items()}, **unread})
    except RowInvalid as error:
        return Record(number, number, error=error)


def _present(value: Any) -> Any:
    """The value without the nulls of its structs."""
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_present(item) for item in value]
    if isinstance(value, bytes):
        raise RowInvalid("content_invalid", f"a cell is {kind(value)}, not text.", "write the column as text")
    return value
