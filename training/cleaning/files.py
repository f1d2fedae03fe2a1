"""One file that appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from adapters.durable import sync
from adapters.errors import OutputExists
from adapters.store import disk_errors
from training.staging import lock_run


@contextmanager
def whole_file(path: Path, *, private: bool = False, replaces: bool = False) -> Iterator[TextIO]:
    """A text file that gets its name when the block ends; `private` ones are their owner's alone from the first byte.

    Raises OutputExists where something is there already, unless it `replaces` that; AlreadyRunning, StorageFull.
    """
    if path.exists() and not replaces:
        raise OutputExists(f"{path} exists: choose another --out, or remove it.", param="out")
    partial = path.with_name(f".{path.name}.partial")
    with lock_run(path), disk_errors(path):
        partial.unlink(missing_ok=True)
        try:
            mode = 0o600 if private else 0o666
            with open(partial, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, mode)) as file:
                yield file
            sync(partial)
            partial.rename(path)
            sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)
