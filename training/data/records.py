"""The records of data as they were found, for commands that write rows on: every column kept, in the file's order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.data.columns import Columns
from training.data.formats import data_files, records
from training.data.jsonfiles import detect_format
from training.data.rows import Place
from training.data.tables import parquet_rows


def whole_records(path: Path, columns: Columns) -> Iterator[tuple[Place, Any]]:
    """Each row's place and value, its columns under their known names; raises RowInvalid for one that is broken."""
    for file in data_files(path)[0]:
        name = str(file.relative_to(path)) if file != path else path.name
        with file.open("rb") as opened:
            written = detect_format(file, opened)
            is_parquet = written == "parquet"
            found = parquet_rows(opened, columns, whole=True) if is_parquet else records(opened, written, columns)
            for record in found:
                if record.error is not None:
                    raise record.error
                yield Place(name, record.line, record.number), record.value


def as_line(value: Any) -> str:
    """A record as one line of JSON Lines; what JSON has not (a table's dates) as text."""
    return json.dumps(value, ensure_ascii=False, default=str) + "\n"
