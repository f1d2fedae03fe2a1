"""Which versions may answer where, and why the others may not. Pure: a base, a largest rank, and what its engine is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adapters.base_rows import ServedBase
from adapters.errors import NotServable
from adapters.proof_rows import ProofKey, key_of_proof
from adapters.registry import not_servable
from adapters.types import AdapterVersion, VersionStatus

ONE_VERSION = "one version of an adapter (GET /v1/models lists it)"
MAY_BECOME = (VersionStatus.READY, VersionStatus.QUARANTINED)


@dataclass
class Servable:
    """The rule of one server. `engine` is what its proofs hold for, once the engine has answered."""

    base_digest: str
    base_name: str
    max_rank: int
    bases: Mapping[str, ServedBase] = field(default_factory=dict)  # that the state was served with, by digest
    engine: ProofKey | None = None
    merged: AdapterVersion | None = None  # in the engine's own weights: then nothing else is

    def check(self, version: AdapterVersion, *, is_tried_again: bool = False) -> None:
        """Raises NotServable, with reason and next step, for a version that may not answer here.

        `is_tried_again`: one whose proof failed on this engine may be loaded, to be proven once more.
        """
        trouble = self.trouble(version, is_tried_again=is_tried_again)
        if trouble is not None:
            raise trouble

    def may_answer(self, version: AdapterVersion) -> bool:
        return self.trouble(version) is None

    def trouble(self, version: AdapterVersion, *, is_tried_again: bool = False) -> NotServable | None:
        """Why it may not answer here; None for one that may."""
        if version.status not in MAY_BECOME:
            return not_servable(version)
        misfit = self.misfit(version)
        if misfit is not None:
            return misfit
        if version.status is not VersionStatus.READY:
            return not_servable(version)
        if self.engine is not None and self.engine.has_failed(version.proof) and not is_tried_again:
            return unproven(version, self.engine)
        return None

    def misfit(self, version: AdapterVersion) -> NotServable | None:
        """Why it cannot even be tried here: the base, its rank, or an engine that holds one version alone."""
        if version.base_digest != self.base_digest:
            return NotServable(
                f"{version.ref} was made for another base, {self.named(version.base_digest)}, and this server runs "
                f"{self.named(self.base_digest)}: start a server with that base to serve it (HOTSHOE_BASE), or export "
                "it with that base (`hotshoe export --base`).",
                param="model",
            )
        if version.rank is not None and version.rank > self.max_rank:
            return NotServable(
                f"{version.ref} has rank {version.rank}, above {self.max_rank}, the largest that this server serves: "
                f"start it with HOTSHOE_MAX_RANK={version.rank} or more.",
                param="model",
            )
        if self.merged is not None and _identity(version) != _identity(self.merged):
            # Whose the other version is, is nobody's business who asks for an adapter of another name.
            is_sibling = _identity(version)[:2] == _identity(self.merged)[:2]
            alone = self.merged.ref if is_sibling else ONE_VERSION
            return NotServable(
                f"{version.ref} is not in this server, whose engine runs {alone}, merged into the base, and nothing "
                f"else: start a server with --merged {version.ref} or without --merged (HOTSHOE_MERGED).",
                param="model",
            )
        return None

    def check_base(self) -> None:
        """Raises NotServable where the base itself does not answer."""
        if self.merged is not None:
            raise NotServable(
                f"The base {self.base_name} is not in this server, whose engine runs {ONE_VERSION}, merged into the "
                "base, and nothing else: start a server without --merged (HOTSHOE_MERGED).",
                param="model",
            )

    def named(self, digest: str | None) -> str:
        """A base by its name and digest, or by its digest alone where the state was never served with it."""
        known = self.bases.get(digest or "")
        name = self.base_name if digest == self.base_digest else known.name if known else None
        return f"{name} ({digest})" if name else str(digest)


def _identity(version: AdapterVersion) -> tuple[str, str, int]:
    return (version.tenant, version.name, version.number)


def unproven(version: AdapterVersion, engine: ProofKey) -> NotServable:
    """What to say of a version whose proof was made anew on this engine, and failed."""
    proof = version.proof or {}
    before = proof.get("before")
    earlier = f"it was proven on {key_of_proof(before)}" if before else "it was never proven"
    return NotServable(
        f"{version.ref} does not answer on this engine: {earlier}, and on {engine} it is {proof.get('code')}. "
        f"{proof.get('message')} Start the engine that it was proven on, promote another version, or have it tried "
        f"again (POST /v1/adapters/{version.name}/versions/{version.number}/warm, or the next start).",
        param="model",
    )
