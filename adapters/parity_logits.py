"""Logits and answers of whole models, in a process of its own: `python -m adapters.parity_logits SPEC.json`.

Everything in float32 over the same prompts, but for one run: base + adapter in PEFT (the reference), PEFT's own merge
rounded to the output dtype (the rounding floor), the merged folder as a plain transformers model, and the base computed
in float32 and in the output dtype (the dtype floor). SPEC.json holds the folders `base`, `adapter` and `merged`,
`dtype`, and perhaps `served` (what a server said), `evaluation` (a user's rows) and `chat_template`;
the answer is one JSON document on stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adapters.parity import compare_logits
from adapters.parity_answers import MAX_NEW_TOKENS, compare_answers, greedy_answers, side_by_side, stop_tokens
from adapters.parity_nf4 import against_training, put_through_nf4
from adapters.parity_prompts import KEPT_LOGITS_BYTES, PROBE, Prompts, open_tokenizer, prompt_sets
from adapters.parity_verdict import largest_gap

Logits = list[npt.NDArray[np.float32]]
MAX_SHOWN_ANSWERS = 8
THREADS = 1  # fixed: float32 sums depend on it, and a second run shall give the same report


@dataclass
class Run:
    """What one model computed, by set: logits at the kept positions of each sequence, and its greedy answers."""

    logits: dict[str, Logits] = field(default_factory=dict)
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    served: dict[str, Any] | None = None


@dataclass(frozen=True)
class Ground:
    """What every run of a comparison has in common. `sequences` are each prompt and the reference's answer to it."""

    sets: Sequence[Prompts]
    sequences: Mapping[str, list[list[int]]]
    vocab_size: int
    stops: Sequence[int]
    served: Sequence[Mapping[str, Any]]


def main(spec_path: str) -> None:
    import torch

    torch.set_num_threads(THREADS)
    print(json.dumps(probe(json.loads(Path(spec_path).read_text()))))


