"""Files and uploads as rows. Every change is one transaction; a file's bytes are `adapters/file_store.py`'s."""

from __future__ import annotations

import time
import uuid
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Table, and_, delete, func, insert, or_, select, update

from adapters import schema
from adapters.database import Database
from adapters.errors import Conflict, LengthMismatch, NotFound, QuotaExceeded
from adapters.journal import add_event, ensure_tenant
from adapters.paging import beyond
from adapters.tenants import check_file_quota, check_part_quota

ADAPTER = "adapter"
FINE_TUNE = "fine-tune"
PURPOSES = (ADAPTER, "evals", FINE_TUNE, "user_data")  # that a sender may name
RESULTS = "fine-tune-results"  # of files that a job of this server makes
UPLOAD_SECONDS = 3600.0  # of an upload after its last part
ENDED_SECONDS = 24 * 3600.0  # of the row of an upload that ended
MAX_PARTS = 1000
SERVER = "server"


class UploadStatus(StrEnum):
    """Where an upload stands."""

    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose files are meant: those of a tenant, or of them only what one sender sent."""

    tenant: str
    actor: str
    sees_all: bool = True


@dataclass(frozen=True, slots=True)
class FileRow:
    """One file. `digest` is `sha256:...`; `filename` is what its sender calls it, and nothing else."""

    id: str
    tenant: str
    actor: str
    purpose: str
    filename: str
    size_bytes: int
    digest: str
    created_at: float
    expires_at: float | None = None


@dataclass(frozen=True, slots=True)
class UploadRow:
    """One file that comes in parts; `size_bytes` and `digest` are what was declared of the whole."""

    id: str
    tenant: str
    actor: str
    purpose: str
    filename: str
    mime_type: str
    size_bytes: int
    digest: str | None
    status: UploadStatus
    file_id: str | None
    file_seconds: int | None
    created_at: float
    expires_at: float


@dataclass(frozen=True, slots=True)
class PartRow:
    """One part of an upload."""

    id: str
    tenant: str
    upload_id: str
    size_bytes: int
    digest: str
    created_at: float


@dataclass(frozen=True, slots=True)
class FileQuery:
    """Which files are listed: `after` is the id of the last one seen."""

    purpose: str | None = None
    digest: str | None = None
    after: str | None = None
    limit: int = 10_000
    is_ascending: bool = False


@dataclass(frozen=True, slots=True)
class Expired:
    """Ids of what was taken out because its time was over."""

    files: tuple[str, ...] = ()
    uploads: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredFiles:
    """What is kept of one purpose, of all tenants: files, and open uploads with the parts that are here."""

    purpose: str
    files: int = 0
    file_bytes: int = 0
    open_uploads: int = 0
    upload_bytes: int = 0


def new_id(prefix: str) -> str:
    """A name that the server makes: nothing of it is a client's."""
    return f"{prefix}{uuid.uuid4().hex[:24]}"


