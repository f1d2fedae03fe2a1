"""What parity is measured on: the prompts of the probe and of a user's evaluation rows, as token ids.

A prompt is rendered as a server renders it, with the chat template of the version or else the base's; where there is no
template it is the bare text. A row that cannot be used is counted under its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adapters.parity_served import PROBES

PROBE, EVALUATION = "probe", "evaluation"
MAX_ROWS = 64  # of an evaluation; more are thinned out evenly
MAX_TOKENS = 4096  # of all prompts of a set: what one core reads in minutes with a small model
KEPT_LOGITS_BYTES = 128 << 20  # of one model over one set, in float32: 220 positions of a vocabulary of 152k
MAX_SHOWN = 2000  # characters of a prompt that the report keeps
RANDOM_TOKENS = 24


@dataclass(frozen=True)
class Prompts:
    """One set: token ids and what a person asked, row by row. `rows` are those that were given."""

    name: str
    rows: int
    ids: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))


def open_tokenizer(folder: str, chat_template: str | None) -> Any:
    """The folder's tokenizer with that template in place of its own; None where the folder has none."""
    from transformers import AutoTokenizer

    if not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def prompt_sets(tokenizer: Any, rows: Sequence[Any], vocab_size: int) -> list[Prompts]:
    """The probe and, where rows were given, the evaluation.

    A row is a prompt as text, or an object with `messages` and perhaps `tools`, whose last answer is not shown to the
    model. Without a tokenizer the probe is seeded random ids, and no evaluation row can be used.
    """
    sets = [_probe(tokenizer, vocab_size)]
    if rows:
        sets.append(_evaluation(tokenizer, rows, vocab_size))
    return sets


def _probe(tokenizer: Any, vocab_size: int) -> Prompts:
    if tokenizer is not None:
        return _read(Prompts(PROBE, len(PROBES)), tokenizer, PROBES, vocab_size)
    random = np.random.default_rng(0)
    ids = [random.integers(0, vocab_size, RANDOM_TOKENS).tolist() for _ in PROBES]
    return Prompts(PROBE, len(PROBES), ids, ["random tokens: the base has no tokenizer"] * len(PROBES))


def _evaluation(tokenizer: Any, rows: Sequence[Any], vocab_size: int) -> Prompts:
    made = Prompts(EVALUATION, len(rows))
    kept = [rows[i * len(rows) // MAX_ROWS] for i in range(MAX_ROWS)] if len(rows) > MAX_ROWS else rows
    if len(rows) > len(kept):
        made.left_out[f"beyond {MAX_ROWS} rows, evenly thinned out"] = len(rows) - len(kept)
    if tokenizer is None:
        made.left_out["the base has no tokenizer"] += len(kept)
        return made
    return _read(made, tokenizer, kept, vocab_size)


def _read(made: Prompts, tokenizer: Any, rows: Sequence[Any], vocab_size: int) -> Prompts:
    for row in rows:
        try:
            text, ids = _rendered(tokenizer, row)
        except Exception as error:  # noqa: BLE001  a template is a program and raises what it likes
            made.left_out[f"cannot be rendered: {type(error).__name__}: {str(error)[:100]}"] += 1
            continue
        if not ids or made.tokens + len(ids) > MAX_TOKENS:
            made.left_out[f"beyond {MAX_TOKENS:,} tokens in all" if ids else "empty"] += 1
            continue
        made.ids.append([min(token, vocab_size - 1) for token in ids])
        made.texts.append(text[:MAX_SHOWN])
    return made


def _rendered(tokenizer: Any, row: Any) -> tuple[str, list[int]]:
    """What the user asked last, and the whole prompt as ids."""
    if isinstance(row, str):
        if not getattr(tokenizer, "chat_template", None):
            return row, tokenizer(row)["input_ids"]
        row = {"messages": [{"role": "user", "content": row}]}
    if not isinstance(row, Mapping) or not isinstance(row.get("messages"), list):
        raise ValueError("neither a text nor an object with messages")
    messages = list(row["messages"])
    while messages and messages[-1].get("role") == "assistant":
        messages.pop()
    if not messages:
        raise ValueError("no message before the answer")
    text = tokenizer.apply_chat_template(
        messages, tools=row.get("tools") or None, add_generation_prompt=True, tokenize=False
    )
    asked = messages[-1].get("content")
    return asked if isinstance(asked, str) else str(asked), tokenizer(text, add_special_tokens=False)["input_ids"]
