"""The words of a source: an adapter that lies there, its files with what tells a change, and what may be fetched.

A source says what is there (`look`, `find`) and copies files into a folder of ours (`fetch`). It checks no content:
what was fetched goes through the same checks as an upload. All is synchronous and may wait for a network or a disk.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from adapters.errors import AdapterRefused, PayloadTooLarge, Problem
from adapters.inspect import ALLOWED_FILES, CONFIG_FILE, MLX_WEIGHTS_FILE, UNSAFE_WEIGHTS, WEIGHTS_FILE

FETCHED = (*ALLOWED_FILES, MLX_WEIGHTS_FILE)  # nothing else is ever read, whatever lies beside it
MAX_ENTRIES = 50_000  # what one look lists; more means a source that was pointed at the wrong place
CHUNK_BYTES = 1 << 20


class Stopped(Exception):
    """The server ends; what was being fetched is of no use any more."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of an adapter in a source. `mark` is another one when the file's content may be another."""

    name: str
    size_bytes: int
    mark: str


@dataclass(frozen=True, slots=True)
class Found:
    """One adapter in a source. `inner` is its place there, `location` the same as a URL, `name` its last folder."""

    name: str
    inner: str
    location: str
    files: tuple[SourceFile, ...]
    problem: str = ""  # why its files cannot be fetched as they lie
    unsafe: str = ""  # a pickle that lies where the weights should

    @property
    def is_adapter(self) -> bool:
        """A config and weights lie there."""
        names = {file.name for file in self.files}
        return CONFIG_FILE in names and bool(names & {WEIGHTS_FILE, MLX_WEIGHTS_FILE})

    @property
    def fingerprint(self) -> str:
        """The same for as long as nothing there changes."""
        lines = sorted(f"{file.name} {file.size_bytes} {file.mark}" for file in self.files)
        return hashlib.sha256("\n".join((*lines, self.problem)).encode()).hexdigest()


class Source(Protocol):
    """What all kinds of sources do."""

    settle_seconds: float  # two looks this far apart must agree before a file counts as written

    def inner(self, text: str) -> str | None:
        """The place inside the source that a path or URL names; None when it names nothing in here.

        Raises InvalidRequest when it is in here and cannot be right.
        """

    def look(self) -> list[Found]:
        """Every adapter that lies there now, by name; raises SourceUnavailable."""

    def find(self, inner: str) -> Found:
        """What lies at one place; raises NotFound, SourceUnavailable."""

    def fetch(self, found: Found, folder: Path, stop: threading.Event) -> None:
        """Copy its files into the folder; raises SourceChanged when they are not what was found, Stopped."""


def unsafe_of(names: Iterable[str]) -> str:
    """The pickle among the names, where there is one."""
    return next((name for name in UNSAFE_WEIGHTS if name in names), "")


def check_fetchable(found: Found, weights_bytes: int, config_bytes: int) -> None:
    """Raises, before a byte is fetched: AdapterRefused without both files, PayloadTooLarge over a limit."""
    if found.problem:
        problem = Problem("file_not_allowed", found.name, found.problem)
        raise AdapterRefused(f"{found.location} {found.problem}.", problems=(problem,))
    if not found.is_adapter:
        raise AdapterRefused(f"{found.location} holds no adapter.", problems=_missing(found))
    for file in found.files:
        limit = weights_bytes if file.name.endswith(".safetensors") else config_bytes
        if file.size_bytes > limit:
            raise PayloadTooLarge(
                f"{file.name} in {found.location} has {file.size_bytes} bytes; at most {limit} are taken.",
                param=file.name,
            )


def check_stop(stop: threading.Event) -> None:
    if stop.is_set():
        raise Stopped


def _missing(found: Found) -> tuple[Problem, ...]:
    names = {file.name for file in found.files}
    problems = []
    if CONFIG_FILE not in names:
        advice = "Name the folder that save_pretrained() wrote."
        problems.append(Problem("file_missing", CONFIG_FILE, "is not there", advice))
    if not names & {WEIGHTS_FILE, MLX_WEIGHTS_FILE}:
        advice = "Save it with model.save_pretrained(folder, safe_serialization=True)."
        code, message = ("format_not_allowed", "is a pickle") if found.unsafe else ("file_missing", "is not there")
        problems.append(Problem(code, found.unsafe or WEIGHTS_FILE, message, advice))
    return tuple(problems)