class FileRows:
    """The part of the registry that keeps files, uploads and their parts."""

    database: Database

    def add_file(self, file: FileRow) -> FileRow:
        """A file whose bytes are in place; raises PayloadTooLarge or QuotaExceeded when the tenant has no room."""
        with self.database.writing() as connection:
            ensure_tenant(connection, file.tenant, file.created_at)
            check_file_quota(connection, file.tenant, file.size_bytes)
            _insert_file(connection, file)
        return file

    def get_file(self, owner: Owner, file_id: str) -> FileRow:
        """One file; raises NotFound, also for one whose time is over."""
        with self.database.reading() as connection:
            return _file(connection, owner, file_id)

    def files(self, owner: Owner, query: FileQuery) -> list[FileRow]:
        """Files by the time they came, newest first unless ascending; raises InvalidRequest for an unknown `after`."""
        files = schema.files.c
        with self.database.reading() as connection:
            where = [*_owned(schema.files, owner), _is_alive()]
            if query.purpose is not None:
                where.append(files.purpose == query.purpose)
            if query.digest is not None:
                where.append(files.digest == query.digest)
            if query.after is not None:
                listed = and_(*_owned(schema.files, owner))
                where.append(beyond(connection, schema.files, listed, query.after, is_ascending=query.is_ascending))
            order = (files.created_at, files.id)
            ordered = order if query.is_ascending else tuple(column.desc() for column in order)
            rows = connection.execute(select(schema.files).where(*where).order_by(*ordered).limit(query.limit))
            return [FileRow(**row._mapping) for row in rows]

    def delete_file(self, owner: Owner, file_id: str) -> FileRow:
        """Forget a file, whose bytes may then go; raises NotFound."""
        with self.database.writing() as connection:
            file = _file(connection, owner, file_id)
            _delete_file(connection, file, owner.actor)
        return file

    def add_upload(self, upload: UploadRow) -> UploadRow:
        """An open upload, whose declared bytes count at once; raises PayloadTooLarge or QuotaExceeded."""
        with self.database.writing() as connection:
            ensure_tenant(connection, upload.tenant, upload.created_at)
            check_file_quota(connection, upload.tenant, upload.size_bytes)
            connection.execute(insert(schema.uploads).values(asdict(upload)))
            detail = {"upload": upload.id, "purpose": upload.purpose, "size_bytes": upload.size_bytes}
            add_event(connection, upload.tenant, "upload_added", upload.actor, detail=detail)
        return upload

    def get_upload(self, owner: Owner, upload_id: str) -> UploadRow:
        """One upload as it stands now; raises NotFound."""
        with self.database.reading() as connection:
            return _upload(connection, owner, upload_id)

    def uploads(self, owner: Owner, *, digest: str | None = None, limit: int = 100) -> list[UploadRow]:
        """The newest uploads, newest first; of one declared digest when it is given."""
        where = _owned(schema.uploads, owner)
        if digest is not None:
            where.append(schema.uploads.c.digest == digest)
        order = (schema.uploads.c.created_at.desc(), schema.uploads.c.id)
        query = select(schema.uploads).where(*where).order_by(*order).limit(limit)
        with self.database.reading() as connection:
            return [_to_upload(row) for row in connection.execute(query)]

    def parts(self, upload_id: str) -> list[PartRow]:
        """The parts of an upload that are here, in the order in which they came."""
        with self.database.reading() as connection:
            return _parts(connection, upload_id)

    def check_part(self, owner: Owner, upload_id: str) -> UploadRow:
        """The upload, when it takes parts; raises NotFound or Conflict."""
        with self.database.reading() as connection:
            return _open_upload(connection, owner, upload_id)

    def add_part(self, owner: Owner, part: PartRow) -> PartRow:
        """One more part, or the one that has these bytes already; the upload's hour begins anew.

        Raises NotFound, Conflict when the upload is not open, LengthMismatch beyond what was declared, QuotaExceeded.
        """
        with self.database.writing() as connection:
            upload = _open_upload(connection, owner, part.upload_id)
            _touch(connection, upload.id, part.created_at)
            parts = _parts(connection, upload.id)
            same = next((one for one in parts if one.digest == part.digest), None)
            if same is not None:
                return same
            _check_sum(upload, part.size_bytes + sum(one.size_bytes for one in parts))
            if len(parts) >= MAX_PARTS:
                message = f"{upload.id} has {len(parts)} parts, which is the limit: cancel it and send larger parts."
                raise QuotaExceeded(message, param="data")
            check_part_quota(connection, upload.tenant)
            connection.execute(insert(schema.upload_parts).values(asdict(part)))
        return part

    def touch_upload(self, owner: Owner, upload_id: str) -> UploadRow:
        """Let the hour of an open upload begin anew; raises NotFound or Conflict."""
        with self.database.writing() as connection:
            upload = _open_upload(connection, owner, upload_id)
            _touch(connection, upload_id, time.time())
        return upload

    def complete_upload(self, owner: Owner, upload_id: str, file: FileRow) -> UploadRow:
        """Make the file of an upload a row and end the upload, in one step; raises Conflict when it is not open."""
        with self.database.writing() as connection:
            upload = _open_upload(connection, owner, upload_id)
            _end_upload(connection, upload, UploadStatus.COMPLETED, owner.actor, file_id=file.id)
            _insert_file(connection, file)
            return _upload(connection, owner, upload_id)

    def cancel_upload(self, owner: Owner, upload_id: str) -> UploadRow:
        """End an upload without a file; one that was cancelled stays so. Raises NotFound or Conflict."""
        with self.database.writing() as connection:
            upload = _upload(connection, owner, upload_id)
            if upload.status is not UploadStatus.CANCELLED:
                _end_upload(connection, _open_upload(connection, owner, upload_id), UploadStatus.CANCELLED, owner.actor)
            return _upload(connection, owner, upload_id)

    def expire_files(self, now: float) -> Expired:
        """End what is open beyond its time, and forget files and ended uploads whose time is over."""
        if not self._has_expired(now):
            return Expired()
        with self.database.writing() as connection:
            over = select(schema.uploads).where(_is_over(now))
            ended = [_to_upload(row) for row in connection.execute(over)]
            for upload in ended:
                _end_upload(connection, upload, UploadStatus.EXPIRED, SERVER)
            gone = connection.execute(select(schema.files).where(schema.files.c.expires_at <= now)).all()
            for row in gone:
                _delete_file(connection, FileRow(**row._mapping), SERVER)
            connection.execute(delete(schema.uploads).where(_is_forgettable(now)))
        return Expired(tuple(row.id for row in gone), tuple(upload.id for upload in ended))

    def drop_part(self, part: PartRow) -> None:
        """Forget a part whose bytes are lost: it has to be sent again."""
        with self.database.writing() as connection:
            connection.execute(delete(schema.upload_parts).where(schema.upload_parts.c.id == part.id))

    def has_file(self, file_id: str) -> bool:
        """There is a row of it, of whatever tenant."""
        return self._has(schema.files, file_id)

    def has_part(self, part_id: str) -> bool:
        """There is a row of it, of whatever upload."""
        return self._has(schema.upload_parts, part_id)

    def _has(self, table: Table, row_id: str) -> bool:
        with self.database.reading() as connection:
            return connection.execute(select(table.c.id).where(table.c.id == row_id)).first() is not None

    def kept_files(self) -> list[FileRow]:
        """Every file that has a row, of all tenants."""
        with self.database.reading() as connection:
            return [FileRow(**row._mapping) for row in connection.execute(select(schema.files))]

    def kept_parts(self) -> list[PartRow]:
        """Every part that has a row, of all tenants."""
        with self.database.reading() as connection:
            return [PartRow(**row._mapping) for row in connection.execute(select(schema.upload_parts))]

    def stored_files(self) -> list[StoredFiles]:
        """What is kept, purpose by purpose."""
        files, uploads, parts = schema.files.c, schema.uploads.c, schema.upload_parts.c
        is_open = uploads.status == UploadStatus.PENDING
        whole = select(files.purpose, func.count(), func.sum(files.size_bytes)).group_by(files.purpose)
        waiting = select(uploads.purpose, func.count()).where(is_open).group_by(uploads.purpose)
        joined = schema.uploads.join(schema.upload_parts, parts.upload_id == uploads.id)
        here = select(uploads.purpose, func.sum(parts.size_bytes)).select_from(joined).where(is_open)
        with self.database.reading() as connection:
            kept = {purpose: (count, int(size)) for purpose, count, size in connection.execute(whole)}
            opened = {purpose: int(count) for purpose, count in connection.execute(waiting)}
            came = {purpose: int(size) for purpose, size in connection.execute(here.group_by(uploads.purpose))}
        nothing = (0, 0)
        return [
            StoredFiles(purpose, *kept.get(purpose, nothing), opened.get(purpose, 0), came.get(purpose, 0))
            for purpose in (*PURPOSES, RESULTS)
        ]

    def _has_expired(self, now: float) -> bool:
        queries = (
            select(schema.uploads.c.id).where(or_(_is_over(now), _is_forgettable(now))),
            select(schema.files.c.id).where(schema.files.c.expires_at <= now),
        )
        with self.database.reading() as connection:
            return any(connection.execute(query.limit(1)).first() is not None for query in queries)


