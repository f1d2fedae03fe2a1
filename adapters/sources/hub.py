"""Adapters of one organisation on the Hugging Face Hub, each at a commit: what was looked at is what is fetched.

Two requests of the Hub's HTTP interface are enough: a commit's files with sizes and digests, and a file. So bytes are
bounded while they come, and HF_HUB_OFFLINE, under which engines run, concerns the base only.
https://huggingface.co/docs/hub/api
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import InvalidRequest, NotFound, SourceUnavailable
from adapters.sources import HUB_ENDPOINT
from adapters.sources.found import CHUNK_BYTES, FETCHED, Found, SourceFile, check_stop, unsafe_of
from adapters.store import disk_errors
from adapters.strict_json import JsonInvalid, parse_json

if TYPE_CHECKING:
    import httpx

PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
ORGANISATION = re.compile(rf"hf://(?P<org>{PART})(?:/(?P<repo>{PART})@(?P<commit>[0-9a-f]{{40}}))?", re.ASCII)
MAX_LISTING_BYTES = 4 << 20
TIMEOUT_SECONDS = 30.0
MOVING = (
    "A branch or tag of the Hub moves: what was checked would not be what is fetched next. "
    "Write hf://ORG/REPO@COMMIT with the 40 hex digits of the commit."
)


class HubOrganisation:
    """`hf://ORG`: its repositories, when they are asked for; `hf://ORG/REPO@COMMIT`: that one."""

    settle_seconds = 0.0  # a commit does not change

    def __init__(self, url: str, endpoint: str = HUB_ENDPOINT, token: str | None = None) -> None:
        match = ORGANISATION.fullmatch(url)
        if match is None:
            raise InvalidRequest(f"{url} is neither hf://ORG nor hf://ORG/REPO@COMMIT. {MOVING}", param="url")
        self.organisation = match["org"]
        self.pinned = f"{match['repo']}@{match['commit']}" if match["repo"] else None
        self.endpoint = endpoint.rstrip("/")
        self._token = token

    def inner(self, text: str) -> str | None:
        """`REPO@COMMIT`; raises InvalidRequest for a revision that can move."""
        prefix = f"hf://{self.organisation}/"
        if not text.startswith(prefix):
            return None
        rest = text.removeprefix(prefix)
        if not ORGANISATION.fullmatch(text):
            raise InvalidRequest(MOVING, param="source")
        return rest if self.pinned in (None, rest) else None

    def look(self) -> list[Found]:
        """The pinned adapter; of a whole organisation nothing, as nothing in it is pinned."""
        return [self.find(self.pinned)] if self.pinned else []

    def find(self, inner: str) -> Found:
        repo, _, commit = inner.partition("@")
        location = f"hf://{self.organisation}/{inner}"
        path = f"/api/models/{self.organisation}/{repo}/revision/{commit}?blobs=true"
        with self._get(path) as response:
            raw = b"".join(_bounded(response, MAX_LISTING_BYTES, location))
        try:
            listing = parse_json(raw)
            if listing["sha"] != commit:
                raise SourceUnavailable(f"{location} is answered with another commit.", param="source")
            names = [entry["rfilename"] for entry in listing["siblings"]]
            files = [_file(entry) for entry in listing["siblings"] if entry["rfilename"] in FETCHED]
        except (JsonInvalid, LookupError, TypeError, ValueError) as error:
            raise SourceUnavailable(f"{self.endpoint} does not answer as the Hub does.", param="source") from error
        return Found(repo, inner, location, tuple(files), unsafe=unsafe_of(names))

    def fetch(self, found: Found, folder: Path, stop: threading.Event) -> None:
        repo, _, commit = found.inner.partition("@")
        for file in found.files:
            path = f"/{self.organisation}/{repo}/resolve/{commit}/{file.name}"
            digest = _digest_of(file)
            size = 0
            with self._get(path) as response, (folder / file.name).open("xb") as out:
                for chunk in _bounded(response, file.size_bytes, f"{file.name} of {found.location}"):
                    check_stop(stop)
                    digest.update(chunk)
                    size += len(chunk)
                    with disk_errors(folder):
                        out.write(chunk)
            if (size, digest.hexdigest()) != (file.size_bytes, file.mark):
                raise SourceUnavailable(f"{file.name} of {found.location} did not come whole.", param="source")

    @contextmanager
    def _get(self, path: str) -> Iterator[httpx.Response]:
        """A GET whose body has not been read; raises NotFound, SourceUnavailable. The token stays at the endpoint."""
        import httpx

        headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {self._token}"} if self._token else {})
        try:
            with (
                httpx.Client(
                    timeout=TIMEOUT_SECONDS, follow_redirects=True, max_redirects=5, headers=headers
                ) as client,
                client.stream("GET", self.endpoint + path) as response,
            ):
                self._check(response.status_code)
                yield response
        except httpx.HTTPError as error:
            raise SourceUnavailable(
                f"{self.endpoint} cannot be reached ({type(error).__name__}); it will be asked again.", param="source"
            ) from error

    def _check(self, status: int) -> None:
        if status == 404:
            raise NotFound(f"{self.endpoint} has no such repository, commit or file.", param="source")
        if status in (401, 403):
            raise SourceUnavailable(
                f"{self.endpoint} refuses this server: check the token and what it may read.", param="source"
            )
        if status != 200:
            raise SourceUnavailable(f"{self.endpoint} answers {status}; it will be asked again.", param="source")


def _bounded(response: httpx.Response, limit: int, what: str) -> Iterator[bytes]:
    size = 0
    for chunk in response.iter_bytes(CHUNK_BYTES):
        size += len(chunk)
        if size > limit:
            raise SourceUnavailable(f"{what} is longer than the {limit:,} bytes it should have at most.")
        yield chunk


def _file(entry: dict[str, Any]) -> SourceFile:
    """One file with its digest: the content's SHA-256 where it is large, git's own of a blob where it lies in git."""
    stored = entry.get("lfs")
    if stored:
        return SourceFile(entry["rfilename"], int(stored["size"]), str(stored["sha256"]))
    return SourceFile(entry["rfilename"], int(entry["size"]), str(entry["blobId"]))


def _digest_of(file: SourceFile) -> hashlib._Hash:
    if len(file.mark) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)
