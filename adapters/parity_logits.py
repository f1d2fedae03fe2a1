"""The logits part of the parity report, in a process of its own: `python -m adapters.parity_logits SPEC.json`.

Three forwards in float32 over the same probe: base + adapter in PEFT (the reference), PEFT's own merge rounded to the
output dtype (the rounding floor), and the merged folder as a plain transformers model. SPEC.json holds the folders
`base`, `adapter` and `merged`, and `dtype`; the answer is one JSON document on stdout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adapters.parity import compare_logits

Logits = list[npt.NDArray[np.float32]]
MAX_PROBE_TOKENS = 48
PROBES = (
    "Turn on the desk lamp in the kitchen.",
    "Bật đèn phòng khách giúp tôi với.",
    '{"intent": "HassTurnOn", "area": "kitchen", "name": "desk lamp"}',
    "def add(a: int, b: int) -> int:\n    return a + b\n",
    "The capital of France is",
    "我想预订明天去上海的火车票。",
    "Summarise: the parcel left the depot on Monday, was held at customs for two days and arrived on Friday.",
    "1 + 1 = 2, 2 + 2 = 4, 4 + 4 =",
)


def main(spec_path: str) -> None:
    spec = json.loads(Path(spec_path).read_text())
    print(json.dumps(probe(spec["base"], spec["adapter"], spec["merged"], spec["dtype"])))


def probe(base: str, adapter: str, merged: str, dtype: str) -> dict[str, Any]:
    """The three comparisons as one JSON-ready dict. `dtype` is the float type the merged weights were rounded to."""
    import torch
    from peft import PeftModel

    model = _load(base)
    sequences = probe_sequences(base, model.config.vocab_size)
    adapted = PeftModel.from_pretrained(model, adapter)
    reference = _forward(adapted, sequences)
    own = adapted.merge_and_unload()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
    floor_logits = _forward(own, sequences)
    del model, adapted, own
    floor = compare_logits(reference, floor_logits)
    ours = _forward(_load(merged), sequences)
    return {
        "probe": {"sequences": len(sequences), "tokens": sum(map(len, sequences))},
        "merged_against_peft": compare_logits(reference, ours).as_dict(),
        "rounding_floor": floor.as_dict(),
        "merged_against_rounded_peft": compare_logits(floor_logits, ours).as_dict(),
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


def _load(folder: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {
        key: sorted(map(str, found.get(key) or ())) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if any(wrong.values()):
        raise SystemExit(f"{folder} does not load cleanly in transformers: {wrong}")
    return model.eval()


def _forward(model: Any, sequences: list[list[int]]) -> Logits:
    import torch

    with torch.no_grad():
        return [model(torch.tensor([sequence])).logits[0].float().numpy() for sequence in sequences]


if __name__ == "__main__":
    main(sys.argv[1])
