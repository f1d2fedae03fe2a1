"""Where exports lie on the disk: results under their names, and beside each what its work needs.

export-<24 hex>          a result, whole
.export-<24 hex>.work    weight files that are finished, kept from one attempt to the next
.export-<24 hex>.json    what the process was told, .log what it complained
.export-<24 hex>.<random>.gone    a result that somebody still reads while it goes
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import NotFound
from adapters.export import MANIFEST
from adapters.staging import sweep_partial

RESULT = re.compile(r"export-[0-9a-f]{24}", re.ASCII)
OURS = re.compile(r"\.(export-[0-9a-f]{24})\.(work|json|log)", re.ASCII)
GONE = re.compile(r"\.export-[0-9a-f]{24}\.[0-9a-f]{12}\.gone", re.ASCII)


@dataclass(frozen=True, slots=True)
class WorkPlace:
    """The paths of one piece of work."""

    out: Path
    work: Path
    spec: Path
    log: Path


class Results:
    """The folder `root`. `lock` is held while rows and folders are brought together: neither may change meanwhile."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = threading.RLock()
        self._readers: Counter[int] = Counter()  # by the inode of the folder, which stays when it is renamed
        self._counting = threading.Lock()

    def place(self, name: str) -> WorkPlace:
        hidden = self.root / f".{name}"
        return WorkPlace(
            self.root / name,
            hidden.with_name(f".{name}.work"),
            hidden.with_name(f".{name}.json"),
            hidden.with_name(f".{name}.log"),
        )

    def is_whole(self, name: str, files: Mapping[str, Any]) -> bool:
        """The result has its manifest and all of these files (name -> `size_bytes`), of their size."""
        try:
            with os.scandir(self.root / name) as entries:
                sizes = {entry.name: entry.stat().st_size for entry in entries}
        except OSError:
            return False
        return MANIFEST in sizes and all(sizes.get(file) == entry["size_bytes"] for file, entry in files.items())

    @contextmanager
    def reading(self, name: str) -> Iterator[int]:
        """A handle of the result's folder, whose files can be read through it even if the result goes meanwhile.

        Raises NotFound where it is not there any more.
        """
        with self._counting:
            try:
                handle = os.open(self.root / name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError:
                raise NotFound("The files of this export are no longer there: order it again.", param="id") from None
            inode = os.fstat(handle).st_ino
            self._readers[inode] += 1
        try:
            yield handle
        finally:
            os.close(handle)
            with self._counting:
                self._readers[inode] -= 1
                if not self._readers[inode]:
                    del self._readers[inode]

    def set_aside(self, waited: Set[str], kept: Set[str]) -> set[str]:
        """Take results that no order has, and work that none waits for, out of their names; what of `kept` is missing.

        With `lock` held since the two were asked for.
        """
        found = {path.name: path for path in self.root.iterdir()}
        for name, path in found.items():
            ours = OURS.fullmatch(name)
            if RESULT.fullmatch(name) and name not in waited | kept:
                self._set_aside(path, name)
            elif ours and ours[1] not in waited:
                self._set_aside(path, ours[1])
        return set(kept - found.keys())

    def free(self, name: str) -> None:
        """Take what lies under a result's name out of it; who reads it reads on."""
        with self.lock:
            if (self.root / name).is_dir():
                self._set_aside(self.root / name, name)
        self.clear()

    def clear(self) -> None:
        """Remove what was set aside and nobody reads any more."""
        with self._counting:
            gone = [path for path in self.root.iterdir() if GONE.fullmatch(path.name)]
            gone = [path for path in gone if path.stat().st_ino not in self._readers]
        for path in gone:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def open(self) -> None:
        """Make the folder ready for a server that starts: what a killed process left half done goes."""
        self.root.mkdir(parents=True, exist_ok=True)
        sweep_partial(self.root)
        for spec in self.root.glob(".*.spec.json"):  # of an older release
            spec.unlink()

    def _set_aside(self, path: Path, name: str) -> None:
        """Its name is free at once, whoever still reads it."""
        path.rename(self.root / f".{name}.{secrets.token_hex(6)}.gone")
