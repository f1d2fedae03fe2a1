"""An adapter put together from files that were sent before: JSON in place of a form, with ids in place of bytes.

`{"name", "config": {...} or "file-...", "weights": "file-...", "card"?, "initial_adapter"?, "base_is"?, ...}`: the same
parts as the form's, each a file of purpose `adapter`, or the JSON itself where the part is JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.errors import InvalidRequest, PayloadTooLarge, UnknownParameter
from adapters.file_rows import ADAPTER, Owner
from adapters.files import Files
from adapters.inspect import MAX_CARD_VALUES, MAX_CONFIG_VALUES
from adapters.store import disk_errors
from adapters.strict_json import JsonInvalid as StrictJsonInvalid
from adapters.strict_json import parse_json
from server.errors import JsonInvalid
from server.multipart import FRAMING_BYTES, fingerprint
from server.uploads import FILE_PARTS, REQUIRED, TEXT_PARTS, Upload, UploadLimits, is_served

JSON_TYPE = "application/json"
WEIGHTS = ("weights", "initial_adapter")
JSON_TEXTS = ("serving",)  # text parts that are JSON
Part = tuple[str, int, str]


def order_bytes(limits: UploadLimits) -> int:
    """The largest order that can hold every part that may stand in it."""
    return sum(limits.of(part) for part in (*TEXT_PARTS, *FILE_PARTS) if part not in WEIGHTS) + FRAMING_BYTES


def read_order(raw: bytes) -> dict[str, Any]:
    """The order in a body; raises JsonInvalid, UnknownParameter or InvalidRequest."""
    try:
        order = parse_json(raw, max_values=MAX_CONFIG_VALUES + MAX_CARD_VALUES)
    except StrictJsonInvalid as error:
        raise JsonInvalid(f"The body {error}.") from None
    if not isinstance(order, dict):
        raise JsonInvalid("The body must be one JSON object.")
    unknown = sorted(name[:40] for name in order if name not in TEXT_PARTS and name not in FILE_PARTS)
    if unknown:
        allowed = ", ".join((*TEXT_PARTS, *FILE_PARTS))
        raise UnknownParameter(
            f"{', '.join(unknown[:10])} is not taken here; the parts are {allowed}.", param=unknown[0]
        )
    missing = [name for name in REQUIRED if order.get(name) is None]
    if missing:
        raise InvalidRequest(f"The order lacks {', '.join(missing)}.", param=missing[0])
    return order


def put_together(files: Files, owner: Owner, raw: bytes, folder: Path, limits: UploadLimits) -> Upload:
    """Fill the folder with what a body orders: files are linked, not copied, and held to their digests.

    Blocks; not for the event loop. Raises NotFound for a file that is not the owner's, InvalidRequest for one of
    another purpose, PayloadTooLarge, StorageDamaged.
    """
    order = read_order(raw)
    texts = {part: found for part in TEXT_PARTS if (found := _text(order, part)) is not None}
    parts = [
        *((part, len(text), hashlib.sha256(text).hexdigest()) for part, text in texts.items()),
        *(
            _placed(files, owner, (part, order[part]), folder, limits)
            for part in FILE_PARTS
            if order.get(part) is not None
        ),
    ]
    return Upload(
        texts["name"].decode(),
        is_served(texts.get("base_is", b"").decode()),
        order.get("card") is not None,
        fingerprint(parts),
        **{part: texts[part] for part in texts if part not in ("name", "base_is")},
    )


def _text(order: Mapping[str, Any], part: str) -> bytes | None:
    value = order.get(part)
    if value is None:
        return None
    if part in JSON_TEXTS and isinstance(value, dict):
        value = json.dumps(value)
    if not isinstance(value, str):
        raise InvalidRequest(f"{part} must be a text.", param=part)
    return _bounded(value.encode(), part, TEXT_PARTS[part])


def _placed(files: Files, owner: Owner, given: tuple[str, Any], folder: Path, limits: UploadLimits) -> Part:
    part, value = given
    target = folder / FILE_PARTS[part]
    if isinstance(value, dict) and target.suffix == ".json":
        data = _bounded(json.dumps(value).encode(), part, limits.of(part))
        with disk_errors(target):
            target.write_bytes(data)
        return part, len(data), hashlib.sha256(data).hexdigest()
    if not isinstance(value, str):
        raise InvalidRequest(f"{part} must be the id of a file, or an object where it is JSON.", param=part)
    with files.store.exclusive():  # or it could be deleted in between
        file, path = files.open(owner, value, ADAPTER)
        _check_size(file.size_bytes, part, limits.of(part))
        files.store.link(path, target)
    files.store.verify(target, file.digest)
    return part, file.size_bytes, file.digest


def _bounded(data: bytes, part: str, limit: int) -> bytes:
    _check_size(len(data), part, limit)
    return data


def _check_size(size_bytes: int, part: str, limit: int) -> None:
    if size_bytes > limit:
        raise PayloadTooLarge(f"{part} has {size_bytes} bytes; at most {limit} are taken.", param=part)
