"""Answers prompts with a merged model in plain transformers, in a process where peft cannot be imported.

`python plain.py MODEL PROMPTS.json OUT.json TOKENS`: prompts are a list of message lists, TOKENS the most per answer.
Each comes with its token ids and, for every token, by how much the best logit led the second. It imports nothing of
ours: it is what a stranger has.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BATCH = 32


def forbid_peft() -> None:
    sys.modules["peft"] = None  # type: ignore[assignment]
    try:
        import peft  # noqa: F401
    except ImportError:
        return
    raise SystemExit("peft could be imported, so this would prove nothing.")


def answer(folder: str, prompts: list[Any], max_new_tokens: int) -> list[dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    answers: list[dict[str, Any]] = [{} for _ in texts]
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        batch = tokenizer([texts[row] for row in rows], return_tensors="pt", padding=True, padding_side="left")
        margins: list[list[float]] = []

        def note_margin(ids: Any, logits: Any, margins: list[list[float]] = margins) -> Any:
            best = logits.topk(2, dim=-1).values
            margins.append((best[:, 0] - best[:, 1]).tolist())
            return logits

        with torch.inference_mode():
            ids = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                logits_processor=LogitsProcessorList([note_margin]),
            )[:, batch["input_ids"].shape[1] :]
        for index, row in enumerate(rows):
            text = tokenizer.decode(ids[index], skip_special_tokens=True)
            answers[row] = {
                "text": text,
                "ids": ids[index].tolist(),
                "margins": [step[index] for step in margins],
            }
        print(f"{min(start + BATCH, len(order))}/{len(order)}", flush=True)
    return answers


if __name__ == "__main__":
    forbid_peft()
    model, prompts, out, most = sys.argv[1:]
    Path(out).write_text(json.dumps(answer(model, json.loads(Path(prompts).read_text("utf-8")), int(most))), "utf-8")
