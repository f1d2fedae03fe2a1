"""What a version's proof is of: one base, number format and engine; and what of a proof made anew is kept.

A proof says what one engine computed. Another engine, or another number format, may compute something else from the
same files, so a version is proven again there; its status and the aliases that name it stay as they are whatever comes
of it. `before` in a proof that failed is the last one that did not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from adapters.database import Database
from adapters.errors import Problem
from adapters.journal import add_event
from adapters.types import VersionStatus
from adapters.version_rows import update_version, version_row

EFFECT, AGREEMENT = "effect", "agreement"  # what a proof shows: the output moves; it moves as PEFT computes it


@dataclass(frozen=True, slots=True)
class ProofKey:
    """What a proof holds for."""

    base_digest: str
    dtype: str
    engine_version: str

    def is_of(self, proof: Mapping[str, Any] | None) -> bool:
        """The proof was made here."""
        return proof is not None and all(proof.get(name) == value for name, value in asdict(self).items())

    def has_failed(self, proof: Mapping[str, Any] | None) -> bool:
        """The version was tried here and must not answer."""
        return proof is not None and self.is_of(proof) and not proof.get("is_proven")

    def has_passed(self, proof: Mapping[str, Any] | None) -> bool:
        """The version was proven here."""
        return proof is not None and self.is_of(proof) and bool(proof.get("is_proven"))

    def __str__(self) -> str:
        return f"{self.engine_version} in {self.dtype}"


def key_of_proof(proof: Mapping[str, Any]) -> ProofKey:
    """What a kept proof holds for; `unknown` where it does not say."""
    return ProofKey(*(str(proof.get(name) or "unknown") for name in ("base_digest", "dtype", "engine_version")))


class ProofRows:
    """The part of the registry that keeps proofs made anew, and lets versions be tried again."""

    database: Database

    def renew_proof(self, tenant: str, name: str, number: int, proof: Mapping[str, Any], *, actor: str) -> None:
        """Keep what a ready version showed on another engine than before; its status stays. Raises ModelNotFound."""
        with self.database.writing() as connection:
            row = version_row(connection, tenant, name, number)
            last = row.proof or {}
            before = last if last.get("is_proven") else last.get("before")
            kept = {key: last[key] for key in ("gate", "warnings") if key in last}
            renewed = {**kept, **proof} if proof.get("is_proven") else {**kept, **proof, "before": before}
            update_version(connection, row, {"proof": renewed})
            detail = {key: proof.get(key) for key in ("is_proven", "code", "dtype", "engine_version")}
            add_event(connection, tenant, "proof_renewed", actor, row.name, number, detail=detail)

    def note_agreement(self, tenant: str, name: str, number: int, found: Mapping[str, Any], *, actor: str) -> None:
        """Keep how far the engine's log-probabilities are from PEFT's, with the proof that is there.

        Raises ModelNotFound. Without a proof nothing is kept: the figures are of an engine.
        """
        with self.database.writing() as connection:
            row = version_row(connection, tenant, name, number)
            if not (row.proof or {}).get("is_proven"):
                return
            update_version(connection, row, {"proof": {**row.proof, "shows": [EFFECT, AGREEMENT], "peft": dict(found)}})
            add_event(connection, tenant, "agreement_noted", actor, row.name, number, detail=dict(found))

    def try_again(self, tenant: str, name: str, number: int, *, reasons: Sequence[Problem] = (), actor: str) -> None:
        """Quarantine an export-only version, to be proven: what kept it out no longer does. Raises ModelNotFound."""
        with self.database.writing() as connection:
            row = version_row(connection, tenant, name, number)
            if row.status != VersionStatus.EXPORT_ONLY:
                return
            status, kept = VersionStatus.QUARANTINED, [problem.as_dict() for problem in reasons]
            update_version(connection, row, {"status": str(status), "reasons": kept})
            detail = {"from": row.status, "to": str(status), "reasons": kept}
            add_event(connection, tenant, "status_changed", actor, row.name, number, detail=detail)
