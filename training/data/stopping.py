"""Refuses a base that cannot learn to stop: the token that ends a turn has an embedding that nobody trained.

An adapter leaves embeddings and output head as they are. A checkpoint before instruction tuning often has tokens that
no text of its training held; their rows are still zero, or equal to those of the numbers that no token has. From such a
row neither `<|im_end|>` is recognised nor written, so the adapter would answer without end.
"""

from __future__ import annotations

from typing import Any

from adapters.bases import BaseModel, weight_files
from adapters.errors import BaseInvalid
from training.data.template import ChatTemplate

TABLES = {"model.embed_tokens.weight", "lm_head.weight"}


def refuse_untrained_end(base: BaseModel, template: ChatTemplate) -> None:
    """Raise BaseInvalid where the embedding or the output head has no trained row for the template's end of turn."""
    from safetensors import SafetensorError, safe_open

    token = template.end_of_turn()
    if token is None:
        return
    for path in weight_files(base.folder):
        try:
            with safe_open(str(path), framework="pt") as file:
                reasons = {
                    name: _untrained(file.get_slice(name), token, len(template.tokenizer))
                    for name in sorted(TABLES & set(file.keys()))
                }
        except (SafetensorError, OSError) as error:
            raise BaseInvalid(f"{path} cannot be read: {error}. Download the base again.") from error
        for name, reason in reasons.items():
            if reason:
                raise BaseInvalid(
                    f"{base.folder} ends a turn with {template.tokenizer.decode([token])!r}, but its row in {name} "
                    f"{reason}: it was never trained, and its adapters would never stop. Use the base's Instruct form."
                )


def _untrained(table: Any, token: int, used: int) -> str:
    """Why the token's row was never trained, "" where it was; `used` numbers have a token, the table's others none."""
    rows = int(table.get_shape()[0])
    row = table[token : token + 1]
    if not row.any():
        return "is zero"
    unused = [table[index : index + 1] for index in {used, rows - 1} if used <= index < rows]
    return "equals that of a number without a token" if any((row == other).all() for other in unused) else ""
