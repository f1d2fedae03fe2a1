"""Is the state folder sound? Registry against blobs, each finding explained, and what can be repaired repaired.

Two kinds of finding. *Litter* is what an interrupted publish or retire may leave: a staging folder, a blob no version
needs. It harms nothing and the next start sweeps it. *Damage* is what no interruption may cause: bytes that changed, a
version without its files, an alias that points at nothing that can answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import func, select, text

from adapters import schema
from adapters.database import FILE
from adapters.errors import Conflict, HotshoeError, ModelNotFound, Problem, StateNewer, StorageDamaged
from adapters.file_rows import Owner
from adapters.file_store import FileStore
from adapters.proof_rows import ProofKey
from adapters.registry import WITH_FILES, Registry
from adapters.servable import Servable
from adapters.store import BlobStore
from adapters.types import AdapterVersion, Alias, VersionStatus

ACTOR = "doctor"
LITTER = ("leftover", "blob_unused", "file_unused")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be."""

    code: str
    subject: str
    message: str
    repair: str
    is_repaired: bool = False

    @property
    def is_damage(self) -> bool:
        return self.code not in LITTER


@dataclass(frozen=True, slots=True)
class Report:
    """What was looked at and what was found."""

    home: str
    versions: int
    blobs: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()  # sound, and yet not what one may expect: aliases that are answered 409

    @property
    def is_clean(self) -> bool:
        """Nothing was found, not even litter."""
        return not self.findings

    @property
    def is_sound(self) -> bool:
        """No damage is left; litter does not count."""
        return all(finding.is_repaired or not finding.is_damage for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        findings = [{**asdict(finding), "is_damage": finding.is_damage} for finding in self.findings]
        return {
            "home": self.home,
            "versions": self.versions,
            "blobs": self.blobs,
            "is_sound": self.is_sound,
            "findings": findings,
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """For people."""
        found = [
            f"{finding.code}  {finding.subject}: {finding.message}"
            f"  -> {'repaired: ' if finding.is_repaired else ''}{finding.repair}"
            for finding in self.findings
        ]
        verdict = "sound" if self.is_sound else "DAMAGED"
        noted = [f"note  {note}" for note in self.notes]
        return [*found, *noted, f"{self.home}: {verdict}; {self.versions} versions, {self.blobs} blobs looked at"]


def run_doctor(home: Path, repair: bool = False) -> Report:
    """Look through the state folder, and with `repair` put right what can be; hold its lock meanwhile.

    A version whose files are damaged or gone cannot be made whole: repair takes it out of service, and an alias that
    pointed at it goes back to its newest earlier version that is ready, or away.
    """
    if not (home / FILE).is_file():
        message = "there is no registry here"
        finding = Finding("registry_missing", str(home / FILE), message, "Check HOTSHOE_HOME; `serve` makes a new one.")
        return Report(str(home), 0, 0, (finding,))
    try:
        registry = Registry.open(home)
    except StateNewer as error:
        finding = Finding("registry_newer", str(home / FILE), error.message, "Use the release that wrote it.")
        return Report(str(home), 0, 0, (finding,))
    except StorageDamaged as error:
        return Report(str(home), 0, 0, (_unreadable(home, error.message),))
    try:
        return _Examination(home, registry, repair).report()
    except StorageDamaged as error:
        return Report(str(home), 0, 0, (_unreadable(home, error.message),))
    finally:
        registry.close()


def _unreadable(home: Path, message: str) -> Finding:
    return Finding("registry_damaged", str(home / FILE), message, "Restore the file from a backup.")


class _Examination:
    def __init__(self, home: Path, registry: Registry, repair: bool) -> None:
        self.home, self.registry, self.repair = home, registry, repair
        self.store, self.sent = BlobStore(home / "blobs"), FileStore(home / "files")
        self.versions = registry.all_versions()

    def report(self) -> Report:
        findings = [*self._database(), *self._files(), *self._aliases(), *self._sent(), *self._litter()]
        notes = tuple(self._not_served())
        return Report(str(self.home), len(self.versions), len(self.store.digests()), tuple(findings), notes)

    def _database(self) -> Iterator[Finding]:
        with self.registry.database.reading() as connection:
            troubles = [str(row[0]) for row in connection.execute(text("PRAGMA integrity_check")) if row[0] != "ok"]
            orphans = connection.execute(text("PRAGMA foreign_key_check")).all()
            count, highest = schema.versions.c.number, func.max(schema.versions.c.number)
            gaps = connection.execute(
                select(schema.adapters.c.name, highest, func.count(count))
                .join_from(schema.versions, schema.adapters, schema.versions.c.adapter_id == schema.adapters.c.id)
                .group_by(schema.versions.c.adapter_id)
                .having(highest != func.count(count))
            ).all()
        for trouble in troubles[:20]:
            yield _unreadable(self.home, trouble)
        for row in orphans[:20]:
            yield Finding("row_orphaned", f"{row[0]} row {row[1]}", f"refers to no {row[2]}", "Restore from a backup.")
        for name, top, found in gaps:
            message = f"has {found} versions numbered up to {top}: rows are missing"
            yield Finding("version_missing", name, message, "Restore from a backup.")

    def _files(self) -> Iterator[Finding]:
        verified: dict[str, str] = {}
        for version in self.versions:
            if version.status not in WITH_FILES:
                continue
            if version.digest is None:
                yield self._out_of_service(version, "blob_missing", "has no digest")
                continue
            trouble = verified.get(version.digest)
            if trouble is None:
                trouble = verified[version.digest] = self._trouble(version.digest)
            if trouble:
                code = "blob_damaged" if self.store.has(version.digest) else "blob_missing"
                yield self._out_of_service(version, code, trouble)

    def _trouble(self, digest: str) -> str:
        try:
            self.store.verify(digest)
        except HotshoeError as error:
            return error.message
        return ""

    def _out_of_service(self, version: AdapterVersion, code: str, message: str) -> Finding:
        finding = Finding(
            code, version.ref, message, "Take it out of service; upload the adapter again for a new version."
        )
        if not self.repair:
            return finding
        where = (version.tenant, version.name, version.number)
        for alias in self.registry.aliases(version.tenant, version.name):
            if alias.number == version.number:
                self._move_away(alias)
            elif alias.candidate is not None and alias.candidate.number == version.number:
                self.registry.set_candidate(*where[:2], alias.alias, None, expected_generation=None, actor=ACTOR)
        problem = Problem(code, "adapter_model.safetensors", message, finding.repair)
        if version.status is VersionStatus.READY:
            self.registry.set_status(*where, VersionStatus.QUARANTINED, reasons=(problem,), actor=ACTOR)
        if version.status is VersionStatus.EXPORT_ONLY:
            self.registry.retire(*where, actor=ACTOR)
        else:
            self.registry.set_status(*where, VersionStatus.REJECTED, reasons=(problem,), actor=ACTOR)
        return replace(finding, is_repaired=True)

    def _aliases(self) -> Iterator[Finding]:
        for tenant, name in sorted({(version.tenant, version.name) for version in self.versions}):
            for alias in self.registry.aliases(tenant, name):
                trouble = self._alias_trouble(alias)
                if trouble:
                    repair = "Move it to its newest earlier version that is ready, or remove it."
                    finding = Finding("alias_dangling", f"{name}@{alias.alias}", trouble, repair)
                    if self.repair:
                        self._move_away(alias)
                    yield replace(finding, is_repaired=self.repair)

    def _alias_trouble(self, alias: Alias) -> str:
        try:
            status = self.registry.get(alias.tenant, alias.name, alias.number).status
        except ModelNotFound:
            return f"points at version {alias.number}, which is not there"
        return "" if status is VersionStatus.READY else f"points at version {alias.number}, which is {status}"

    def _not_served(self) -> Iterator[str]:
        """Aliases of ready versions that the server of the last start answers 409, each with the reason."""
        bases, served = self.registry.bases(), self.registry.served_base()
        if served is None:
            return
        rule = Servable(served.digest, served.name, served.max_rank, bases)
        if served.dtype and served.engine_version:
            rule.engine = ProofKey(served.digest, served.dtype, served.engine_version)
        ready = {
            (version.tenant, version.name, version.number): version
            for version in self.versions
            if version.status is VersionStatus.READY
        }
        for tenant in sorted({version.tenant for version in self.versions}):
            for alias in self.registry.aliases(tenant):
                version = ready.get((tenant, alias.name, alias.number))
                trouble = rule.trouble(version) if version else None
                if trouble is not None:
                    yield f"{alias.name}@{alias.alias}: {trouble.message}"

    def _move_away(self, alias: Alias) -> None:
        try:
            self.registry.rollback(alias.tenant, alias.name, alias.alias, actor=ACTOR)
        except Conflict:
            self.registry.remove_alias(alias.tenant, alias.name, alias.alias, actor=ACTOR)

    def _sent(self) -> Iterator[Finding]:
        """Files of clients, and parts of those that are still coming, against their rows."""
        for file in self.registry.kept_files():
            trouble = self._sent_trouble(self.sent.path(file.id), file.digest)
            if trouble:
                repair = "Forget it; it has to be sent again."
                if self.repair:
                    self.registry.delete_file(Owner(file.tenant, ACTOR), file.id)
                    self.sent.delete(file.id)
                yield Finding("file_damaged", file.id, trouble, repair, self.repair)
        for part in self.registry.kept_parts():
            trouble = self._sent_trouble(self.sent.part_path(part.upload_id, part.id), part.digest)
            if trouble:
                repair = "Forget the part; the upload goes on when it is sent again."
                if self.repair:
                    self.registry.drop_part(part)
                    self.sent.delete_part(part.upload_id, part.id)
                yield Finding("part_damaged", f"{part.upload_id} {part.id}", trouble, repair, self.repair)
        files = {file.id for file in self.registry.kept_files()}
        parts = {(part.upload_id, part.id) for part in self.registry.kept_parts()}
        for path in self.sent.leftovers(files, parts):
            subject = str(path.relative_to(self.home))
            yield Finding("file_unused", subject, "was left by an interruption", "Remove it.", self.repair)
        if self.repair:
            self.sent.sweep(files, parts)

    def _sent_trouble(self, path: Path, digest: str) -> str:
        try:
            self.sent.verify(path, digest)
        except StorageDamaged as error:
            return error.message
        return ""

    def _litter(self) -> Iterator[Finding]:
        in_use = self.registry.digests_in_use()
        litter = [
            *(Finding("leftover", str(path.relative_to(self.home)), "was left by an interruption", "Remove it.")
              for path in self.store.leftovers()),
            *(Finding("blob_unused", digest, "is needed by no version", "Remove it.")
              for digest in sorted(self.store.digests() - in_use)),
        ]  # fmt: skip
        if self.repair:
            self.store.sweep(in_use)
        yield from (replace(finding, is_repaired=self.repair) for finding in litter)
