"""A prefix of a bucket in S3 (or what speaks its protocol), GCS or Azure, through obstore: its folders are adapters.

Credentials come from the environment, as obstore reads them (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS,
AZURE_STORAGE_ACCOUNT_KEY, a machine's own role, ...): https://developmentseed.org/obstore/latest/authentication/
"""

from __future__ import annotations

import re
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import ConfigInvalid, InvalidRequest, NotFound, SourceUnavailable
from adapters.sources.folder import changed
from adapters.sources.found import FETCHED, MAX_ENTRIES, Found, SourceFile, check_stop, unsafe_of
from adapters.store import disk_errors

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

RANGE_BYTES = 8 << 20  # one request; what is held in memory
CLIENT = {"connect_timeout": timedelta(seconds=5), "timeout": timedelta(seconds=60)}
RETRIES = {"max_retries": 2, "retry_timeout": timedelta(seconds=30)}


class BucketPrefix:
    """Adapters under one URL: `s3://BUCKET/PREFIX/NAME/adapter_config.json` and its weights."""

    settle_seconds = 2.0  # an object is whole, but a config may come before the weights that belong to it

    def __init__(self, url: str, store: ObjectStore) -> None:
        self.url = url.rstrip("/")
        self.range_bytes = RANGE_BYTES
        self._store: Any = store

    @classmethod
    def open(cls, url: str, options: Mapping[str, str]) -> BucketPrefix:
        """`options` are obstore's own for the store, such as `endpoint` and `region`; raises ConfigInvalid.

        Nothing is asked of the network yet.
        """
        is_plain = options.get("endpoint", "").startswith("http://")
        client = {**CLIENT, "allow_http": True} if is_plain else CLIENT
        try:
            from obstore.store import from_url

            made: Any = from_url
            return cls(url, made(url, config=dict(options), client_options=client, retry_config=RETRIES))
        except ImportError as error:
            raise ConfigInvalid(f"{url} needs the package obstore, which is not installed.", param="sources") from error
        except Exception as error:  # obstore's own base class, and what its options' types raise
            reason = str(error).partition("\n")[0]
            raise ConfigInvalid(f"{url} cannot be opened as a bucket: {reason}", param="sources") from error

    def inner(self, text: str) -> str | None:
        if not text.startswith(f"{self.url}/"):
            return None
        parts = text[len(self.url) + 1 :].rstrip("/").split("/")
        if any(part in ("", ".", "..") or not part.isprintable() for part in parts):
            raise InvalidRequest("Name a folder inside the source, in plain parts.", param="source")
        return "/".join(parts)

    def look(self) -> list[Found]:
        """One listing of the whole prefix, in pages."""
        folders: dict[str, list[ObjectMeta]] = defaultdict(list)
        listed = 0
        with self._failures():
            for page in self._store.list(chunk_size=1000):
                listed += len(page)
                if listed > MAX_ENTRIES:
                    raise SourceUnavailable(
                        f"{self.url} holds more than {MAX_ENTRIES:,} objects: name a narrower prefix."
                    )
                for item in page:
                    folder, slash, name = item["path"].partition("/")
                    if slash and "/" not in name:
                        folders[folder].append(item)
        found = (self._found(folder, folder, items) for folder, items in sorted(folders.items()))
        return [one for one in found if one.is_adapter]

    def find(self, inner: str) -> Found:
        with self._failures():
            objects = self._store.list_with_delimiter(f"{inner}/")["objects"]
        if not objects:
            raise NotFound(f"There is no folder {inner} in the source.", param="source")
        return self._found(inner.rpartition("/")[2], inner, list(objects))

    def fetch(self, found: Found, folder: Path, stop: threading.Event) -> None:
        for file in found.files:
            with (folder / file.name).open("xb") as out:
                for start in range(0, file.size_bytes, self.range_bytes):
                    check_stop(stop)
                    end = min(start + self.range_bytes, file.size_bytes)
                    chunk = self._range(found, file, start, end)
                    with disk_errors(folder):
                        out.write(chunk)

    def _range(self, found: Found, file: SourceFile, start: int, end: int) -> bytes:
        """Bytes of the object that was found: the store is asked for that version of it, where it marks versions."""
        from obstore import exceptions

        options: Any = {"range": (start, end)}
        tag = file.mark.partition(" ")[2]
        if tag:
            options["if_match"] = tag
        with self._failures():
            try:
                result = self._store.get(f"{found.inner}/{file.name}", options=options)
            except (FileNotFoundError, exceptions.PreconditionError) as error:
                raise changed(found, file.name) from error
            if result.meta["size"] != file.size_bytes or tuple(result.range) != (start, end):
                raise changed(found, file.name)
            chunk = bytes(result.bytes())
        if len(chunk) != end - start:
            raise changed(found, file.name)
        return chunk

    def _found(self, name: str, inner: str, objects: list[ObjectMeta]) -> Found:
        by_name = {item["path"].rpartition("/")[2]: item for item in objects}
        files = tuple(_file(file, by_name[file]) for file in FETCHED if file in by_name)
        return Found(name, inner, f"{self.url}/{inner}", files, unsafe=unsafe_of(by_name))

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """What obstore raises, as ours. Its message may hold a signed URL: only the status is told."""
        from obstore import exceptions

        try:
            yield
        except FileNotFoundError as error:
            raise SourceUnavailable(f"{self.url} is not there: there is no such bucket.", param="source") from error
        except exceptions.BaseError as error:
            raise SourceUnavailable(f"{self.url} {_reason(error)}", param="source") from error


def _reason(error: Exception) -> str:
    status = re.search(r"status(?: code)?:? (\d{3})", str(error))
    kind = type(error).__name__.removesuffix("Error")
    if kind in ("PermissionDenied", "Unauthenticated") or (status and status[1] in ("401", "403")):
        return "refuses this server: check the credentials in its environment and what they may read."
    if status:
        return f"answers {status[1]}; it will be asked again."
    return f"cannot be reached or read ({kind}); it will be asked again."


def _file(name: str, item: ObjectMeta) -> SourceFile:
    return SourceFile(name, item["size"], f"{item['last_modified'].timestamp()} {item['e_tag'] or ''}".rstrip(" "))
