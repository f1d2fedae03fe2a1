"""Greedy answers in batches. What all prompts begin with goes through the model once; its keys and values are shared.

    row b of a batch = prefix ++ padding ++ rest_b

Padding is masked and takes no position, so a row's answer is the one it has alone, up to the rounding that another
batch brings.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from training.quiet import Progress, unwatched

Tokens = list[int]


@dataclass(frozen=True)
class Decoding:
    """How answers are made: `stops` end one; after `max_seconds` a batch is cut short wherever it is."""

    pad: int
    stops: tuple[int, ...]
    max_new_tokens: int
    batch_size: int = 32
    max_seconds: float | None = None


def shared_prefix(rows: Sequence[Tokens]) -> int:
    """How many leading tokens all rows share, short of the shortest row's last."""
    shortest, longest = min(rows), max(rows)  # in lexicographic order: what these two share, all share
    limit = min(map(len, rows)) - 1
    return next((i for i in range(limit) if shortest[i] != longest[i]), limit)


def padded(rests: Sequence[Tokens], prefix: Tokens, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of a batch, each (len(rests), len(prefix) + longest rest)."""
    longest = max(map(len, rests))
    gaps = [longest - len(rest) for rest in rests]
    ids = [[*prefix, *[pad] * gap, *rest] for gap, rest in zip(gaps, rests, strict=True)]
    mask = [[*[1] * len(prefix), *[0] * gap, *[1] * len(rest)] for gap, rest in zip(gaps, rests, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def padded_behind(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of rows that end in padding, each (len(rows), longest row)."""
    longest = max(map(len, rows))
    ids = [[*row, *[pad] * (longest - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


@torch.inference_mode()
def greedy_answers(
    model: Any,
    prompts: Sequence[Tokens],
    decoding: Decoding,
    progress: Progress = unwatched,
) -> list[Tokens]:
    """The new tokens of each prompt, in the order of the prompts. Batches are made of prompts of similar length."""
    prefix = prompts[0][: shared_prefix(prompts)] if len(prompts) > 1 else []
    cache = None
    if prefix:
        cache = model(input_ids=torch.tensor([prefix], device=model.device), use_cache=True).past_key_values
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    answers: list[Tokens] = [[] for _ in prompts]
    for start in range(0, len(order), decoding.batch_size):
        rows = order[start : start + decoding.batch_size]
        ids, mask = padded([prompts[row][len(prefix) :] for row in rows], prefix, decoding.pad)
        past = copy.deepcopy(cache)
        if past is not None:
            past.batch_repeat_interleave(len(rows))
        found = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            past_key_values=past,
            max_new_tokens=decoding.max_new_tokens,
            max_time=decoding.max_seconds,
            eos_token_id=list(decoding.stops),
            pad_token_id=decoding.pad,
            do_sample=False,
            use_cache=True,
        )
        for row, new in zip(rows, found[:, ids.shape[1] :].tolist(), strict=True):
            answers[row] = new
        progress(min(start + decoding.batch_size, len(order)), len(order))
    return answers
