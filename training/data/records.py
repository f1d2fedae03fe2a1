"""The records of data as they were found, for commands that write rows on: every column kept, in the file's order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapters.errors import DataInvalid
from training.data.columns import Columns
from training.data.formats import DataFile, data_files, no_rows, opened, records
from training.data.jsonfiles import Record, detect_format
from training.data.jsontext import RowInvalid
from training.data.rows import Place
from training.data.tables import parquet_rows


def whole_records(path: Path, columns: Columns) -> Iterator[tuple[Place, Record]]:
    """Each record with its place, good or bad, its columns under their known names."""
    for file in data_files(path)[0]:
        name = str(file.relative_to(path)) if file != path else path.name
        for record in _records(file, columns):
            yield Place(name, record.line, record.number), record


def _records(path: Path, columns: Columns) -> Iterator[Record]:
    """The records of one file; what is wrong with the file itself is one more, and bad."""
    record = None
    try:
        with opened(path) as file:
            written = detect_format(path, file)
            is_parquet = written == "parquet"
            rows = parquet_rows(file, columns, whole=True) if is_parquet else records(file, written, columns)
            for record in rows:
                yield record
        if record is None:
            raise no_rows()
    except RowInvalid as error:
        yield Record(1, 1, error=error)


def kept_records(file: DataFile, columns: Columns) -> Iterator[tuple[int | None, Any]]:
    """Of each record the index of its row and its value; index and value are None where the record made no row.

    Raises DataInvalid where the data is not what `file` was read from any more.
    """
    rows = enumerate(file.rows)
    index, row = next(rows, (None, None))
    for place, record in whole_records(file.path, columns):
        if row is not None and row.place == place:
            yield index, record.value
            index, row = next(rows, (None, None))
        else:
            yield None, None
    if row is not None:
        raise DataInvalid(f"{file.path} changed while it was read: begin again.", param="data")


def as_line(value: Any) -> str:
    """A record as one line of JSON Lines; what JSON has not (a table's dates) as text."""
    return json.dumps(value, ensure_ascii=False, default=str) + "\n"
