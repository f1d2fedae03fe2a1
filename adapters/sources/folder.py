"""A folder on this machine whose sub-folders are adapters. Whoever may write into it is no more than an uploader.

Links are followed inside the root only: a path is resolved, held against the root, and then walked from the root's own
handle without following any, so that a link that is put there in between leads nowhere.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, unquote, urlsplit

from adapters.errors import InvalidRequest, NotFound, SourceChanged, SourceUnavailable
from adapters.header import MAX_HEADER_BYTES, MAX_VALUES
from adapters.inspect import CONFIG_FILE
from adapters.sources.found import CHUNK_BYTES, FETCHED, MAX_ENTRIES, Found, SourceFile, check_stop, unsafe_of
from adapters.store import disk_errors
from adapters.strict_json import JsonInvalid, parse_json

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe must not hold the reader up
WAIT_FOR_REST_SECONDS = 900.0  # a file that is short of its own header and older than this is cut off, not on its way


class Unusable(Exception):
    """Something that lies there and is not to be opened; the message says what of it."""


class WatchedFolder:
    """Adapters under one root: `root/NAME/adapter_config.json` and its weights; by `find` at any depth."""

    settle_seconds = 2.0

    def __init__(self, root: Path) -> None:
        self.root = root

    def inner(self, text: str) -> str | None:
        """Of an absolute path or a file:// URL, as the root is written or as it resolves."""
        path = _path_of(text)
        if path is None:
            return None
        for root in (self.root, Path(os.path.realpath(self.root))):
            if path == str(root) or path.startswith(f"{root}/".replace("//", "/")):
                parts = [part for part in path[len(str(root)) :].split("/") if part not in ("", ".")]
                if ".." in parts:
                    return None  # whether that is inside depends on links; the plain way to write it is always there
                if not parts:
                    raise InvalidRequest("Name a folder inside the source, not the source itself.", param="source")
                return "/".join(parts)
        return None

    def look(self) -> list[Found]:
        with self._opened(()) as handle:
            names = _names(handle)
        if len(names) > MAX_ENTRIES:
            raise SourceUnavailable(f"{self.root} has {len(names):,} entries; at most {MAX_ENTRIES:,} are looked at.")
        found = (self._found(name) for name in sorted(names) if not name.startswith("."))
        return [one for one in found if one is not None and (one.is_adapter or one.problem)]

    def find(self, inner: str) -> Found:
        found = self._found(inner)
        if found is None:
            raise NotFound(f"There is no folder {inner} in the source.", param="source")
        return found

    def fetch(self, found: Found, folder: Path, stop: threading.Event) -> None:
        for file in found.files:
            try:
                with self._file(found.inner, file.name) as source:
                    if file.name.endswith(".safetensors"):
                        _check_whole(source, found, file)
                    with disk_errors(folder):
                        is_whole = _copied(source, folder / file.name, file.size_bytes, stop)
                    if not is_whole or _described(source, file.name) != file:
                        raise changed(found, file.name)
            except (Unusable, OSError) as error:
                raise changed(found, file.name) from error

    def _found(self, inner: str) -> Found | None:
        """What lies there, also what cannot be used, with the reason; None where there is no folder."""
        name, location = inner.rpartition("/")[2], f"file://{quote(f'{self.root}/{inner}')}"
        try:
            with self._opened(self._resolved(tuple(inner.split("/")))) as handle:
                names = _names(handle)
            files = [self._stat(inner, file) for file in FETCHED if file in names]
        except Unusable as error:
            return Found(name, inner, location, (), problem=str(error))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # so no folder can have it
                return None
            return Found(name, inner, location, (), problem=f"cannot be read: {error.strerror}")
        return Found(name, inner, location, tuple(files), unsafe=unsafe_of(names) if CONFIG_FILE in names else "")

    def _stat(self, inner: str, name: str) -> SourceFile:
        with self._file(inner, name) as file:
            return _described(file, name)

    @contextmanager
    def _file(self, inner: str, name: str) -> Iterator[BinaryIO]:
        """The open file; raises Unusable, OSError."""
        parts = self._resolved((*inner.split("/"), name))
        with self._opened(parts[:-1]) as handle:
            descriptor = os.open(parts[-1], FILE, dir_fd=handle)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise Unusable(f"holds a {name} that is not a regular file")
        with os.fdopen(descriptor, "rb") as file:
            yield file

    @contextmanager
    def _opened(self, parts: tuple[str, ...]) -> Iterator[int]:
        """A handle on a folder inside the root, walked to without following a link; raises SourceUnavailable."""
        try:
            handle = os.open(os.path.realpath(self.root), FOLDER)
        except OSError as error:
            raise SourceUnavailable(f"{self.root} cannot be read: {error.strerror}.") from error
        try:
            for part in parts:
                inside = os.open(part, FOLDER, dir_fd=handle)
                os.close(handle)
                handle = inside
            yield handle
        finally:
            os.close(handle)

    def _resolved(self, parts: tuple[str, ...]) -> tuple[str, ...]:
        """The same place without links; raises Unusable."""
        root = Path(os.path.realpath(self.root))
        real = Path(os.path.realpath(root.joinpath(*parts)))
        if not real.is_relative_to(root):
            raise Unusable("is a link, or holds one, that leads out of the source")
        return real.relative_to(root).parts


def changed(found: Found, name: str) -> SourceChanged:
    return SourceChanged(f"{name} in {found.location} changed while it was read: try again once it is written.")


def _path_of(text: str) -> str | None:
    if text.startswith("file://"):
        url = urlsplit(text)
        text = unquote(url.path) if url.netloc in ("", "localhost") else ""
    return text if text.startswith("/") and "\0" not in text else None


def _described(file: BinaryIO, name: str) -> SourceFile:
    details = os.fstat(file.fileno())
    return SourceFile(name, details.st_size, f"{details.st_ino}-{details.st_mtime_ns}")


def _check_whole(file: BinaryIO, found: Found, known: SourceFile) -> None:
    """Raises SourceChanged while a safetensors file is shorter than its own header says, and young."""
    wanted = _expected_bytes(file)
    file.seek(0)
    age_seconds = time.time() - os.fstat(file.fileno()).st_mtime
    if known.size_bytes < wanted and age_seconds < WAIT_FOR_REST_SECONDS:
        raise SourceChanged(
            f"{known.name} in {found.location} has {known.size_bytes:,} of {wanted:,} bytes: it is still being written."
        )


def _expected_bytes(file: BinaryIO) -> int:
    """How long the header says that the file is; 0 where it says nothing that can be read: the checks say why."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        return 0 if length else 8
    raw = file.read(length)
    if len(raw) < length:
        return 8 + length
    try:
        entries = parse_json(raw, max_values=MAX_VALUES)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        return 8 + length + max((end for end in ends if isinstance(end, int)), default=0)
    except (JsonInvalid, AttributeError, TypeError, LookupError):
        return 0


def _copied(source: BinaryIO, path: Path, size_bytes: int, stop: threading.Event) -> bool:
    """Copy no more than the file had when it was found; False when it has more or fewer bytes now."""
    left = size_bytes
    with path.open("xb") as out:
        while left and (chunk := source.read(min(left, CHUNK_BYTES))):
            check_stop(stop)
            out.write(chunk)
            left -= len(chunk)
    return left == 0 and not source.read(1)


def _names(handle: int) -> list[str]:
    with os.scandir(handle) as entries:
        return [entry.name for entry in entries]
