"""The loss at supervised positions only: cross entropy after the output layer, without keeping a logits matrix.

    loss = sum_i logsumexp(W h_i) - (W h_i)[y_i]        h (num_supervised, hidden), W (vocabulary, hidden)
    s_i = softmax(W h_i) - onehot(y_i)
    d loss / d h_i = W^T s_i
    d loss / d W = sum_i s_i h_i^T                      where W is trained, too

The gradients are computed beside the loss, one block of positions at a time, so that the memory is a
block's logits, not the batch's. The idea of fusing the two is Liger Kernel's (arXiv 2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch

from training.model import causal_lm
from training.packed import Batch, Packing

BLOCK_BYTES = 16_000_000  # of float32 logits at a time


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        wants_gradient, trains_weight = ctx.needs_input_grad[:2]
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if wants_gradient else None
        of_weight = torch.zeros_like(weight) if trains_weight else None
        size = max(1, BLOCK_BYTES // (4 * weight.shape[0]))
        for start in range(0, hidden.shape[0], size):
            block = slice(start, start + size)
            logits = (hidden[block].to(weight.dtype) @ weight.t()).float()
            wanted = targets[block].unsqueeze(1)
            normaliser = logits.logsumexp(dim=1, keepdim=True)
            total += (normaliser - logits.gather(1, wanted)).sum()
            if gradient is not None:
                slope = logits.sub_(normaliser).exp_()
                slope.scatter_add_(1, wanted, slope.new_full(wanted.shape, -1.0))
                gradient[block] = (slope.to(weight.dtype) @ weight).to(gradient.dtype)
                if of_weight is not None:
                    of_weight += slope.t().to(weight.dtype) @ hidden[block].to(weight.dtype)
        ctx.save_for_backward(gradient, of_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        gradient, of_weight = ctx.saved_tensors
        scaled = None if of_weight is None else of_weight * slopes[0].to(of_weight.dtype)
        return gradient * slopes[0].to(gradient.dtype), scaled, None


def cross_entropy_sum(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sum over positions; `hidden` (num_supervised, hidden), `weight` (vocabulary, hidden), float32."""
    loss: torch.Tensor = _CrossEntropySum.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return loss


def supervised_loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    """The summed cross entropy of a packed batch under a causal language model or its PEFT wrapper; float32."""
    return cross_entropy_sum(*_predicting(model, batch), batch["shift_labels"])


@torch.no_grad()
def supervised_losses(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each learned token, and of the likeliest token in its place; (num_supervised,) each, float32."""
    hidden, weight = _predicting(model, batch)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    size = max(1, BLOCK_BYTES // (4 * weight.shape[0]))
    for start in range(0, hidden.shape[0], size):
        logits = (hidden[start : start + size].to(weight.dtype) @ weight.t()).float()
        wanted = batch["shift_labels"][start : start + size].unsqueeze(1)
        normaliser = logits.logsumexp(dim=1)
        found.append((normaliser - logits.gather(1, wanted).squeeze(1), normaliser - logits.amax(dim=1)))
    return torch.cat([losses for losses, _ in found]), torch.cat([least for _, least in found])


def _predicting(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The states that learned tokens are predicted from, (num_supervised, hidden), and the output layer's weight."""
    whole = causal_lm(model)
    packing = Packing(int(batch["prefix"]), batch["gather"], batch["scatter"])
    states = whole.model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask={"full_attention": None},
        use_cache=False,
        packing=packing,
    ).last_hidden_state
    return states[0].index_select(0, batch["predicting"]), whole.lm_head.weight
