"""A result of an export, fetched file by file: gone on where it was cut off, held to its manifest, whole or absent."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import HotshoeError, InvalidRequest, OutputExists, StorageDamaged, StorageFull

if TYPE_CHECKING:
    from server.cli.client import Client

MANIFEST = "manifest.json"
SUFFIX = ".hotshoe-fetch"
MOST_TRIES = 5  # in a row in which nothing came


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file of a result, as its manifest has it."""

    name: str
    size_bytes: int
    sha256: str


def fetch_folder(client: Client, path: str, out: Path, *, shown: bool) -> dict[str, Any]:
    """Fetch the result of the export at `path` into the new folder `out`; the manifest's files.

    What has come lies in a hidden folder beside it, where the next call goes on. Raises OutputExists, AlreadyRunning
    where another process fetches there, StorageDamaged where a file is not what the manifest says, Unreachable, and
    what the server refuses.
    """
    from adapters.durable import write_file
    from adapters.staging import own_folder, publish

    _check_absent(out)
    manifest = _manifest(client, path)
    files = [_wanted(name, entry) for name, entry in json.loads(manifest)["files"].items()]
    place = out.parent / f".{out.name[:100]}{SUFFIX}"
    refusal = f"Another process fetches into {out}, one may at a time: wait for it, or choose another --out."
    try:
        with own_folder(place, refusal):
            _check_absent(out)  # who had the folder before may have finished
            staged = place / path.rpartition("/")[2]
            staged.mkdir(exist_ok=True)
            with _bar(sum(file.size_bytes for file in files), shown) as tell:
                for file in files:
                    _fetch_file(client, path, file, staged / file.name, tell)
            for name in {one.name for one in staged.iterdir()} - {file.name for file in files}:
                (staged / name).unlink()  # of an earlier result of the same export
            write_file(staged / MANIFEST, manifest)
            publish(staged, out)
            shutil.rmtree(place, ignore_errors=True)  # with what came of other exports for the same place
    except OSError as error:
        raise _unwritten(place, error) from error
    return {file.name: {"sha256": file.sha256, "size_bytes": file.size_bytes} for file in files}


def _check_absent(out: Path) -> None:
    if os.path.lexists(out):
        raise OutputExists(f"{out} exists already. Choose another --out, or remove it first.", param="out")


def _manifest(client: Client, path: str) -> bytes:
    import httpx

    from server.cli.client import error_of, unreachable

    try:
        response = client.http.get(f"{path}/content", params={"file": MANIFEST})
    except httpx.HTTPError as error:
        raise unreachable(client.http, error) from error
    if response.is_error:
        raise error_of(response.status_code, response.content)
    return response.content


def _wanted(name: str, entry: Mapping[str, Any]) -> Wanted:
    """A file of the manifest; raises InvalidRequest for a name that would lead out of the folder."""
    if "/" in name or name.startswith(".") or "\0" in name:
        raise InvalidRequest(f"The manifest has a file {name[:80]!r}, which is no plain name.", param="files")
    return Wanted(name, int(entry["size_bytes"]), str(entry["sha256"]))


def _fetch_file(client: Client, path: str, file: Wanted, target: Path, tell: Callable[[str, int], None]) -> None:
    """One file, from where it is; raises StorageDamaged when its bytes are not those of the manifest."""
    from adapters.durable import sync
    from adapters.staging import sha256

    target.touch()
    if target.stat().st_size > file.size_bytes:
        target.write_bytes(b"")
    tell(file.name, target.stat().st_size)
    in_vain = 0
    while (has := target.stat().st_size) < file.size_bytes:
        error = _fetch_rest(client, path, file, target, tell)
        in_vain = 0 if target.stat().st_size > has else in_vain + 1
        if in_vain >= MOST_TRIES:
            raise error or StorageDamaged(f"Of {file.name} the server sends {has} of {file.size_bytes} bytes.")
    found = sha256(target)
    if found != file.sha256 or target.stat().st_size != file.size_bytes:
        target.unlink()
        raise StorageDamaged(
            f"{file.name} came with the sha256 {found}, and the manifest says {file.sha256}: fetch it again.",
            param=file.name,
        )
    sync(target)


def _fetch_rest(
    client: Client, path: str, file: Wanted, target: Path, tell: Callable[[str, int], None]
) -> Exception | None:
    """Append what is lacking; why it was cut off, or None. Raises what the server refuses."""
    import httpx

    from server.cli.client import error_of, unreachable

    has = target.stat().st_size
    headers = {"range": f"bytes={has}-", "if-range": f'"{file.sha256}"', "accept-encoding": "identity"}
    try:
        with client.http.stream("GET", f"{path}/content", params={"file": file.name}, headers=headers) as answer:
            if answer.is_error:
                raise error_of(answer.status_code, answer.read())
            with target.open("ab" if answer.status_code == 206 else "wb") as opened:
                for piece in answer.iter_raw():
                    opened.write(piece)
                    tell(file.name, len(piece))
    except httpx.HTTPError as error:
        return unreachable(client.http, error)
    return None


def _unwritten(staged: Path, error: OSError) -> HotshoeError:
    kind = StorageFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else HotshoeError
    return kind(f"{staged} cannot be written: {error.strerror}. What has come is kept: put that right, run it again.")


@contextmanager
def _bar(total_bytes: int, shown: bool) -> Iterator[Callable[[str, int], None]]:
    """A bar on stderr that grows by the bytes that come."""
    if not shown or not sys.stderr.isatty():
        yield lambda name, size_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total_bytes)
        yield lambda name, size_bytes: progress.update(task, description=name, advance=size_bytes)
