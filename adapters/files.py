"""Files from the first byte to the last: rows and bytes together, so that whatever moment a process dies at they agree.

A file's bytes are in place before its row and gone after it. So bytes without a row are litter, which the next start
sweeps; a row without bytes is damage, which no interruption causes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from adapters.errors import DigestInvalid, HotshoeError, InvalidRequest, LengthMismatch, StorageDamaged
from adapters.file_rows import (
    PURPOSES,
    UPLOAD_SECONDS,
    FileRow,
    Owner,
    PartRow,
    UploadRow,
    UploadStatus,
    new_id,
)
from adapters.file_store import FileStore, Joined
from adapters.registry import Registry

MAX_FILENAME, MAX_MIME_TYPE = 255, 255
MIN_FILE_SECONDS, MAX_FILE_SECONDS = 3600, 30 * 24 * 3600


@dataclass(frozen=True, slots=True)
class NewFile:
    """What a sender says of a file. `seconds` is how long it shall be kept, None for as long as nobody deletes it."""

    purpose: str
    filename: str
    seconds: int | None = None


@dataclass(frozen=True, slots=True)
class NewUpload:
    """What a sender says of a file that is to come in parts; the digest is of the whole."""

    file: NewFile
    mime_type: str
    size_bytes: int
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class Content:
    """Bytes that were received: where they are staged, how many, and their `sha256:...`."""

    staged: Path
    size_bytes: int
    digest: str


class Files:
    """The files of one state folder. Synchronous and safe to call from many threads of one process."""

    def __init__(self, registry: Registry, store: FileStore) -> None:
        self.registry = registry
        self.store = store

    def add(self, owner: Owner, new: NewFile, content: Content) -> FileRow:
        """Make staged bytes a file; raises PayloadTooLarge, QuotaExceeded or StorageFull, and then keeps nothing."""
        check_file(new)
        return self.add_own(owner, new, content)

    def add_own(self, owner: Owner, new: NewFile, content: Content) -> FileRow:
        """A file that this server makes itself; raises what `add` does of room."""
        file = _file_row(owner, new, content.size_bytes, content.digest)
        self.store.seal(content.staged)
        with self.store.exclusive():
            self.store.keep(content.staged, self.store.path(file.id))
            try:
                return self.registry.add_file(file)
            except HotshoeError:
                self._drop_without_row(file.id)
                raise

    def open(self, owner: Owner, file_id: str, purpose: str | None = None) -> tuple[FileRow, Path]:
        """A file and where its bytes are; raises NotFound, InvalidRequest when it was sent for another purpose,
        StorageDamaged when its bytes are gone.
        """
        file = self.registry.get_file(owner, file_id)
        if purpose is not None and file.purpose != purpose:
            raise InvalidRequest(
                f"{file.id} was sent for {file.purpose}; this needs purpose {purpose}.", param="file_id"
            )
        path = self.store.path(file.id)
        if not path.is_file():
            self.registry.get_file(owner, file_id)  # it may have been deleted in between
            raise StorageDamaged(f"{file.id} is not on the disk: delete it and send it again.")
        return file, path

    def remove(self, owner: Owner, file_id: str) -> FileRow:
        """Forget a file and remove its bytes; raises NotFound."""
        with self.store.exclusive():
            file = self.registry.delete_file(owner, file_id)
            self.store.delete(file.id)
        return file

    def begin(self, owner: Owner, new: NewUpload) -> UploadRow:
        """Open an upload; raises InvalidRequest, PayloadTooLarge or QuotaExceeded."""
        check_file(new.file)
        if not 0 < len(new.mime_type) <= MAX_MIME_TYPE or not new.mime_type.isprintable():
            raise InvalidRequest(f"mime_type must have 1 to {MAX_MIME_TYPE} printable characters.", param="mime_type")
        now = time.time()
        upload = UploadRow(
            id=new_id("upload_"),
            tenant=owner.tenant,
            actor=owner.actor,
            purpose=new.file.purpose,
            filename=new.file.filename,
            mime_type=new.mime_type,
            size_bytes=new.size_bytes,
            digest=new.digest,
            status=UploadStatus.PENDING,
            file_id=None,
            file_seconds=new.file.seconds,
            created_at=now,
            expires_at=now + UPLOAD_SECONDS,
        )
        return self.registry.add_upload(upload)

    def add_part(self, owner: Owner, upload_id: str, content: Content) -> PartRow:
        """Make staged bytes a part of an upload, durably; the same bytes again are the part that is there.

        Raises NotFound, Conflict, LengthMismatch, QuotaExceeded or StorageFull, and then keeps nothing.
        """
        self.store.seal(content.staged)
        part = PartRow(new_id("part_"), owner.tenant, upload_id, content.size_bytes, content.digest, time.time())
        with self.store.exclusive():
            self.registry.check_part(owner, upload_id)
            self.store.keep(content.staged, self.store.part_path(upload_id, part.id))
            try:
                kept = self.registry.add_part(owner, part)
            except HotshoeError:
                with suppress(HotshoeError):  # as in _drop_without_row
                    if not self.registry.has_part(part.id):
                        self.store.delete_part(upload_id, part.id)
                raise
            if kept.id != part.id:
                self.store.delete_part(upload_id, part.id)
        return kept

    def complete(self, owner: Owner, upload_id: str, part_ids: Sequence[str], md5: str | None = None) -> UploadRow:
        """Join the named parts in their order into a file, and end the upload. One that is completed stays as it is.

        Raises NotFound, Conflict, InvalidRequest for parts that are not there, LengthMismatch or DigestInvalid when
        they are not what was declared, StorageFull; the upload stays open then, with all its parts.
        """
        upload = self.registry.get_upload(owner, upload_id)
        if upload.status is UploadStatus.COMPLETED:
            return upload
        upload = self.registry.touch_upload(owner, upload_id)
        named = _named(self.registry.parts(upload_id), part_ids)
        _check_declared(upload, sum(part.size_bytes for part in named))
        folder = self.store.stage()
        try:
            staged = folder / "whole"
            places = [(self.store.part_path(upload_id, part.id), part.digest) for part in named]
            joined = self.store.join(places, staged, with_md5=md5 is not None)
            _check_joined(upload, joined, md5)
            self.store.seal(staged)
            return self._publish(owner, upload, staged, joined)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def cancel(self, owner: Owner, upload_id: str) -> UploadRow:
        """End an upload and remove its parts; raises NotFound, Conflict when it is completed or expired."""
        with self.store.exclusive():
            upload = self.registry.cancel_upload(owner, upload_id)
            self.store.delete_parts(upload_id)
        return upload

    def expire(self, now: float) -> int:
        """Take out every file and open upload whose time is over; returns how many."""
        with self.store.exclusive():
            found = self.registry.expire_files(now)
            for file_id in found.files:
                self.store.delete(file_id)
            for upload_id in found.uploads:
                self.store.delete_parts(upload_id)
        return len(found.files) + len(found.uploads)

    def sweep(self) -> list[str]:
        """Remove what an interruption left, and whatever has expired; at a start, before anybody sends."""
        self.expire(time.time())
        files = {file.id for file in self.registry.kept_files()}
        return self.store.sweep(files, {(part.upload_id, part.id) for part in self.registry.kept_parts()})

    def _publish(self, owner: Owner, upload: UploadRow, staged: Path, joined: Joined) -> UploadRow:
        new = NewFile(upload.purpose, upload.filename, upload.file_seconds)
        file = replace(_file_row(owner, new, joined.size_bytes, joined.digest), actor=upload.actor)
        with self.store.exclusive():
            self.store.keep(staged, self.store.path(file.id))
            try:
                ended = self.registry.complete_upload(owner, upload.id, file)
            except HotshoeError:
                self._drop_without_row(file.id)
                raise
            self.store.delete_parts(upload.id)
        return ended

    def _drop_without_row(self, file_id: str) -> None:
        """Remove bytes whose row could not be written. It may be there all the same: a commit can fail late.

        Where the registry cannot say, the bytes stay for the next sweep.
        """
        with suppress(HotshoeError):
            if not self.registry.has_file(file_id):
                self.store.delete(file_id)


def check_file(new: NewFile) -> None:
    """Raises InvalidRequest for a purpose, a name or a time that is not taken."""
    if new.purpose not in PURPOSES:
        raise InvalidRequest(f"purpose {new.purpose[:40]!r} is not one of {', '.join(PURPOSES)}.", param="purpose")
    name = new.filename
    if not name.isprintable() or "/" in name or "\\" in name or not 0 < len(name.encode()) <= MAX_FILENAME:
        raise InvalidRequest(
            f"filename must have 1 to {MAX_FILENAME} bytes of printable characters, and no slash.", param="filename"
        )
    if new.seconds is not None and not MIN_FILE_SECONDS <= new.seconds <= MAX_FILE_SECONDS:
        raise InvalidRequest(
            f"expires_after.seconds must be between {MIN_FILE_SECONDS} and {MAX_FILE_SECONDS}.", param="expires_after"
        )


def _file_row(owner: Owner, new: NewFile, size_bytes: int, digest: str) -> FileRow:
    now = time.time()
    return FileRow(
        id=new_id("file-"),
        tenant=owner.tenant,
        actor=owner.actor,
        purpose=new.purpose,
        filename=new.filename,
        size_bytes=size_bytes,
        digest=digest,
        created_at=now,
        expires_at=None if new.seconds is None else now + new.seconds,
    )


def _named(parts: Sequence[PartRow], part_ids: Sequence[str]) -> list[PartRow]:
    """The parts in the order asked for. One may be named twice: the same bytes are one part."""
    found = {part.id: part for part in parts}
    unknown = [part_id for part_id in part_ids if part_id not in found]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise InvalidRequest(f"part_ids has {unknown[0][:80]!r}{more}, which is no part of it.", param="part_ids")
    return [found[part_id] for part_id in part_ids]


def _check_declared(upload: UploadRow, size_bytes: int) -> None:
    if size_bytes != upload.size_bytes:
        raise LengthMismatch(
            f"The parts named hold {size_bytes} bytes together, and {upload.size_bytes} were declared for {upload.id}: "
            "send what is missing, or name every part.",
            param="part_ids",
        )


def _check_joined(upload: UploadRow, joined: Joined, md5: str | None) -> None:
    if md5 is not None and md5.lower() != joined.md5:
        raise DigestInvalid(f"The parts named have the MD5 {joined.md5}: another order, or other bytes.", param="md5")
    if upload.digest is not None and upload.digest != joined.digest:
        raise DigestInvalid(
            f"The parts named have {joined.digest}, and {upload.digest} was declared: another order, or other bytes.",
            param="part_ids",
        )
    _check_declared(upload, joined.size_bytes)