def no_file(file_id: str) -> NotFound:
    return NotFound(f"There is no file {file_id[:80]!r}.", param="file_id")


def _file(connection: Connection, owner: Owner, file_id: str) -> FileRow:
    where = (*_owned(schema.files, owner), schema.files.c.id == file_id, _is_alive())
    row = connection.execute(select(schema.files).where(*where)).first()
    if row is None:
        raise no_file(file_id)
    return FileRow(**row._mapping)


def _is_alive() -> ColumnElement[bool]:
    return or_(schema.files.c.expires_at.is_(None), schema.files.c.expires_at > time.time())


def _insert_file(connection: Connection, file: FileRow) -> None:
    connection.execute(insert(schema.files).values(asdict(file)))
    detail = {"file": file.id, "purpose": file.purpose, "size_bytes": file.size_bytes}
    add_event(connection, file.tenant, "file_added", file.actor, detail=detail)


def _delete_file(connection: Connection, file: FileRow, actor: str) -> None:
    connection.execute(delete(schema.files).where(schema.files.c.id == file.id))
    add_event(connection, file.tenant, "file_deleted", actor, detail={"file": file.id})


def _owned(table: Table, owner: Owner) -> list[ColumnElement[bool]]:
    where: list[ColumnElement[bool]] = [table.c.tenant == owner.tenant]
    if not owner.sees_all:
        where.append(table.c.actor == owner.actor)
    return where


