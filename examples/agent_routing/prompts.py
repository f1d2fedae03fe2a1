"""The prompts: one short line for an adapter, and the best found for the base, which has to be told everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SYSTEM = "Answer with one function call as JSON."
Message = dict[str, Any]


def chat_row(sentence: str, answer: str) -> dict[str, Any]:
    """One training row in chat form."""
    return {"messages": [*prompt(sentence), {"role": "assistant", "content": answer}]}


def prompt(sentence: str) -> list[Message]:
    """What an adapter is asked."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": sentence}]


def base_prompt(sentence: str, labels: Sequence[str], examples: Sequence[tuple[str, str]]) -> list[Message]:
    """What the base is asked, which was taught nothing: all intents by name, and examples as earlier turns."""
    system = (
        f'{SYSTEM} It has an "intent", one of {", ".join(labels)}, and the slots that the user names, such as area, '
        "name, floor, state, hours, minutes or seconds. Answer with the JSON object only."
    )
    turns: list[Message] = [{"role": "system", "content": system}]
    for asked, answer in examples:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return [*turns, {"role": "user", "content": sentence}]
