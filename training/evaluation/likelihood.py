"""What a model makes of given tokens: their log-probabilities, and how far two models' predictions lie apart."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from training.greedy import padded_behind, shared_prefix
from training.metrics.measure import Floats
from training.model import causal_lm

POSITIONS = 64  # whose logits are held at a time


@dataclass(frozen=True)
class Given:
    """Token ids, of which those from `start` on are judged; `start` is at least 1."""

    ids: Sequence[int]
    start: int


@torch.inference_mode()
def logprobs(model: Any, rows: Sequence[Given], pad: int, batch_size: int = 8) -> list[Floats]:
    """Of each row log p(token | all before it) of its judged tokens; of none where there are none.

    What all rows begin with goes through the model once.
    """
    found: list[Floats] = [np.zeros(0) for _ in rows]
    if not rows:
        return found
    prefix = min(shared_prefix([list(row.ids) for row in rows]), min(row.start for row in rows) - 1)
    prefix = prefix if len(rows) > 1 else 0
    rests = [Given(row.ids[prefix:], row.start - prefix) for row in rows]
    cache = None
    if prefix:
        shared = torch.tensor([list(rows[0].ids[:prefix])], device=model.device)
        cache = causal_lm(model).model(input_ids=shared, use_cache=True).past_key_values
    order = sorted(range(len(rows)), key=lambda row: len(rows[row].ids))
    for at in range(0, len(order), batch_size):
        chosen = order[at : at + batch_size]
        states = hidden_states(model, [rests[row].ids for row in chosen], pad, cache)
        for row, state in zip(chosen, states, strict=True):
            found[row] = _of_row(model, state, rests[row])
    return found


def hidden_states(model: Any, ids: Sequence[Sequence[int]], pad: int, prefix: Any = None) -> torch.Tensor:
    """(rows, longest, hidden): the last states of a batch that is padded behind; `prefix` is the cache of what is
    before every row."""
    padded, mask = (made.to(model.device) for made in padded_behind(ids, pad))
    past = copy.deepcopy(prefix)
    if past is not None:
        mask = torch.cat([mask.new_ones(len(ids), int(past.get_seq_length())), mask], dim=1)
        past.batch_repeat_interleave(len(ids))
    states: torch.Tensor = (
        causal_lm(model)
        .model(input_ids=padded, attention_mask=mask, past_key_values=past, use_cache=past is not None)
        .last_hidden_state
    )
    return states


def _of_row(model: Any, state: torch.Tensor, given: Given) -> Floats:
    pieces = []
    for start in range(given.start, len(given.ids), POSITIONS):
        targets = torch.tensor(given.ids[start : start + POSITIONS], device=state.device)
        predicted = log_softmax(model, state[start - 1 : start - 1 + len(targets)])
        pieces.append(predicted.gather(1, targets[:, None])[:, 0].double().cpu().numpy())
    return np.concatenate(pieces) if pieces else np.zeros(0)


def log_softmax(model: Any, state: torch.Tensor) -> torch.Tensor:
    """(positions, vocabulary) in float32, of (positions, hidden)."""
    head = causal_lm(model).lm_head
    return torch.log_softmax(head(state.to(head.weight.dtype)).float(), dim=-1)


def divergence(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """KL(base || tuned) = sum_v p_base (log p_base - log p_tuned) of each position, (positions,); never below 0."""
    return (base.exp() * (base - tuned)).sum(dim=-1).clamp_min(0)
