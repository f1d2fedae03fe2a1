"""Which merge of an adapter that was trained on an NF4 base is nearer to what training computed?

A QLoRA run computes with the weights that NF4 leaves. Its adapter can be merged into the original weights, which the
run never saw, or into those that it saw. Both merges, each rounded to the output dtype, are compared with the NF4
base + adapter, all in float32, over the prompts of the parity report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapters.bases import load_base
from adapters.checkpoint import FLOATS, read_checkpoint
from adapters.parity import compare_logits
from adapters.parity_answers import compare_answers
from adapters.parity_prompts import PROBE

if TYPE_CHECKING:
    from adapters.parity_logits import Ground, Run

INTO_ORIGINAL, INTO_NF4 = "merged_into_original", "merged_into_nf4"


def put_through_nf4(model: Any, folder: str) -> Any:
    """Give a model loaded in float32 the projections that NF4 leaves of those in its folder."""
    import torch

    from adapters.nf4 import nf4_weight

    base = load_base(folder)
    stored = {tensor.name: tensor.dtype for tensors in read_checkpoint(base).values() for tensor in tensors}
    with torch.no_grad():
        for module in base.shapes:
            weight = model.get_submodule(module).weight
            dtype = getattr(torch, FLOATS[stored[f"{module}.weight"]])
            weight.copy_(nf4_weight(weight.to(dtype)))
    return model


def against_training(spec: Mapping[str, Any], ground: Ground, reference: Run, merged: Run) -> dict[str, Any]:
    """By set, how far each merge is from the NF4 base + adapter, and `closer`, which of them is nearer over all.

    `reference` and `merged` are the runs of the report; the other merge is made here.
    """
    from peft import PeftModel

    from adapters.parity_logits import load, rounded_to, run

    is_nf4 = bool(spec.get("through_nf4"))
    model = load(spec["base"])
    other = PeftModel.from_pretrained(model if is_nf4 else put_through_nf4(model, spec["base"]), spec["adapter"]).eval()
    seen = reference if is_nf4 else run(other, ground, with_served=False)
    second = run(rounded_to(other.merge_and_unload(), spec["dtype"]), ground, with_served=False)
    merges = {INTO_ORIGINAL: second if is_nf4 else merged, INTO_NF4: merged if is_nf4 else second}
    figures: dict[str, Any] = {
        one.name: {name: _distance(seen, found, one.name) for name, found in merges.items()}
        for one in ground.sets
        if one.ids
    }
    means = {name: sum(found[name]["mean_kl"] for found in figures.values()) for name in merges}
    return {**figures, "closer": min(means, key=lambda name: means[name])}


def _distance(seen: Run, other: Run, name: str) -> dict[str, Any]:
    answers = compare_answers(seen.answers[name], other.answers[name], math.inf)
    counts = {"prompts": answers["prompts"], "identical_answers": answers["identical"]}
    return {**compare_logits(seen.logits[name], other.logits[name]).as_dict(), **counts}


def note(found: Mapping[str, Any]) -> str:
    """What a reader should know of it, in a sentence."""
    original, nf4 = found[PROBE][INTO_ORIGINAL], found[PROBE][INTO_NF4]
    closer = "the original weights" if found["closer"] == INTO_ORIGINAL else "what NF4 leaves of them"
    return (
        "Against what training computed with (the NF4 base + adapter), merged into the original weights: mean KL "
        f"{original['mean_kl']:.3g} nats, {original['identical_answers']} of {original['prompts']} answers the same; "
        f"merged into what NF4 leaves of them: {nf4['mean_kl']:.3g} nats, {nf4['identical_answers']} the same. "
        f"Nearer to training is {closer}."
    )
