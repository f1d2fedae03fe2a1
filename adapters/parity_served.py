"""What a server says of an adapter, as material for the parity report: log-probabilities of the probe's tokens.

The caller fetches: each of `questions(model)` is the body of one POST /v1/completions, and `read_answer` takes the JSON
that came back (vLLM's `prompt_logprobs` and `return_token_ids`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TOP_TOKENS = 20
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


def questions(model: str) -> list[dict[str, Any]]:
    """One request body per probe: no sampling, one token, the prompt's own log-probabilities."""
    fixed = {"model": model, "max_tokens": 1, "temperature": 0, "prompt_logprobs": TOP_TOKENS, "return_token_ids": True}
    return [{**fixed, "prompt": text} for text in PROBES]


def read_answer(answer: Mapping[str, Any]) -> dict[str, Any] | None:
    """`ids` of the prompt and, per token but the first, `top`: token id -> log-probability. None when it has none."""
    choice = answer["choices"][0]
    ids, rows = choice.get("prompt_token_ids"), choice.get("prompt_logprobs")
    if not ids or not rows or len(rows) != len(ids):
        return None
    top = [{int(token): float(entry["logprob"]) for token, entry in row.items()} for row in rows[1:]]
    return {"ids": [int(token) for token in ids], "top": top}