def _upload(connection: Connection, owner: Owner, upload_id: str) -> UploadRow:
    where = (*_owned(schema.uploads, owner), schema.uploads.c.id == upload_id)
    row = connection.execute(select(schema.uploads).where(*where)).first()
    if row is None:
        raise NotFound(f"There is no upload {upload_id[:80]!r}.", param="upload_id")
    return _to_upload(row)


def _open_upload(connection: Connection, owner: Owner, upload_id: str) -> UploadRow:
    upload = _upload(connection, owner, upload_id)
    if upload.status is not UploadStatus.PENDING:
        raise Conflict(f"{upload.id} is {upload.status}: begin a new upload.", param="upload_id")
    return upload


def _to_upload(row: Row[Any]) -> UploadRow:
    """The row as it stands now: one that is open beyond its time has expired, whoever looks first."""
    upload = UploadRow(**{**row._mapping, "status": UploadStatus(row.status)})
    is_over = upload.status is UploadStatus.PENDING and upload.expires_at <= time.time()
    return replace(upload, status=UploadStatus.EXPIRED) if is_over else upload


def _parts(connection: Connection, upload_id: str) -> list[PartRow]:
    parts = schema.upload_parts
    rows = connection.execute(
        select(parts).where(parts.c.upload_id == upload_id).order_by(parts.c.created_at, parts.c.id)
    )
    return [PartRow(**row._mapping) for row in rows]


def _touch(connection: Connection, upload_id: str, now: float) -> None:
    values = {"expires_at": now + UPLOAD_SECONDS}
    connection.execute(update(schema.uploads).where(schema.uploads.c.id == upload_id).values(values))


def _check_sum(upload: UploadRow, size_bytes: int) -> None:
    if size_bytes > upload.size_bytes:
        raise LengthMismatch(
            f"With this part {upload.id} would hold {size_bytes} bytes, and {upload.size_bytes} were declared: cancel "
            "it and begin a new one when the file was cut in another way before.",
            param="data",
        )


def _end_upload(
    connection: Connection, upload: UploadRow, status: UploadStatus, actor: str, *, file_id: str | None = None
) -> None:
    values = {"status": str(status), "file_id": file_id}
    connection.execute(update(schema.uploads).where(schema.uploads.c.id == upload.id).values(values))
    connection.execute(delete(schema.upload_parts).where(schema.upload_parts.c.upload_id == upload.id))
    detail = {"upload": upload.id} | ({"file": file_id} if file_id else {})
    add_event(connection, upload.tenant, f"upload_{status}", actor, detail=detail)


def _is_over(now: float) -> ColumnElement[bool]:
    """An upload is open beyond its time."""
    uploads = schema.uploads.c
    return and_(uploads.status == UploadStatus.PENDING, uploads.expires_at <= now)


def _is_forgettable(now: float) -> ColumnElement[bool]:
    """An upload ended so long ago that its row may go."""
    uploads = schema.uploads.c
    return and_(uploads.status != UploadStatus.PENDING, uploads.expires_at <= now - ENDED_SECONDS)
