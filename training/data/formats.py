"""Reads a data file, or a folder of them, as rows. Every bad row of every file is reported at once."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from adapters.errors import DataInvalid, Problem
from training.data.columns import Columns
from training.data.forms import TITLES, parse_row
from training.data.jsonfiles import FORMATS, SUFFIXES, Record, detect_format, json_lines, json_rows
from training.data.jsontext import RowInvalid
from training.data.rows import Place, Row
from training.data.tables import csv_rows, parquet_rows

MOST_PROBLEMS = 10_000  # of bad rows, that many are kept with their reasons; all are counted
READERS: dict[str, Callable[[BinaryIO], Iterator[Record]]] = {"jsonl": json_lines, "json": json_rows}
TABLES: dict[str, Callable[[BinaryIO, Columns], Iterator[Record]]] = {"csv": csv_rows, "parquet": parquet_rows}
PACKED_SUFFIXES = {".gz", ".bz2", ".xz", ".zst", ".zip", ".xlsx", ".xls", ".arrow", ".tar", ".tgz"}


@dataclass(frozen=True)
class Source:
    """One file of the data: what it is written in, the forms of its rows, and its digest."""

    name: str
    format: str
    forms: Mapping[str, int]
    digest: str

    @property
    def rows(self) -> int:
        return sum(self.forms.values())

    @property
    def description(self) -> str:
        if len(self.forms) == 1:
            return f"{FORMATS[self.format]}, {TITLES[next(iter(self.forms))]}"
        counted = ", ".join(f"{count:,} {TITLES[form]}" for form, count in self.forms.items())
        return f"{FORMATS[self.format]}, mixed: {counted}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "file": self.name,
            "format": self.format,
            "forms": dict(self.forms),
            "rows": self.rows,
            "digest": self.digest,
        }


@dataclass(frozen=True)
class DataFile:
    """The rows of a file or a folder with a digest over all of it, and what of it means nothing here."""

    path: Path
    rows: list[Row]
    digest: str  # of a folder: over the names and digests of its files
    ignored_keys: Mapping[str, int] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()
    left_aside: tuple[str, ...] = ()  # what a folder holds beside data, and links to folders

    def where(self, row: Row) -> str:
        """The row's path and line, as problems cite it."""
        return f"{self.path / row.place.source if self.path.is_dir() else self.path}:{row.place.line}"

    def source(self, row: Row) -> Source:
        """The file that the row is from."""
        return next(source for source in self.sources if source.name == row.place.source)

    @property
    def description(self) -> str:
        """The detected form, or one for each file where they differ."""
        kinds = list(dict.fromkeys(source.description for source in self.sources))
        if len(self.sources) == 1:
            return kinds[0]
        if len(kinds) == 1:
            return f"{len(self.sources)} files, {kinds[0]}"
        return "; ".join(f"{source.name}: {source.description}" for source in self.sources)


@dataclass(frozen=True)
class Reading:
    """What could be read of the data, and what of its `records` could not: `problems` are the first of the `bad`."""

    file: DataFile
    problems: tuple[Problem, ...]
    bad: int
    records: int

    def error(self) -> DataInvalid:
        """The one error for all of the problems."""
        if self.records:
            return bad_rows(self.file.path, list(self.problems), max(self.records, self.bad), self.bad)
        what = self.problems[0].message if self.bad == 1 else f"no file can be read ({_kinds(list(self.problems))})."
        return DataInvalid(f"{self.file.path} cannot be used: {what}", param="data", problems=self.problems)


def read_data(path: Path, columns: Columns | None = None) -> DataFile:
    """All rows of a file or folder, whatever their form; raises DataInvalid with every problem, by file and line."""
    reading = read_rows(path, columns)
    if reading.bad:
        raise reading.error()
    return reading.file


def read_rows(path: Path, columns: Columns | None = None) -> Reading:
    """The rows that can be read, and the problems of the others; raises DataInvalid where there is no file of data."""
    columns = columns or Columns()
    files, left_aside = data_files(path)
    rows: list[Row] = []
    ignored: Counter[str] = Counter()
    problems, sources, records = _Problems(), [], 0
    for file in files:
        name = str(file.relative_to(path)) if file != path else path.name
        before = len(rows)
        try:
            source, found = _read_file(file, name, _Read(columns, rows, ignored, problems))
        except RowInvalid as error:
            problems.add(f"{file}:1", error)
            continue
        records += found
        if found == 0:
            problems.add(f"{file}:1", no_rows())
        elif len(rows) > before:
            sources.append(source)
    if columns.unmet and not problems.count:
        raise DataInvalid(
            f"No row of {path} has the column that --columns names: {', '.join(columns.unmet)}.", param="columns"
        )
    digest = _digest(sources, path) if sources else ""
    whole = DataFile(path, rows, digest, dict(ignored), tuple(sources), tuple(left_aside))
    return Reading(whole, tuple(problems.kept), problems.count, records)


