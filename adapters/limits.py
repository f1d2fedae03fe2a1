"""What a tenant or a key may use: a value object whose None means "no limit here"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from adapters.errors import InvalidRequest

MAX_LIMIT = 2**53 - 1


@dataclass(frozen=True, slots=True)
class UseLimits:
    """The first three hold for keys and for tenants, the others for tenants only: what is kept belongs to tenants."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    stored_bytes: int | None = None
    versions: int | None = None
    file_bytes: int | None = None  # of files and of what open uploads declare; where unset, as many as stored_bytes
    files: int | None = None  # and open uploads
    upload_parts: int | None = None  # of open uploads
    jobs: int | None = None  # fine-tuning jobs that have not ended
    running_jobs: int | None = None  # of these at once
    job_seconds: int | None = None  # that one of them may train
    job_bytes: int | None = None  # of checkpoints and working files of all its jobs
    exports: int | None = None  # that have not ended
    export_bytes: int | None = None  # of results that are kept, and of those under way as they are estimated

    @classmethod
    def read(cls, found: Mapping[str, Any] | None) -> UseLimits:
        """From JSON; raises InvalidRequest for an unknown name or a value that is no whole number from 0 up."""
        names = [field.name for field in fields(cls)]
        for name, value in (found or {}).items():
            if name not in names:
                raise InvalidRequest(f"{name[:60]!r} is not a limit; they are {', '.join(names)}.", param="limits")
            if value is not None and (type(value) is not int or not 0 <= value <= MAX_LIMIT):
                raise InvalidRequest(f"{name} must be a whole number from 0 up, or null for no limit.", param=name)
        return cls(**(found or {}))

    @property
    def is_on_requests(self) -> bool:
        """Something here limits requests, not only what is kept."""
        return (self.requests_per_minute, self.tokens_per_minute, self.concurrent_requests) != (None, None, None)

    @property
    def is_on_what_is_kept(self) -> bool:
        """Something here limits what a tenant keeps."""
        return replace(self, requests_per_minute=None, tokens_per_minute=None, concurrent_requests=None) != UseLimits()

    @property
    def most_file_bytes(self) -> int | None:
        """How many bytes files and open uploads may have together."""
        return self.stored_bytes if self.file_bytes is None else self.file_bytes

    def as_dict(self) -> dict[str, int | None]:
        return asdict(self)


def within(most: int, limit: int | None) -> int:
    """What the operator's setting allows to all, and a limit to fewer."""
    return most if limit is None else min(most, limit)
