"""API keys as rows: shown once when they are made, kept only as a keyed hash, revoked by one write.

A key is `hs-` and 48 hex digits from the system's random source; the first 8 are the prefix that listings show, the
other 40 (160 bits) are secret. The registry holds HMAC-SHA256(pepper, key): a copy of the database alone lets nobody in
and cannot be searched offline, since the pepper lies in a file of its own or in the environment.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import sqlite3
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from adapters import schema
from adapters.database import FILE, Database
from adapters.durable import sync
from adapters.errors import ConfigInvalid, InvalidRequest, NotFound
from adapters.journal import add_event, ensure_tenant
from adapters.limits import UseLimits
from adapters.types import DEFAULT_TENANT, Priority, check_name

PEPPER_FILE = "pepper"
BOOTSTRAP_ID = "key_bootstrap"  # no other key can have it: theirs are drawn
PREFIX_LENGTH = 11
# Scope -> the scopes it brings along. `admin` and `metrics` see every tenant: only the operator's keys may have them.
SCOPES: dict[str, frozenset[str]] = {
    "infer": frozenset(),
    "read": frozenset(),
    "upload": frozenset({"read"}),
    "promote": frozenset({"read", "export"}),
    "export": frozenset({"read"}),
    "train": frozenset({"read", "upload"}),
    "metrics": frozenset(),
    "admin": frozenset({"infer", "read", "upload", "promote", "export", "train", "metrics"}),
}
OPERATOR_SCOPES = frozenset({"admin", "metrics"})
MAX_ADAPTERS = 100
MAX_LIFE_SECONDS = 100 * 366 * 86400


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key as its row says; the key itself is not in it."""

    id: str
    tenant: str
    prefix: str
    name: str | None
    scopes: tuple[str, ...]
    adapters: tuple[str, ...] | None  # the only adapters it may touch; None for all of its tenant's
    limits: UseLimits
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    priority: Priority = Priority.NORMAL

    def is_valid(self, now: float) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)

    @property
    def all_scopes(self) -> frozenset[str]:
        """With those that its scopes bring along."""
        return frozenset(self.scopes).union(*(SCOPES[scope] for scope in self.scopes))


@dataclass(frozen=True)
class NewKey:
    """What a key is to be; raises InvalidRequest or NameInvalid for what cannot be one."""

    tenant: str
    scopes: Sequence[str]
    name: str | None = None
    adapters: Sequence[str] | None = None
    limits: UseLimits = field(default_factory=UseLimits)
    expires_at: float | None = None
    priority: str = Priority.NORMAL

    def __post_init__(self) -> None:
        check_name(self.tenant, "tenant")
        if self.name is not None:
            check_name(self.name, "name")
        unknown = [scope for scope in self.scopes if scope not in SCOPES]
        if unknown or not self.scopes:
            raise InvalidRequest(
                f"scopes must name at least one of {', '.join(SCOPES)}"
                + (f"; {unknown[0][:40]!r} is none of them." if unknown else "."),
                param="scopes",
            )
        foreign = OPERATOR_SCOPES.intersection(self.scopes)
        if foreign and self.tenant != DEFAULT_TENANT:
            raise InvalidRequest(
                f"{', '.join(sorted(foreign))} shows every tenant: only a key of the tenant {DEFAULT_TENANT}, the "
                "operator's, may have it.",
                param="scopes",
            )
        if self.adapters is not None and not 0 < len(self.adapters) <= MAX_ADAPTERS:
            raise InvalidRequest(f"adapters must name 1 to {MAX_ADAPTERS} adapters, or be left out.", param="adapters")
        for adapter in self.adapters or ():
            for part in adapter.split("/", 1):
                check_name(part, "adapters")
        if self.priority not in tuple(Priority):
            raise InvalidRequest(
                f"priority must be one of {', '.join(Priority)}; {self.priority[:40]!r} is none of them.",
                param="priority",
            )
        if self.limits.is_on_what_is_kept:
            raise InvalidRequest("Bytes, versions, files and parts are limits of a tenant, not a key.", param="limits")