def no_rows() -> RowInvalid:
    """What is wrong with a file without a record."""
    return RowInvalid("no_rows", "the file has no rows.")


def bad_rows(title: Path | str, problems: list[Problem], total: int, count: int | None = None) -> DataInvalid:
    """The one error for data with bad rows; `count` where not all of them are in `problems`."""
    bad = len(problems) if count is None else count
    first = f" The first {len(problems):,} are listed." if bad > len(problems) else ""
    return DataInvalid(
        f"{bad:,} of {total:,} rows of {title} cannot be used ({_kinds(problems)}).{first}",
        param="data",
        problems=tuple(problems),
    )


def _kinds(problems: list[Problem]) -> str:
    codes = Counter(problem.code for problem in problems)
    return ", ".join(f"{amount:,} {code}" for code, amount in codes.most_common(5))


class _Problems:
    """Problems as they are found; beyond MOST_PROBLEMS they are only counted."""

    def __init__(self) -> None:
        self.kept: list[Problem] = []
        self.count = 0

    def add(self, place: str, error: RowInvalid, name: str = "") -> None:
        self.count += 1
        if len(self.kept) < MOST_PROBLEMS:
            self.kept.append(Problem(error.code, place, name + error.message, error.advice))


@dataclass(frozen=True)
class _Read:
    """What reading fills, and how columns are named."""

    columns: Columns
    rows: list[Row]
    ignored: Counter[str]
    problems: _Problems


def records(file: BinaryIO, written: str, columns: Columns) -> Iterator[Record]:
    """The records of an open file of the format, good and bad, under the columns' known names."""
    if written in TABLES:
        yield from TABLES[written](file, columns)
        return
    for record in READERS[written](file):
        yield record if record.error is not None else _renamed(record, columns)


def _renamed(record: Record, columns: Columns) -> Record:
    try:
        return replace(record, value=columns.row(record.value))
    except RowInvalid as error:
        return Record(record.line, record.number, error=error)


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """The file to read; raises RowInvalid where that fails, at once or later."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise RowInvalid("unreadable", f"it cannot be read: {error.strerror or error}.") from error


def _read_file(path: Path, name: str, to: _Read) -> tuple[Source, int]:
    """Append the file's good rows and problems; how many records it has. Raises RowInvalid for an unreadable file."""
    forms: Counter[str] = Counter()
    found = 0
    with opened(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        written = detect_format(path, file)
        for record in records(file, written, to.columns):
            found += 1
            place = Place(name, record.line, record.number)
            try:
                if record.error is not None:
                    raise record.error
                row = parse_row(record.value, place, to.ignored)
            except RowInvalid as error:
                to.problems.add(f"{path}:{record.line}", error, _numbered(written, record.number))
                continue
            forms[row.form] += 1
            to.rows.append(row)
    return Source(name, written, forms, f"sha256:{digest}"), found


def _numbered(written: str, number: int) -> str:
    """What names the row where its line does not: its number, and its index for a program's eyes."""
    if written == "jsonl":
        return ""
    return f"row {number}: " if written == "csv" else f"row {number} (index {number - 1}): "


def data_files(path: Path) -> tuple[list[Path], list[str]]:
    """The data files at a path, sorted, and what else is there; raises DataInvalid where there is none."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise DataInvalid(f"{path} {what}; expected a data file, or a folder of them.", param="data") from error
    if stat.S_ISREG(mode):
        return [path], []
    if not stat.S_ISDIR(mode):
        raise DataInvalid(f"{path} is neither a file nor a folder.", param="data")
    found, left_aside = [], []
    for folder, folders, names in os.walk(path):
        place = Path(folder)
        links = [name for name in folders if (place / name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".") and name not in links]
        left_aside += [str((place / name).relative_to(path)) for name in links]
        for name in names:
            is_data = not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES.keys() | PACKED_SUFFIXES
            if is_data:
                found.append(_regular(place / name))
            elif not name.startswith("."):
                left_aside.append(str((place / name).relative_to(path)))
    if not found:
        raise DataInvalid(f"{path} is a folder without a data file ({' '.join(SUFFIXES)}).", param="data")
    return sorted(found), sorted(left_aside)


def _regular(path: Path) -> Path:
    """The path of a regular file; raises DataInvalid for a pipe, a device or a link that leads nowhere."""
    try:
        is_regular = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        raise DataInvalid(f"{path} cannot be read: {error.strerror}.", param="data") from error
    if not is_regular:
        raise DataInvalid(f"{path} is no regular file.", param="data")
    return path


def _digest(sources: list[Source], path: Path) -> str:
    if path.is_file():
        return sources[0].digest
    lines = "".join(f"{source.digest} {source.name}\n" for source in sources)
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
