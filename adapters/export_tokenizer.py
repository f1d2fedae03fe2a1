"""The tokenizer beside a trainer's adapter: it has to be the base's, with at most some tokens added to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters.bases import BaseModel
from adapters.checkpoint import StoredTensor, read_header
from adapters.errors import MergeFailed

TOKENIZER_FILE = "tokenizer.json"
SECTIONS = ("normalizer", "pre_tokenizer", "merges")


def own_tokenizer(source: Path, adapter: Path, base: BaseModel) -> Path | None:
    """`source`, the trainer's folder, where its tokenizer has tokens that the base's lacks; None where it has none.

    `adapter` is the folder of its canonical files. Raises MergeFailed where a token of the base has another id in it,
    or an id has no row in the embeddings.
    """
    if not (source / TOKENIZER_FILE).is_file() or not (base.folder / TOKENIZER_FILE).is_file():
        return None
    ours, theirs = token_ids(base.folder / TOKENIZER_FILE), token_ids(source / TOKENIZER_FILE)
    moved = [token for token, number in ours.items() if theirs.get(token) != number]
    if moved:
        raise MergeFailed(
            f"{source / TOKENIZER_FILE} is no extension of the base's tokenizer: {len(moved):,} of its tokens are "
            f"missing there or have another id, {moved[0][:40]!r} among them. Remove it to export with the base's."
        )
    differ = [part for part in SECTIONS if _section(base.folder, part) != _section(source, part)]
    if differ:
        raise MergeFailed(
            f"{source / TOKENIZER_FILE} cuts text otherwise than the base's tokenizer: its {', '.join(differ)} differ. "
            "Remove it to export with the base's."
        )
    added = theirs.keys() - ours.keys()
    rows = embedding_rows(read_header(adapter / "adapter_model.safetensors")) or int(base.config["vocab_size"])
    beyond = sorted(number for number in theirs.values() if number >= rows)
    if beyond:
        raise MergeFailed(
            f"{source / TOKENIZER_FILE} has tokens up to id {beyond[-1]:,} and the embeddings {rows:,} rows: the rows "
            f"of the {len(beyond):,} others were not saved with the adapter (PEFT: modules_to_save)."
        )
    return source if added else None


def _section(folder: Path, part: str) -> Any:
    content = json.loads((folder / TOKENIZER_FILE).read_bytes())
    if part != "merges":
        return content.get(part)
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in content["model"].get("merges") or ()]


def token_ids(path: Path) -> dict[str, int]:
    """Every token of a tokenizer.json with its id, the added ones among them; raises MergeFailed."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        ids = {str(token): int(number) for token, number in content["model"]["vocab"].items()}
        ids |= {str(token["content"]): int(token["id"]) for token in content.get("added_tokens") or ()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise MergeFailed(f"{path} cannot be read as a tokenizer: {error!r}.") from error
    return ids


def embedding_rows(header: Sequence[StoredTensor]) -> int | None:
    """Rows of the embeddings and output layer that an adapter with these tensors brings along; None where neither.

    Raises MergeFailed where they contradict each other.
    """
    found = {tensor.name: rows for tensor in header if (rows := _rows(tensor)) is not None}
    if len(set(found.values())) > 1:
        raise MergeFailed(f"The adapter has vocabularies of several sizes: {found}.")
    return next(iter(found.values()), None)


def trains_whole(header: Sequence[StoredTensor], module: str) -> bool:
    """An adapter with these tensors brings every row of `embed_tokens` or `lm_head`, and not an update of it."""
    return any(tensor.name.endswith(f"{module}.weight") for tensor in header)


def _rows(tensor: StoredTensor) -> int | None:
    name = tensor.name
    if name.endswith(("embed_tokens.weight", "lm_head.weight", "lm_head.lora_B.weight")):
        return tensor.shape[0]
    return tensor.shape[1] if name.endswith("embed_tokens.lora_embedding_A") else None