class KeyRows:
    """The part of the registry that keeps keys."""

    database: Database

    def add_key(self, new: NewKey, pepper: bytes, *, actor: str) -> tuple[ApiKey, str]:
        """The key's row, and the key itself, which nobody can read again."""
        with self.database.writing() as connection:
            return _insert_key(connection, f"key_{secrets.token_hex(12)}", new, pepper, actor)

    def add_bootstrap_key(self, pepper: bytes) -> str | None:
        """The first key of a state folder that never had one, with every scope; None where it had one.

        It is the server's doing, not an operator's, so that it does not count in `has_keys`.
        """
        new = NewKey(DEFAULT_TENANT, ["admin"], name="bootstrap")
        with self.database.writing() as connection:
            if connection.execute(select(schema.api_keys.c.id).limit(1)).first() is not None:
                return None
            return _insert_key(connection, BOOTSTRAP_ID, new, pepper, "server")[1]

    def keys(self, tenant: str | None = None) -> list[ApiKey]:
        """Keys of one tenant or of all, revoked and expired ones too, in the order they were made."""
        query = select(schema.api_keys).order_by(schema.api_keys.c.created_at, schema.api_keys.c.id)
        if tenant is not None:
            query = query.where(schema.api_keys.c.tenant == tenant)
        with self.database.reading() as connection:
            return [_to_key(row) for row in connection.execute(query)]

    def find_key(self, digest: str) -> ApiKey | None:
        """The key with this digest, valid or not."""
        with self.database.reading() as connection:
            row = connection.execute(select(schema.api_keys).where(schema.api_keys.c.digest == digest)).first()
        return _to_key(row) if row else None

    def revoke_key(self, key_id: str, *, actor: str) -> ApiKey:
        """From the return of this call on the key opens nothing; raises NotFound."""
        with self.database.writing() as connection:
            query = select(schema.api_keys).where(schema.api_keys.c.id == key_id)
            row = connection.execute(query).first()
            if row is None:
                raise NotFound(f"There is no key {key_id[:80]!r}; `hotshoe keys ls` lists them.", param="id")
            if row.revoked_at is None:
                changes = update(schema.api_keys).where(schema.api_keys.c.id == key_id).values(revoked_at=time.time())
                connection.execute(changes)
                add_event(connection, row.tenant, "key_revoked", actor, detail={"key": key_id, "prefix": row.prefix})
            return _to_key(connection.execute(query).one())

    def has_keys(self) -> bool:
        """An operator has made a key, ever: a revoked one counts, so that revoking the last opens nothing."""
        query = select(func.count()).select_from(schema.api_keys).where(schema.api_keys.c.id != BOOTSTRAP_ID)
        with self.database.reading() as connection:
            return bool(connection.execute(query).scalar())


def home_has_keys(home: Path) -> bool:
    """The same of a state folder's registry, without opening (and migrating) it."""
    if not (home / FILE).is_file():
        return False
    connection = sqlite3.connect(f"{(home / FILE).absolute().as_uri()}?mode=ro", uri=True)
    try:
        query = "SELECT 1 FROM api_keys WHERE id != ? LIMIT 1"
        return connection.execute(query, (BOOTSTRAP_ID,)).fetchone() is not None
    except sqlite3.OperationalError:  # an older schema: no keys then
        return False
    finally:
        connection.close()


def _insert_key(connection: Connection, key_id: str, new: NewKey, pepper: bytes, actor: str) -> tuple[ApiKey, str]:
    secret = f"hs-{secrets.token_hex(24)}"
    now = time.time()
    values = {
        "id": key_id,
        "tenant": new.tenant,
        "prefix": secret[:PREFIX_LENGTH],
        "digest": key_digest(pepper, secret.encode()),
        "name": new.name,
        "scopes": sorted(set(new.scopes)),
        "adapters": sorted(set(new.adapters)) if new.adapters is not None else None,
        "limits": {name: value for name, value in new.limits.as_dict().items() if value is not None},
        "priority": str(new.priority),
        "created_at": now,
        "expires_at": new.expires_at,
        "revoked_at": None,
    }
    ensure_tenant(connection, new.tenant, now)
    connection.execute(insert(schema.api_keys).values(values))
    detail = {"key": key_id, "prefix": values["prefix"], "scopes": values["scopes"]}
    add_event(connection, new.tenant, "key_added", actor, detail=detail)
    row = connection.execute(select(schema.api_keys).where(schema.api_keys.c.id == key_id)).one()
    return _to_key(row), secret


def key_digest(pepper: bytes, key: bytes) -> str:
    """What is stored of a key: HMAC-SHA256(pepper, key) in hex."""
    return hmac.new(pepper, key, hashlib.sha256).hexdigest()


def load_pepper(home: Path) -> bytes:
    """The state folder's pepper, made at first use; raises ConfigInvalid when others could read it."""
    path = home / PEPPER_FILE
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        _write_pepper(path)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ConfigInvalid(f"{path} can be read by others: run `chmod 600 {path}`.", param="home")
    pepper = path.read_bytes().strip()
    if len(pepper) < 32:
        raise ConfigInvalid(f"{path} holds {len(pepper)} bytes where 32 or more are needed: restore it.", param="home")
    return pepper


def _write_pepper(path: Path) -> None:
    """Whole or absent: written beside its place and linked there, so that of two makers one wins."""
    scratch = path.with_name(f".{PEPPER_FILE}.{secrets.token_hex(8)}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_hex(32).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if not path.exists():
            os.link(scratch, path)
    except FileExistsError:
        return
    finally:
        scratch.unlink()
    sync(path.parent)


def _to_key(row: Row[Any]) -> ApiKey:
    return ApiKey(
        id=row.id,
        tenant=row.tenant,
        prefix=row.prefix,
        name=row.name,
        scopes=tuple(row.scopes),
        adapters=None if row.adapters is None else tuple(row.adapters),
        limits=UseLimits.read(row.limits),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        priority=Priority(row.priority),
    )
