"""Greedy answers, and whether two models give the same ones: where they part, is it rounding or a bug?

An answer is a plain dict, so that any runner can give one: `ids` of the prompt, `greedy` ids of the answer, and `top`:
for each of these the likeliest tokens there, token id -> log-probability.
Two answers part at the first token that differs. Up to there both models read the same tokens, so that

    gap = log p(the reference's token) - log p(the other's token), both in the reference

is at most twice the largest difference of their logits. A larger gap is not rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Answer = Mapping[str, Any]
MAX_NEW_TOKENS = 24
TOP_TOKENS = 20
BATCH_ROWS = 16


def greedy_answers(model: Any, prompts: Sequence[list[int]], stops: Sequence[int]) -> list[dict[str, Any]]:
    """The model's answers of at most MAX_NEW_TOKENS tokens, each with the stop token that ended it.

    Batches of prompts of similar length, padded on the left; the padding is masked and takes no position.
    """
    import torch

    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    answers: list[dict[str, Any]] = [{} for _ in prompts]
    with torch.no_grad():
        for start in range(0, len(order), BATCH_ROWS):
            rows = order[start : start + BATCH_ROWS]
            for row, answer in zip(rows, _batch(model, [prompts[row] for row in rows], set(stops)), strict=True):
                answers[row] = answer
    return answers


def _batch(model: Any, prompts: Sequence[list[int]], stops: set[int]) -> list[dict[str, Any]]:
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    answers: list[dict[str, Any]] = [{"ids": list(prompt), "greedy": [], "top": []} for prompt in prompts]
    past = None
    for _ in range(MAX_NEW_TOKENS):
        found = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        past = found.past_key_values
        top = found.logits[:, -1].float().log_softmax(-1).topk(min(TOP_TOKENS, found.logits.shape[-1]))
        for answer, tokens, values in zip(answers, top.indices.tolist(), top.values.tolist(), strict=True):
            if not _has_ended(answer, stops):
                answer["greedy"].append(tokens[0])
                answer["top"].append(dict(zip(tokens, values, strict=True)))
        if all(_has_ended(answer, stops) for answer in answers):
            break
        ids = top.indices[:, :1]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = positions[:, -1:] + 1
    return answers


def _has_ended(answer: Answer, stops: set[int]) -> bool:
    return bool(answer["greedy"]) and answer["greedy"][-1] in stops


def stop_tokens(model: Any) -> list[int]:
    """The tokens that end an answer, of the model's generation config or else its config."""
    named = (getattr(one, "eos_token_id", None) for one in (getattr(model, "generation_config", None), model.config))
    found: Any = next((stop for stop in named if stop is not None), [])
    return list(found) if isinstance(found, list | tuple) else [int(found)]


def first_difference(reference: Answer, other: Answer) -> int | None:
    """The index of the first token that is not the same, or that one answer has and the other has not."""
    one, two = reference["greedy"], other["greedy"]
    if list(one) == list(two):
        return None
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def gap_at(reference: Answer, other: Answer, index: int) -> float | None:
    """How much likelier the reference's token is to it than the other's, in nats.

    A lower bound where the other's token is not among the reference's `top`; None where one answer has no token there.
    """
    if index >= min(len(reference["greedy"]), len(other["greedy"])):
        return None
    top = {int(token): float(value) for token, value in reference["top"][index].items()}
    best = top.get(int(reference["greedy"][index]), max(top.values()))
    return best - top.get(int(other["greedy"][index]), min(top.values()))


def compare_answers(
    reference: Sequence[Answer], other: Sequence[Answer], limit: float, excused: Sequence[Answer] | None = None
) -> dict[str, Any]:
    """How many answers are the same, and each first difference, which `is_rounding` while its gap is within `limit`.

    A difference is rounding, too, where `excused`, answers that are known to differ by rounding alone, has the same
    token there after the same beginning. Raises ValueError where the two did not answer the same prompts.
    """
    differences = []
    for row, (one, two) in enumerate(zip(reference, other, strict=True)):
        if list(one["ids"]) != list(two["ids"]):
            raise ValueError(f"prompt {row} is not the same in both: nothing to compare")
        index = first_difference(one, two)
        if index is None:
            continue
        gap = gap_at(one, two, index)
        is_same_as_excused = excused is not None and _begins_alike(excused[row], two, index)
        is_rounding = is_same_as_excused or (gap is not None and gap <= limit)
        shown = None if gap is None else float(f"{gap:.6g}")
        differences.append({"prompt": row, "token": index, "gap": shown, "is_rounding": is_rounding})
    same = len(reference) - len(differences)
    return {
        "prompts": len(reference),
        "identical": same,
        "agreement": float(f"{same / len(reference):.6g}") if reference else None,
        "beyond_rounding": sum(not difference["is_rounding"] for difference in differences),
        "first_differences": differences,
    }


def _begins_alike(one: Answer, two: Answer, index: int) -> bool:
    return list(one["greedy"][: index + 1]) == list(two["greedy"][: index + 1])


def side_by_side(tokenizer: Any, reference: Answer, other: Answer, stops: Sequence[int]) -> dict[str, Any]:
    """Both answers as text, each split where they part: `same`, and the `rest` of each (empty when they are equal)."""
    index = first_difference(reference, other)
    sides = {"peft": reference["greedy"], "merged": other["greedy"]}
    bare = {name: ids[:-1] if ids and ids[-1] in stops else ids for name, ids in sides.items()}
    whole = {name: _text(tokenizer, ids) for name, ids in bare.items()}
    same = whole["peft"] if index is None else _text(tokenizer, bare["peft"][:index])
    if not all(text.startswith(same) for text in whole.values()):  # a letter's bytes were cut apart
        same = same.rstrip("\N{REPLACEMENT CHARACTER}")
        same = same if all(text.startswith(same) for text in whole.values()) else ""
    return {"first_difference": index, "same": same, **{name: text[len(same) :] for name, text in whole.items()}}


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids)) if tokenizer is not None else " ".join(map(str, ids))
