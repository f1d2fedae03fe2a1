"""Does llama.cpp answer with a GGUF file as transformers does with base + adapter? In a process of its own.

llama.cpp continues each probe greedily from the file, and PEFT in float32 reads the same tokens. Compared are the
log-probabilities of the likeliest tokens at every position, and the token ids of texts that tokenizers stumble over.

`python -m adapters.parity_llamacpp SPEC.json` with the paths `base`, `adapter` (null for the base alone), `model` and
`lora`; the answer is one JSON document on stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapters.child import run_child
from adapters.errors import ParityFailed
from adapters.llamacpp import Continuation, missing, run
from adapters.parity_logits import THREADS, forward, load, probe_sequences
from adapters.parity_served import PROBES

NEW_TOKENS, TOP_TOKENS = 8, 20
HARD_TEXTS = (
    *("12345 + 678.90 = 1,234,567", "it's we're I'LL they'Ve don't 'tis", "   leading and trailing   ", " \n\n \t\n"),
    *(
        "a\n\n  b\r\n\r\nc\t d",
        "Tiếng Việt: người dùng hỏi “được không?”",
        "你好，世界！日本語テキスト。한국어",
        "👩‍👩‍👧‍👦🏳️‍🌈 🙂🙂",
    ),
    *("def f(x):\n    return x**2  # ok\n\n\nprint(f'{f(3)!r}')", "<think>\n\n</think>\n<tool_call>{}</tool_call>"),
    *(
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "x<|endoftext|>y <|im_end|> z",
        "٣٤٥ १२३ ½ ² ⅷ ñandú ǅ",
    ),
    *(
        "https://example.com/a?b=c&d=%20#x",
        "A\u200bB\ufeffC\u00a0D",
        "e=mc^2 \\frac{1}{2} '''\"\"\"`~!@#$%^&*()_+-=[]{}|;:,./<>?",
    ),
)


def ask_llamacpp(base: Path, adapter: Path | None, model: Path, *, lora: Path | None = None) -> dict[str, Any]:
    """The comparison, or `{"skipped": why}` where llama.cpp is not installed.

    `tokenizer.different` are texts that llama.cpp cuts in other tokens: in a right file there are none. Raises
    ParityFailed where llama.cpp does not take the file.
    """
    if reason := missing():
        return {"skipped": reason}
    spec = {
        "base": str(base),
        "adapter": str(adapter) if adapter else None,
        "model": str(model),
        "lora": str(lora) if lora else None,
    }
    return run_child(
        "adapters.parity_llamacpp", spec, lambda said: ParityFailed(f"llama.cpp was asked in vain: {said}")
    )


def main(spec_path: str) -> None:
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(THREADS)
    spec = json.loads(Path(spec_path).read_text())
    reference = load(spec["base"])
    prompts = probe_sequences(spec["base"], reference.config.vocab_size)
    texts = [*PROBES, *HARD_TEXTS]
    answer = run(
        Path(spec["model"]),
        lora=Path(spec["lora"]) if spec["lora"] else None,
        prompts=prompts,
        texts=texts,
        new_tokens=NEW_TOKENS,
        top=TOP_TOKENS,
    )
    tokenizer = AutoTokenizer.from_pretrained(spec["base"])
    pairs = zip(texts, answer.texts, strict=True)
    different = [text for text, ids in pairs if tokenizer(text)["input_ids"] != list(ids)]
    if spec["adapter"]:
        from peft import PeftModel

        reference = PeftModel.from_pretrained(reference, spec["adapter"])
    found = compared(reference, prompts, answer.continuations)
    print(json.dumps({**found, "tokenizer": {"texts": len(texts), "different": different}}))


def compared(reference: Any, prompts: Sequence[list[int]], continuations: Sequence[Continuation]) -> Mapping[str, Any]:
    """How far the log-probabilities that llama.cpp named are from ours, and where the top token is the same."""
    differences: list[float] = []
    agreements: list[list[bool]] = []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        logits = forward(reference, [[*prompt, *continuation.tokens]])[0].astype(np.float64)
        rows = logits[len(prompt) - 1 : -1]
        shifted = rows - rows.max(axis=1, keepdims=True)
        ours = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        for row, top in zip(ours, continuation.top, strict=True):
            differences += [abs(float(row[token]) - value) for token, value in top.items()]
        agreements.append((rows.argmax(axis=1) == np.array(continuation.tokens)).tolist())
    flat = [same for one in agreements for same in one]
    return {
        "prompts": len(prompts),
        "positions": len(flat),
        "log_probabilities": len(differences),
        "max_abs": float(f"{max(differences):.3g}"),
        "mean_abs": float(f"{sum(differences) / len(differences):.3g}"),
        "top1_agreement": float(f"{sum(flat) / len(flat):.6g}"),
        "same_continuations": sum(map(all, agreements)),
    }


if __name__ == "__main__":
    main(sys.argv[1])
