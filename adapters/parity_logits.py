"""The logits part of the parity report, in a process of its own: `python -m adapters.parity_logits SPEC.json`.

Three forwards in float32 over the same probe: base + adapter in PEFT (the reference), PEFT's own merge rounded to the
output dtype (the rounding floor), and the merged folder as a plain transformers model. SPEC.json holds the folders
`base`, `adapter` and `merged`, `dtype`, and what a server said as `served`; the answer is one JSON document on stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adapters.parity import compare_logits
from adapters.parity_served import PROBES

Logits = list[npt.NDArray[np.float32]]
MAX_PROBE_TOKENS = 48
THREADS = 1  # fixed: float32 sums depend on it, and a second run shall give the same report


def main(spec_path: str) -> None:
    import torch

    torch.set_num_threads(THREADS)
    print(json.dumps(probe(json.loads(Path(spec_path).read_text()))))


def probe(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The comparisons as one JSON-ready dict. `dtype` is the float type the merged weights were rounded to."""
    from peft import PeftModel

    model = load(spec["base"])
    served = spec.get("served") or []
    sequences = probe_sequences(spec["base"], model.config.vocab_size)
    adapted = PeftModel.from_pretrained(model, spec["adapter"])
    reference, served_peft = forward(adapted, sequences), against_served(adapted, served)
    own = _rounded(adapted.merge_and_unload(), spec["dtype"])
    rounded = forward(own, sequences)
    del model, adapted, own
    merged = load(spec["merged"])
    ours, served_ours = forward(merged, sequences), against_served(merged, served)
    return compared(sequences, reference, rounded, ours, served_peft, served_ours)


def compared(
    sequences: list[list[int]],
    peft: Logits,
    rounded: Logits,
    merged: Logits,
    served_against_peft: Any,
    served_against_merged: Any,
) -> dict[str, Any]:
    """The comparisons of one merge, from the logits of `sequences` three ways and what the engine was compared with."""
    return {
        "probe": {"sequences": len(sequences), "tokens": sum(map(len, sequences))},
        "merged_against_peft": compare_logits(peft, merged).as_dict(),
        "rounding_floor": compare_logits(peft, rounded).as_dict(),
        "merged_against_rounded_peft": compare_logits(rounded, merged).as_dict(),
        "served_against_peft": served_against_peft,
        "served_against_merged": served_against_merged,
    }


def probe_sequences(base: str, vocab_size: int) -> list[list[int]]:
    """Token ids of the probe: the base tokenizer's, or seeded random ids where the folder has no tokenizer."""
    from transformers import AutoTokenizer

    if (Path(base) / "tokenizer.json").is_file() or (Path(base) / "vocab.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(base)
        sequences = [tokenizer(text)["input_ids"][:MAX_PROBE_TOKENS] for text in PROBES]
        return [[min(token, vocab_size - 1) for token in sequence] for sequence in sequences]
    random = np.random.default_rng(0)
    return [random.integers(0, vocab_size, 24).tolist() for _ in PROBES]


def load(folder: str) -> Any:
    """The folder's model in float32; ends the process where weights are missing or left over."""
    import torch
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {kind: sorted(map(str, found.get(kind) or ())) for kind in kinds}
    if any(wrong.values()):
        raise SystemExit(f"{folder} does not load cleanly in transformers: {wrong}")
    return model.eval()


def _rounded(model: Any, dtype: str) -> Any:
    """The model with every weight rounded to `dtype` and back."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
    return model


def forward(model: Any, sequences: list[list[int]]) -> Logits:
    """The logits of each sequence, (length, vocabulary), one sequence at a time."""
    import torch

    with torch.no_grad():
        return [model(torch.tensor([sequence])).logits[0].float().numpy() for sequence in sequences]


def against_served(model: Any, served: list[dict[str, Any]]) -> dict[str, Any] | None:
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
