"""What of a result is answered with: the whole folder as a tar, or one file of it, as its manifest has them."""

from __future__ import annotations

import hashlib
import json
import os
from functools import partial

from adapters.errors import NotFound, StorageDamaged
from adapters.export import MANIFEST
from adapters.export_rows import ExportRow
from server.content import Content, ContentResponse, FilePart
from server.export_results import Results
from server.tar import LAYOUT, tar_parts

MAX_MANIFEST_BYTES = 64 << 20


def content_response(results: Results, row: ExportRow, file: str | None) -> ContentResponse:
    """The answer to a request for the result of an order, or for one file of it."""
    return ContentResponse(results.reading(row.result), partial(content_of, row=row, file=file))


def content_of(folder: int, *, row: ExportRow, file: str | None) -> Content:
    """The content of a result, whose folder is open; raises NotFound for a file that it has not, StorageDamaged."""
    manifest = _manifest(folder, row)
    entries = json.loads(manifest)["files"]
    sizes = {name: int(entry["size_bytes"]) for name, entry in entries.items()} | {MANIFEST: len(manifest)}
    digests = {name: str(entry["sha256"]) for name, entry in entries.items()} | {MANIFEST: _sha256(manifest)}
    if file is not None and file not in sizes:
        raise NotFound(f"{row.id} has no such file; it has {', '.join(sorted(sizes))}.", param="file")
    for name in sizes if file is None else (file,):
        _check_size(folder, name, sizes[name], row)
    if file is not None:
        return Content((FilePart(file, sizes[file]),), f'"{digests[file]}"', file)
    etag = f'"tar{LAYOUT}-{digests[MANIFEST]}"'
    return Content(tar_parts(sizes), etag, f"{row.ref.replace('@', '-')}.tar", "application/x-tar")


def _manifest(folder: int, row: ExportRow) -> bytes:
    try:
        with os.fdopen(os.open(MANIFEST, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder), "rb") as file:
            return file.read(MAX_MANIFEST_BYTES)
    except OSError:
        raise _damaged(row, MANIFEST) from None


def _check_size(folder: int, name: str, size_bytes: int, row: ExportRow) -> None:
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False).st_size
    except OSError:
        raise _damaged(row, name) from None
    if found != size_bytes:
        raise _damaged(row, name)


def _damaged(row: ExportRow, name: str) -> StorageDamaged:
    return StorageDamaged(f"{name} of {row.id} has changed on the disk: delete the export and order {row.ref} again.")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
