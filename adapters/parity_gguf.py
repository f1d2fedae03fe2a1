"""Does a GGUF file answer in llama.cpp as base + adapter does in PEFT? Answers, log-probabilities and token ids.

`python -m adapters.parity_gguf SPEC.json`, a process of its own, has PEFT's side: the greedy answers of base + adapter
and of PEFT's own merge, in float32, to the probe and to evaluation rows, and how the tokenizer cuts texts that
tokenizers stumble over. llama.cpp then answers the same token ids from the file (adapters/llamacpp.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.child import run_child
from adapters.errors import ParityFailed
from adapters.llamacpp import run
from adapters.parity_answers import MAX_NEW_TOKENS, TOP_TOKENS, Answer, greedy_answers, stop_tokens
from adapters.parity_forms import compare_form
from adapters.parity_nf4 import put_through_nf4
from adapters.parity_prompts import open_tokenizer, prompt_sets

HARD_TEXTS = (
    "12345 + 678.90 = 1,234,567",
    "it's we're I'LL they'Ve don't 'tis",
    "   leading and trailing   ",
    " \n\n \t\n",
    "a\n\n  b\r\n\r\nc\t d",
    "Tiếng Việt: người dùng hỏi “được không?”",
    "你好，世界！日本語テキスト。한국어",
    "👩‍👩‍👧‍👦🏳️‍🌈 🙂🙂",
    "def f(x):\n    return x**2  # ok\n\n\nprint(f'{f(3)!r}')",
    "<think>\n\n</think>\n<tool_call>{}</tool_call>",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "x<|endoftext|>y <|im_end|> z",
    "٣٤٥ १२३ ½ ² ⅷ ñandú ǅ",
    "https://example.com/a?b=c&d=%20#x",
    "A\u200bB\ufeffC\u00a0D",
    "e=mc^2 \\frac{1}{2} '''\"\"\"`~!@#$%^&*()_+-=[]{}|;:,./<>?",
)


@dataclass(frozen=True)
class GgufFiles:
    """What llama.cpp runs: a `model`, perhaps with an adapter on it, and the `type` of what the adapter changed."""

    model: Path
    type: str
    lora: Path | None = None


def ask_llamacpp(
    files: GgufFiles,
    base: Path,
    adapter: Path | None,
    *,
    evaluation: Sequence[Any] = (),
    chat_template: str | None = None,
    tokenizer: Path | None = None,
    rows: int | None = None,
    through_nf4: bool = False,
) -> dict[str, Any]:
    """`forms` as parity_forms.compare_form gives them, `tokenizer`, and the `problems` of both.

    `tokenizer.goes_on_after` are the tokens that end an answer of the base and none in llama.cpp. `rows` is the
    vocabulary's size where training changed it; `through_nf4` answers with what NF4 leaves of the base.
    Raises InvalidRequest where llama.cpp is not installed, and ParityFailed where it does not take the file.
    """
    spec = {
        "base": str(base),
        "adapter": str(adapter) if adapter else None,
        "evaluation": list(evaluation),
        "chat_template": chat_template,
        "tokenizer": str(tokenizer or base),
        "rows": rows,
        "through_nf4": through_nf4,
    }
    peft = run_child("adapters.parity_gguf", spec, lambda said: ParityFailed(f"PEFT could not be asked: {said}"))
    prompts = [answer["ids"] for answers in peft["sets"].values() for answer in answers["peft"]]
    texts = list(HARD_TEXTS) if peft["texts"] else []
    answered = run(
        files.model,
        lora=files.lora,
        prompts=prompts,
        texts=texts,
        new_tokens=MAX_NEW_TOKENS,
        stops=peft["stops"],
        top=TOP_TOKENS,
    )
    left: list[Answer] = [
        {"ids": ids, "greedy": list(one.tokens), "top": [dict(row) for row in one.top]}
        for ids, one in zip(prompts, answered.continuations, strict=True)
    ]
    forms = []
    for name, answers in peft["sets"].items():
        ours, left = left[: len(answers["peft"])], left[len(answers["peft"]) :]
        title = f"llama.cpp, {files.type}, {name}"
        forms.append(compare_form(title, files.type, answers["peft"], answers["merged"], ours))
    different = [
        text for text, one, two in zip(texts, peft["texts"], answered.texts, strict=True) if list(one) != list(two)
    ]
    problems = [problem for form in forms for problem in form["problems"]]
    problems += [f"llama.cpp cuts {text!r} into other tokens than the tokenizer does" for text in different]
    tokenizer_found = {
        "texts": len(texts),
        "different": different,
        "goes_on_after": sorted(set(peft["stops"]) - set(answered.ends)),
    }
    return {"forms": forms, "tokenizer": tokenizer_found, "problems": problems}


def main(spec_path: str) -> None:
    import torch

    from adapters.parity_logits import THREADS

    torch.set_num_threads(THREADS)
    print(json.dumps(_answered(json.loads(Path(spec_path).read_text()))))


def _answered(spec: Mapping[str, Any]) -> dict[str, Any]:
    from peft import PeftModel

    from adapters.parity_logits import load

    model = load(spec["base"])
    if spec["through_nf4"]:
        put_through_nf4(model, spec["base"])
    if spec["rows"]:
        model.resize_token_embeddings(spec["rows"], mean_resizing=False)
    if spec["adapter"]:
        model = PeftModel.from_pretrained(model, spec["adapter"]).eval()
    tokenizer = open_tokenizer(spec["tokenizer"], spec["chat_template"])
    stops = stop_tokens(model)
    sets = [one for one in prompt_sets(tokenizer, spec["evaluation"], model.config.vocab_size) if one.ids]
    peft = {one.name: greedy_answers(model, one.ids, stops) for one in sets}
    merged = model.merge_and_unload() if spec["adapter"] else model
    answers = {one.name: {"peft": peft[one.name], "merged": greedy_answers(merged, one.ids, stops)} for one in sets}
    texts = [tokenizer(text)["input_ids"] for text in HARD_TEXTS] if tokenizer is not None else []
    return {"sets": answers, "stops": list(stops), "texts": texts}


if __name__ == "__main__":
    main(sys.argv[1])
