"""What a client asks of an export, and what follows from it: whether it can be, which result it is, how large."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapters.bases import base_digest, stored_dtype, weight_files
from adapters.errors import BaseInvalid, BaseMismatch, MergeBaseMissing
from adapters.export_request import ADAPTER, CODE_VERSION, GGUF, GGUF_LORA, ORIGINAL
from adapters.gguf_types import BITS, check_type

if TYPE_CHECKING:
    from adapters.bases import BaseModel
    from adapters.export_rows import ExportRow
    from adapters.types import AdapterVersion

OF_THE_ADAPTER_ALONE = (ADAPTER, GGUF_LORA)  # formats without the base's weights


@dataclass(frozen=True, slots=True)
class ExportOrder:
    """What a client asks for."""

    model: str
    format: str = "hf"
    dtype: str | None = None
    with_parity: bool = True
    shard_bytes: int | None = None
    merge_into: str | None = None

    def options(self) -> dict[str, Any]:
        """What a row keeps of it beside model and format, each thing in one spelling."""
        is_gguf = self.format in (GGUF, GGUF_LORA)
        return {
            "dtype": check_type(self.dtype, is_lora=self.format == GGUF_LORA) if is_gguf else self.dtype,
            "parity": self.with_parity,
            "shard_bytes": self.shard_bytes,
            "merge_into": None if self.merge_into == ORIGINAL else self.merge_into,
        }


def order_of(row: ExportRow) -> ExportOrder:
    """The order that a row is of; one of an older release has fewer options."""
    options = row.options
    return ExportOrder(
        model=row.ref,
        format=row.format,
        dtype=options.get("dtype"),
        with_parity=options.get("parity", True),
        shard_bytes=options.get("shard_bytes"),
        merge_into=options.get("merge_into"),
    )


def result_of(order: ExportOrder, version: AdapterVersion, merge_base_digest: str) -> str:
    """The name of what comes of it: the same for orders of one tenant that give the same files, and for no others.

    The tenant is part of it: whether another one has the same adapter must not show, neither in time nor in bytes.
    """
    told = {
        "code": CODE_VERSION,
        "tenant": version.tenant,
        "source": version.ref,  # the manifest has it
        "adapter": version.digest,
        "base": version.base_digest,
        "merge_base": merge_base_digest,
        "chat_template": version.chat_template,
        "card": version.card,  # the parity report says what it was trained on
        "format": order.format,
        **order.options(),
    }
    text = json.dumps(told, sort_keys=True, ensure_ascii=False)
    return f"export-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def estimated_bytes(order: ExportOrder, version: AdapterVersion, base: BaseModel) -> int:
    """About how large the result will be: all weights of the base in the number format, or the adapter's files."""
    if order.format in OF_THE_ADAPTER_ALONE:
        return version.size_bytes
    try:
        stored = sum(path.stat().st_size for path in weight_files(base.folder))
    except (BaseInvalid, OSError):
        return 0  # the export will say what is wrong with the base
    asked, has = (BITS.get(check_type(dtype) or "") for dtype in (order.dtype, stored_dtype(base.config)))
    return round(stored * asked / has) if asked and has else stored


def check_bases(version: AdapterVersion, format: str, merge_base: BaseModel, served_base: BaseModel) -> None:
    """The version can be merged into the merge base; raises MergeBaseMissing or BaseMismatch."""
    if merge_base.config.get("quantization_config") and format not in OF_THE_ADAPTER_ALONE:
        raise MergeBaseMissing(
            f"The served base {served_base.id} is quantised, and an export needs its 16-bit weights: set "
            "merge_base (HOTSHOE_MERGE_BASE) to a folder with them.",
            param="merge_base",
        )
    if version.base_digest not in (None, merge_base.digest, served_base.digest):
        raise BaseMismatch(
            f"{version.ref} was made for the base {version.base_digest}; this server merges into "
            f"{merge_base.id} ({merge_base.digest}). Set merge_base to the base it was made for.",
            param="model",
        )


def check_unchanged(base: BaseModel) -> None:
    """The base's files are those that the server started with; raises BaseInvalid. Headers and samples are read."""
    try:
        found = base_digest(base.folder)
    except (OSError, ValueError) as error:
        raise BaseInvalid(f"The files of the base {base.id} cannot be read: {error}.") from error
    if found != base.digest:
        raise BaseInvalid(
            f"The files of the base {base.id} have changed since the server started: they were {base.digest} and are "
            f"{found}. Put them back, or start the server again.",
            param="base",
        )
