"""From a folder of files to a version: inspect, check, write canonical files, store the blob, add the row."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapters.bases import BaseModel
from adapters.canonical import CanonicalAdapter, Verdict, VerdictKind, canonicalise, check, refused
from adapters.chat_template import template_digest
from adapters.errors import AdapterRefused, HotshoeError, Problem
from adapters.inspect import inspect_folder, read_card
from adapters.job_rows import JobRow
from adapters.magnitude import MAX_UPDATE_RATIO, largest_update
from adapters.registry import OPERATOR, NewVersion, Registry
from adapters.serving import Serving
from adapters.store import BlobStore, disk_errors
from adapters.strict_json import JsonInvalid
from adapters.types import DEFAULT_TENANT, AdapterVersion, VersionStatus, check_name


@dataclass(frozen=True)
class PublishContext:
    """Where versions go and what they are checked against."""

    registry: Registry
    store: BlobStore
    base: BaseModel
    max_rank: int
    tenant: str = DEFAULT_TENANT
    actor: str = OPERATOR
    source: Mapping[str, Any] | None = None  # where the files were pulled from, for the event
    serving: Serving = field(default_factory=Serving)  # what the uploader says of serving it, checked
    serving_dtype: str = "bfloat16"  # values must not overflow in it
    job: JobRow | None = None  # the fine-tuning job that the files come of
    max_update_ratio: float = MAX_UPDATE_RATIO  # a larger update beside its layer's weights is not served unasked


def publish(
    source: Path,
    name: str,
    *,
    context: PublishContext,
    card: dict[str, Any] | None = None,
    base_is_served: bool = False,
    number: int | None = None,
) -> AdapterVersion:
    """Make the adapter in `source` a version of `name`: quarantined when it can be served, export-only when it cannot.

    A quarantined version whose reasons hold `update_too_large` is not to be proven until an operator allows it.

    The same files again, to be served in the same way, give the version that is there (`is_new` is False). Refused
    files leave a rejected version with every reason and no files, and raise AdapterRefused. Nothing that is refused or
    interrupted leaves a blob that a version refers to. `card` is the uploader's claim; without one, `source`/card.json
    is. A card with the base's digest as its `base.digest` says that the adapter was made for it, whatever path its
    config names; its `template.enable_thinking` is how the version is served unless the uploader says it otherwise.
    """
    check_name(name)
    staged = context.store.stage()
    try:
        card = card if card is not None else _card_beside(source)
        base_is_served = base_is_served or _names_base(card, context.base)
        with disk_errors(staged):
            canonical, new, _ = _checked(source, name, staged, context, base_is_served)
    except AdapterRefused as refusal:
        _record_refusal(refusal, name, context, card)
        raise
    else:
        parent = card.get("parent") if card else None
        serving = context.serving.with_card(card)
        new = replace(
            new, card=card, parent=parent if isinstance(parent, str) else None, number=number, serving=serving
        )
        with context.store.exclusive():
            context.store.publish(staged, canonical.digest)
            try:
                return context.registry.add_version(new)
            except HotshoeError:  # over quota, or another number: what no version needs goes again
                remove_files(context.registry, context.store, canonical.digest)
                raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def preview(
    source: Path, *, context: PublishContext, card: dict[str, Any] | None = None, base_is_served: bool = False
) -> dict[str, Any]:
    """What `publish` would make of the files, values included; nothing is stored and no row is written.

    Raises AdapterRefused with every reason, as `publish` does.
    """
    staged = context.store.stage()
    try:
        card = card if card is not None else _card_beside(source)
        base_is_served = base_is_served or _names_base(card, context.base)
        with disk_errors(staged):
            canonical, new, verdict = _checked(source, "preview", staged, context, base_is_served)
        serving = context.serving.with_card(card)
        return {
            **verdict.as_dict(),
            "reasons": [reason.as_dict() for reason in new.reasons],
            "status": str(new.status),
            "digest": canonical.digest,
            "size_bytes": canonical.size_bytes,
            "base_digest": new.base_digest,
            "dropped": list(new.dropped),
            "serving": dict(serving.defaults),
            "chat_template": template_digest(serving.chat_template) if serving.chat_template else None,
        }
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def remove_files(registry: Registry, store: BlobStore, digest: str) -> bool:
    """Delete the blob when no version needs it any more; True when it went. Call it once no engine holds the files."""
    with store.exclusive():
        if digest in registry.digests_in_use():
            return False
        store.delete(digest)
        return True


def _checked(
    source: Path, name: str, staged: Path, context: PublishContext, base_is_served: bool
) -> tuple[CanonicalAdapter, NewVersion, Verdict]:
    inspection = inspect_folder(source)
    verdict = check(inspection, context.base, max_rank=context.max_rank, base_is_served=base_is_served)
    canonical = canonicalise(source, inspection, verdict, staged, serving_dtype=context.serving_dtype)
    is_servable = verdict.verdict is not VerdictKind.EXPORT_ONLY
    reasons = verdict.reasons
    largest = largest_update(staged, context.base) if is_servable else None
    if largest is not None and largest.ratio > context.max_update_ratio:
        reasons = (*reasons, largest.problem(context.max_update_ratio))
    left_out = (f"file {item[:120]}" for item in inspection.left_out[:100])
    new = NewVersion(
        name,
        VersionStatus.QUARANTINED if is_servable else VersionStatus.EXPORT_ONLY,
        tenant=context.tenant,
        digest=canonical.digest,
        base_digest=context.base.digest,
        rank=canonical.rank,
        size_bytes=canonical.size_bytes,
        reasons=reasons,
        dropped=(*verdict.dropped, *left_out, *context.serving.dropped),
        actor=context.actor,
        source=context.source,
        job=context.job,
    )
    return canonical, new, verdict


def _card_beside(source: Path) -> dict[str, Any] | None:
    try:
        return read_card(source)
    except JsonInvalid as error:
        raise refused((Problem(error.code, "card.json", str(error)),)) from error


def _names_base(card: dict[str, Any] | None, base: BaseModel) -> bool:
    """The card of a run names its base, or a declared one, by digest: that says more than the path in the config."""
    named = card.get("base") if card else None
    return isinstance(named, dict) and named.get("digest") in (base.digest, *base.names)


def _record_refusal(refusal: AdapterRefused, name: str, context: PublishContext, card: dict[str, Any] | None) -> None:
    context.registry.add_version(
        NewVersion(
            name,
            VersionStatus.REJECTED,
            tenant=context.tenant,
            base_digest=context.base.digest,
            reasons=refusal.problems,
            card=card,
            actor=context.actor,
            source=context.source,
            job=context.job,
        )
    )
