"""A batch as one sequence without padding: what all rows begin with goes through the model once, then each row's rest.

    packed  = prefix ++ rest_1 ++ … ++ rest_B                      (num_tokens,)
    row b   = prefix ++ rest_b, at the positions it would have alone, up to the token before the last learned one

Every layer but attention works token by token, so on the packed sequence it computes what it would on the rows, without
padding and with the shared prefix once. Attention alone sees rows: it gathers the rests into (B, longest_rest) and lets
row b attend to the prefix and to rest_b. Values and gradients are those of the padded batch, up to rounding: a causal
model's states at the prefix do not depend on what follows, and the prefix's gradient is the sum over rows. For the same
reason a row ends where its last learned token is predicted: later tokens have no say in its loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from training.data.template import IGNORED, Rendered

ATTENTION = "hotshoe_packed"
Batch = dict[str, Any]


@dataclass(frozen=True)
class Packing:
    """Where the rows are in the packed sequence. `gather` (B, longest_rest) holds positions of each row's rest, padded
    with 0; `scatter` (num_tokens - prefix,) the place of each packed token in the flattened (B, longest_rest)."""

    prefix: int
    gather: torch.Tensor
    scatter: torch.Tensor


def collate(rows: Sequence[Rendered], shares_prefix: bool = True) -> Batch:
    """The rows as one packed batch. With dropout the prefix must not be shared: each row has a mask of its own.

    `input_ids` and `position_ids` are (1, num_tokens); `predicting` (num_supervised,) holds the packed positions whose
    next token is learned and `shift_labels` (num_supervised,) those tokens; Trainer counts the latter. `row_tokens` is
    the rows' length in all, each with its prefix and what follows its last learned token.
    """
    prefix = shared_prefix(rows) if shares_prefix else 0
    rests = [row.input_ids[prefix : row.used_tokens] for row in rows]
    longest = max(map(len, rests))
    ids = list(rows[0].input_ids[:prefix])
    positions = list(range(prefix))
    gather = torch.zeros(len(rows), longest, dtype=torch.long)
    scatter: list[int] = []
    predicting: list[int] = []
    targets: list[int] = []
    for index, (row, rest) in enumerate(zip(rows, rests, strict=True)):
        start = len(ids)
        gather[index, : len(rest)] = torch.arange(start, start + len(rest))
        scatter += range(index * longest, index * longest + len(rest))
        for place, label in enumerate(row.labels):
            if label != IGNORED:
                predicting.append(start + place - prefix - 1)
                targets.append(label)
        ids += rest
        positions += range(prefix, prefix + len(rest))
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "predicting": torch.tensor(predicting),
        "shift_labels": torch.tensor(targets),
        "labels": torch.tensor(targets),
        "gather": gather,
        "scatter": torch.tensor(scatter),
        "prefix": prefix,
        "row_tokens": sum(len(row.input_ids) for row in rows),
    }


def shared_prefix(rows: Sequence[Rendered]) -> int:
    """How many leading tokens all rows share, short of the first position whose output some row learns from."""
    first = min(next(i for i, label in enumerate(row.labels) if label != IGNORED) for row in rows)
    limit = first - 1  # the state at `first - 1` predicts that row's first label: it stays with the row
    if len(rows) == 1:
        return 0
    reference = rows[0].input_ids
    for place in range(limit):
        if any(row.input_ids[place] != reference[place] for row in rows):
            return place
    return max(0, limit)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface on (1, heads, num_tokens, head_dim); without a packing it is plain SDPA."""
    if packing is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return plain
    groups = query.shape[1] // key.shape[1]
    prefix = packing.prefix
    rest = functional.scaled_dot_product_attention(
        _rows(query[0], packing),
        _with_prefix(key[0], packing, groups),
        _with_prefix(value[0], packing, groups),
        attn_mask=_mask(packing, query.device) if prefix else None,
        is_causal=not prefix,
        scale=scaling,
    )  # (B, heads, longest_rest, head_dim)
    flat = rest.transpose(1, 2).flatten(0, 1).index_select(0, packing.scatter)  # (num_tokens - prefix, heads, head_dim)
    if prefix:
        alone = functional.scaled_dot_product_attention(
            query[:, :, :prefix],
            key[:, :, :prefix].repeat_interleave(groups, dim=1),
            value[:, :, :prefix].repeat_interleave(groups, dim=1),
            is_causal=True,
            scale=scaling,
        )
        flat = torch.cat([alone[0].transpose(0, 1), flat])
    return flat.unsqueeze(0), None


def register_attention() -> None:
    """Make `attn_implementation="hotshoe_packed"` known to transformers, with SDPA's masks for unpacked calls."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _rows(states: torch.Tensor, packing: Packing) -> torch.Tensor:
    """(heads, num_tokens, head_dim) -> (B, heads, longest_rest, head_dim)."""
    return states[:, packing.gather].transpose(0, 1)


def _with_prefix(states: torch.Tensor, packing: Packing, groups: int) -> torch.Tensor:
    """Each row's keys or values, the shared prefix before its rest, repeated for the query heads of a group."""
    rows = _rows(states, packing)
    if packing.prefix:
        shared = states[:, : packing.prefix].unsqueeze(0).expand(rows.shape[0], -1, -1, -1)
        rows = torch.cat([shared, rows], dim=2)
    return rows.repeat_interleave(groups, dim=1) if groups > 1 else rows


def _mask(packing: Packing, device: torch.device) -> torch.Tensor:
    """(longest_rest, prefix + longest_rest): all of the prefix, and causal in the rest."""
    longest = packing.gather.shape[1]
    return torch.ones(longest, packing.prefix + longest, dtype=torch.bool, device=device).tril(packing.prefix)
