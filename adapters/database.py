"""The registry's database: one SQLite file with the settings that make it durable, migrated when it is opened."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, create_engine, event, text

from adapters.database_errors import BUSY_SECONDS, RETRY_SECONDS, database_errors
from adapters.errors import RegistryBusy

if TYPE_CHECKING:
    from adapters.upgrade import Upgrade

FILE = "registry.sqlite3"
HEAD = "0009"
# Rollback journal, not WAL: this SQLite is in the range of the WAL-reset bug (https://sqlite.org/wal.html#walresetbug).
# EXTRA is FULL plus an fsync of the folder after the journal is gone, without which a power cut can undo a commit.
PRAGMAS = ("journal_mode=DELETE", "synchronous=EXTRA", "foreign_keys=ON")
IMPATIENT_SECONDS = 0.05  # how long to wait for a lock that somebody has just waited for in vain


class Database:
    """Transactions on one SQLite file. Errors of the database leave as RegistryBusy, StorageFull or StorageDamaged."""

    def __init__(self, path: Path, busy_seconds: float = BUSY_SECONDS) -> None:
        self.path = path
        self.busy_seconds = busy_seconds
        self.engine = _engine(path, self._patience_seconds)
        self._impatient_until = 0.0  # on the monotonic clock
        self.changes = 0  # grows with every change made here, so that what was read before it can be told from after

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One consistent view."""
        with self._errors(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One change, durable when the block ends, undone when it raises. Writers queue for at most the busy time."""
        has_lock = False
        try:
            with (
                self._errors(),
                self.engine.connect().execution_options(is_writer=True) as connection,
                connection.begin(),
            ):
                has_lock = True
                yield connection
        finally:
            self.changes += has_lock  # who waited for the lock in vain changed nothing: what was read before holds

    def _patience_seconds(self) -> float:
        """How long a transaction that begins now waits for the lock.

        One that waited in vain says that another program holds it. Who comes after is told so at once, instead of
        waiting in line behind each other, one wait after the other.
        """
        return IMPATIENT_SECONDS if time.monotonic() < self._impatient_until else self.busy_seconds

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with database_errors(self.path):
                yield
        except RegistryBusy:
            self._impatient_until = time.monotonic() + RETRY_SECONDS
            raise

    def migrate(self) -> Upgrade | None:
        """Bring the tables to HEAD in one transaction, after a copy was put aside of those that were there.

        Quick when they are at HEAD already. Raises StateNewer, with nothing changed.
        """
        with self.writing() as connection:
            found = revision(connection)
            if found == HEAD:
                return None
            if found is None:
                _upgrade(connection)
                return None
            return self._from_older(connection, found)

    def _from_older(self, connection: Connection, found: str) -> Upgrade:
        from adapters.upgrade import Upgrade, check_schema, put_aside

        check_schema(found, HEAD, self.path)
        backup = put_aside(self.path, found)  # read by another connection: the lock is this one's
        _upgrade(connection)
        return Upgrade(found, HEAD, backup)


def revision(connection: Connection) -> str | None:
    """The migration the tables are at; None for a new file."""
    tables = connection.execute(text("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'")).first()
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar() if tables else None
    return None if found is None else str(found)


def _upgrade(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _engine(path: Path, patience_seconds: Callable[[], float]) -> Engine:
    engine = create_engine(
        f"sqlite:///{path}",
        connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False, "isolation_level": None},
        pool_size=8,
        max_overflow=56,
    )

    @event.listens_for(engine, "connect")
    def set_pragmas(connection: Any, _record: Any) -> None:
        for pragma in PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer takes its lock at once: upgrading a reader's lock can fail without waiting.
        is_writer = connection.get_execution_options().get("is_writer", False)
        connection.exec_driver_sql(f"PRAGMA busy_timeout={int(patience_seconds() * 1000)}")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writer else "BEGIN")

    return engine
