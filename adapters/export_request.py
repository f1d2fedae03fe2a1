"""What an export is asked for, what it gives, and which orders can be right at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from adapters.bases import BaseModel, load_base
from adapters.canonical import digest_folder
from adapters.errors import BaseMismatch, InvalidRequest, OutputExists
from adapters.merge_plan import check_dtype

HF, GGUF, ADAPTER, GGUF_LORA = "hf", "gguf", "adapter", "gguf-lora"
FORMATS = (HF, GGUF, ADAPTER, GGUF_LORA)
ORIGINAL, NF4 = "original", "nf4"
MERGE_INTO = (ORIGINAL, NF4)
LEAST_SHARD_BYTES = 1 << 20
CODE_VERSION = 2  # grows when the same order would give other bytes


@dataclass(frozen=True)
class ExportRequest:
    """What to export. `accepted_digests` are digests of bases, beside the merge base, that it may be made for."""

    adapter: Path
    base: BaseModel
    out: Path
    source: str  # NAME@N or the folder, for the manifest
    format: str = HF
    dtype: str | None = None  # of the weights; for gguf a type of llama.cpp's
    shard_bytes: int | None = None  # hf: files of at most so many bytes; the base's own layout unless given
    merge_into: str = ORIGINAL  # the base's weights as they are, or as NF4 leaves them (adapters/nf4.py)
    with_logits: bool = True
    base_digest: str | None = None  # the base that the adapter was checked against
    accepted_digests: tuple[str, ...] = ()
    card: Mapping[str, Any] | None = None
    chat_template: str | None = None  # the version's own, in place of the base's
    tokenizer: Path | None = None  # a folder whose tokenizer stands in place of the base's
    evaluation: tuple[Any, ...] = ()  # rows whose answers are compared beside the probe's
    served: tuple[Mapping[str, Any], ...] = ()  # a server's answers to the probe, see parity_served
    work: Path | None = None  # where finished files of a killed run are found again; without it nothing is left of one
    workers: int | None = None

    @property
    def inputs(self) -> str:
        """A digest of all that decides the bytes of the weights."""
        parts = [CODE_VERSION, self.base.digest, digest_folder(self.adapter), self.format, self.dtype]
        named = [*parts, self.shard_bytes, self.merge_into, self.chat_template, str(self.tokenizer)]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()


@dataclass(frozen=True)
class ExportResult:
    """A finished export: the folder, what is in it, and its parity report."""

    folder: Path
    manifest: Mapping[str, Any]
    parity: Mapping[str, Any]
    lacking: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        files = self.manifest["files"]
        return {
            "path": str(self.folder),
            "source": self.manifest["source"],
            "format": self.manifest["format"],
            "size_bytes": sum(entry["size_bytes"] for entry in files.values()),
            "files": files,
            "lacking": list(self.lacking),
            "parity": self.parity,
        }


def check_order(
    format: str, dtype: str | None = None, shard_bytes: int | None = None, merge_into: str | None = None
) -> None:
    """Raises InvalidRequest for what no adapter and no base can be exported as."""
    if format not in FORMATS:
        raise InvalidRequest(f"format {format[:40]!r} is not one of {', '.join(FORMATS)}.", param="format")
    if format == HF:
        check_dtype(dtype)
    elif format == ADAPTER:
        _refuse_option(dtype, "dtype", "the adapter's files are copied as they are")
    else:
        from adapters.gguf_types import check_type

        check_type(dtype, is_lora=format == GGUF_LORA)
    if merge_into not in (None, *MERGE_INTO):
        raise InvalidRequest(f"merge_into {merge_into!r} is not one of {', '.join(MERGE_INTO)}.", param="merge_into")
    if format in (ADAPTER, GGUF_LORA) and merge_into == NF4:
        _refuse_option(merge_into, "merge_into", f"{format} merges nothing")
    if format != HF:
        _refuse_option(shard_bytes, "shard_bytes", f"{format} is one file of weights")
    elif shard_bytes is not None and shard_bytes < LEAST_SHARD_BYTES:
        raise InvalidRequest(
            f"shard_bytes {shard_bytes:,} is below {LEAST_SHARD_BYTES:,}, the least.", param="shard_bytes"
        )


def _refuse_option(value: object, name: str, why: str) -> None:
    if value is not None:
        raise InvalidRequest(f"{name} {value!r} has no place here: {why}. Leave it out.", param=name)


def check_request(request: ExportRequest) -> None:
    """Raises what is wrong with a request before anything is read: InvalidRequest, OutputExists, BaseMismatch."""
    into = request.merge_into
    check_order(request.format, request.dtype, request.shard_bytes, None if into == ORIGINAL else into)
    if os.path.lexists(request.out):
        raise OutputExists(f"{request.out} exists already. Choose another --out, or remove it first.", param="out")
    accepted = {request.base.digest, *request.accepted_digests}
    if request.base_digest is not None and request.base_digest not in accepted:
        raise BaseMismatch(
            f"{request.source} was made for the base {request.base_digest}; the merge base {request.base.folder} is "
            f"{request.base.digest}. Pass --base with the base it was made for.",
            param="base",
        )


def spec_of(request: ExportRequest) -> dict[str, Any]:
    """What `request_from_spec` reads: JSON of the fields that have a value."""
    told = {one.name: getattr(request, one.name) for one in fields(request)} | {"base": request.base.folder}
    return {name: str(value) if isinstance(value, Path) else value for name, value in told.items() if value is not None}


def request_from_spec(spec: Mapping[str, Any]) -> ExportRequest:
    """The request in a SPEC.json: the fields of ExportRequest, with `base` a folder."""
    values = dict(spec)
    values["base"] = load_base(values["base"])
    for name in ("adapter", "out", "work", "tokenizer"):
        values[name] = Path(values[name]) if values.get(name) else None
    for name in ("accepted_digests", "served", "evaluation"):
        values[name] = tuple(values.get(name) or ())
    values["merge_into"] = values.get("merge_into") or ORIGINAL
    return ExportRequest(**values)
