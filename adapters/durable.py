"""What is written survives a power cut: a file by its own fsync, its name by an fsync of the folder that lists it."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """fsync a file's content or a folder's entries, once: after a failed fsync what the disk holds is unknown."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, content: bytes) -> None:
    """Write and fsync a new file."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Give the file this content in one step: after a kill or a power cut it has the old one or this."""
    staged = path.with_name(f".{path.name}.partial")
    staged.write_bytes(content)
    sync(staged)
    staged.replace(path)
    sync(path.parent)