def probe(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The comparisons as one JSON-ready dict. `dtype` is the float type the merged weights were rounded to."""
    from peft import PeftModel

    model = load(spec["base"])
    if spec.get("through_nf4"):
        put_through_nf4(model, spec["base"])
    tokenizer = open_tokenizer(spec.get("tokenizer") or spec["base"], spec.get("chat_template"))
    adapted = PeftModel.from_pretrained(model, spec["adapter"]).eval()
    ground, reference = reference_run(adapted, tokenizer, spec)
    rounded = run(rounded_to(adapted.merge_and_unload(), spec["dtype"]), ground, with_served=False)
    del model, adapted
    return finished(spec, tokenizer, ground, reference, rounded)


def reference_run(adapted: Any, tokenizer: Any, spec: Mapping[str, Any]) -> tuple[Ground, Run]:
    """What base + adapter answers and computes, and from it what all others are asked."""
    vocab_size = adapted.config.vocab_size
    sets, stops = prompt_sets(tokenizer, spec.get("evaluation") or (), vocab_size), stop_tokens(adapted)
    answers = {one.name: greedy_answers(adapted, one.ids, stops) for one in sets}
    sequences = {name: [[*one["ids"], *one["greedy"]] for one in answered] for name, answered in answers.items()}
    ground = Ground(sets, sequences, vocab_size, stops, spec.get("served") or [])
    return ground, run(adapted, ground, answers=answers)


def run(
    model: Any, ground: Ground, *, answers: dict[str, list[dict[str, Any]]] | None = None, with_served: bool = True
) -> Run:
    """The model's logits over the sequences of the ground, and its own answers where none are given."""
    logits = {
        name: forward(model, rows, kept_positions(rows, ground.vocab_size)) for name, rows in ground.sequences.items()
    }
    if answers is None:
        answers = {one.name: greedy_answers(model, one.ids, ground.stops) for one in ground.sets}
    return Run(logits, answers, against_served(model, ground.served) if with_served else None)


def finished(spec: Mapping[str, Any], tokenizer: Any, ground: Ground, reference: Run, rounded: Run) -> dict[str, Any]:
    """The comparison, once the merged folder and the base have been run, too."""
    merged = run(load(spec["merged"]), ground)
    floors = _dtype_floors(spec, ground)
    figures: dict[str, Any] = {"forward": "whole"}
    for one in ground.sets:
        shown = compared(one, ground.sequences[one.name], reference, rounded, merged, floors.get(one.name))
        if one.ids:
            shown["answers"] = _answers(one, tokenizer, ground.stops, shown, (reference, rounded, merged))
        figures.update(shown if one.name == PROBE else {one.name: shown})
    figures |= {"served_against_peft": reference.served, "served_against_merged": merged.served}
    if spec.get("trained_on_nf4"):
        figures["training_base"] = against_training(spec, ground, reference, merged)
    return figures


def compared(
    one: Prompts, sequences: list[list[int]], peft: Run, rounded: Run, merged: Run, dtype_floor: dict[str, Any] | None
) -> dict[str, Any]:
    """The figures of one set; only the counts where no row of it could be used."""
    name, tokens = one.name, sum(map(len, sequences))
    counts = {"rows": one.rows, "sequences": len(sequences), "tokens": tokens, "left_out": dict(one.left_out)}
    key = PROBE if name == PROBE else "counts"
    if not sequences:
        return {key: counts}
    return {
        key: counts,
        "merged_against_peft": compare_logits(peft.logits[name], merged.logits[name]).as_dict(),
        "rounding_floor": compare_logits(peft.logits[name], rounded.logits[name]).as_dict(),
        "merged_against_rounded_peft": compare_logits(rounded.logits[name], merged.logits[name]).as_dict(),
        "dtype_floor": dtype_floor,
        "answers": None,
    }


def _answers(
    one: Prompts, tokenizer: Any, stops: Sequence[int], figures: Mapping[str, Any], runs: tuple[Run, Run, Run]
) -> dict[str, Any]:
    peft, rounded, merged = (run.answers[one.name] for run in runs)
    limit = largest_gap(figures)
    sides = [side_by_side(tokenizer, *pair, stops) for pair in zip(peft, merged, strict=True)]
    order = sorted(range(len(sides)), key=lambda row: (sides[row]["first_difference"] is None, row))
    return {
        "max_new_tokens": MAX_NEW_TOKENS,
        "largest_gap": float(f"{limit:.6g}"),
        "merged_against_peft": compare_answers(peft, merged, limit, excused=rounded),
        "rounding_floor": compare_answers(peft, rounded, limit),
        "shown": [{"row": row, "prompt": one.texts[row], **sides[row]} for row in order[:MAX_SHOWN_ANSWERS]],
    }


def kept_positions(sequences: Sequence[Sequence[int]], vocab_size: int) -> list[list[int]]:
    """The positions of each sequence whose logits are compared: all, or so many that they fit, evenly spread."""
    flat = [(row, position) for row, sequence in enumerate(sequences) for position in range(len(sequence))]
    most = max(1, KEPT_LOGITS_BYTES // (4 * vocab_size))
    if len(flat) > most:
        flat = [flat[i * len(flat) // most] for i in range(most)]
    kept: list[list[int]] = [[] for _ in sequences]
    for row, position in flat:
        kept[row].append(position)
    return kept


def _dtype_floors(spec: Mapping[str, Any], ground: Ground) -> dict[str, dict[str, Any]]:
    """By set, the base computed in the output dtype against the base in float32: what that dtype costs any model."""
    if spec["dtype"] == "float32":
        return {}
    exact, narrow = (base_logits(spec["base"], dtype, ground) for dtype in ("float32", spec["dtype"]))
    return dtype_floors(exact, narrow)


def base_logits(folder: str, dtype: str, ground: Ground) -> dict[str, Logits]:
    """The base's logits over the sequences, computed in `dtype`."""
    model = load(folder, dtype)
    return {
        name: forward(model, rows, kept_positions(rows, ground.vocab_size)) for name, rows in ground.sequences.items()
    }


def dtype_floors(exact: Mapping[str, Logits], narrow: Mapping[str, Logits]) -> dict[str, dict[str, Any]]:
    """The comparison by set; left out where the narrow run has values beyond its format's largest."""
    return {
        name: compare_logits(exact[name], rows).as_dict()
        for name, rows in narrow.items()
        if rows and all(np.isfinite(row).all() for row in rows)
    }


def load(folder: str, dtype: str = "float32") -> Any:
    """The folder's model in `dtype`; ends the process where weights are missing or left over."""
    import torch
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), output_loading_info=True)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {kind: sorted(map(str, found.get(kind) or ())) for kind in kinds}
    if any(wrong.values()):
        raise SystemExit(f"{folder} does not load cleanly in transformers: {wrong}")
    return model.eval()


def rounded_to(model: Any, dtype: str) -> Any:
    """The model with every weight rounded to `dtype` and back."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
    return model


def forward(model: Any, sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]] | None = None) -> Logits:
    """The logits of each sequence, (kept positions, vocabulary), one sequence at a time; all of them unless given."""
    import torch

    kept = positions or [range(len(sequence)) for sequence in sequences]
    with torch.no_grad():
        return [
            model(torch.tensor([sequence]), logits_to_keep=torch.tensor(list(places))).logits[0].float().numpy()
            for sequence, places in zip(sequences, kept, strict=True)
            if len(places)
        ]


def against_served(model: Any, served: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Log-probabilities of the tokens that a server named, against this model's for the same ones."""
    differences: list[float] = []
    agreements: list[bool] = []
    for answer in served:
        logits = forward(model, [answer["ids"]])[0].astype(np.float64)
        for row, top in zip(logits, answer["top"], strict=False):  # row i predicts token i + 1
            named = np.array([int(token) for token in top])
            shifted = row - row.max()
            ours = (shifted - np.log(np.exp(shifted).sum()))[named]
            theirs = np.array(list(top.values()))
            differences += np.abs(ours - theirs).tolist()
            agreements.append(int(row.argmax()) == int(named[theirs.argmax()]))
    if not differences:
        return None
    return {
        "positions": len(agreements),
        "log_probabilities": len(differences),
        "max_abs": float(f"{max(differences):.2g}"),  # a server's last digits depend on what else it was doing
        "mean_abs": float(f"{sum(differences) / len(differences):.2g}"),
        "top1_agreement": float(f"{sum(agreements) / len(agreements):.6g}"),
    }


if __name__ == "__main__":
    main(sys.argv[1])
