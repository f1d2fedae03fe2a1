"""Whether a version ends its turns: short questions, asked through the engine once it has shown an effect.

A version that was trained without its end-of-turn token answers until it is cut off. It is served all the same, since
long answers may be what it was made for; its proof says so, and so does whoever shows the version.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from adapters.errors import NotServable, Problem
from adapters.types import AdapterVersion
from server.serving import served_as

PATH = "/v1/chat/completions"
QUESTIONS = ("Answer in one word: which colour is the sky?", "Turn on the desk lamp in the kitchen.")
THOUGHT, END_OF_THOUGHT = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Ending:
    """Asks a version the questions; `ask` is one whole answer of the engine, `tokens` the longest (0: not asked)."""

    ask: Callable[[str, dict[str, Any]], Awaitable[tuple[int, bytes]]]
    tokens: int
    may_bring_templates: bool
    patience_seconds: float = 30.0  # a large base on a CPU takes minutes, and a version is not kept waiting for this

    async def warnings(self, version: AdapterVersion, engine_name: str) -> list[dict[str, str]]:
        """What its proof keeps: a warning where every answer was cut off, none where the engine is too slow.

        Raises EngineUnavailable where the engine is gone: the version may be what it died of.
        """
        if not self.tokens:
            return []
        try:
            asked = [self._body(version, engine_name, question) for question in QUESTIONS]
        except NotServable:  # its template is not allowed here: it will not answer messages at all
            return []
        try:
            async with asyncio.timeout(self.patience_seconds):
                answers = await asyncio.gather(*(self.ask(PATH, body) for body in asked))
        except TimeoutError:
            return []
        problem = judge(answers, self.tokens)
        return [problem.as_dict()] if problem else []

    def _body(self, version: AdapterVersion, engine_name: str, question: str) -> dict[str, Any]:
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": self.tokens, "temperature": 0}
        return {**served_as(PATH, body, version, is_allowed=self.may_bring_templates), "model": engine_name}


def judge(answers: list[tuple[int, bytes]], tokens: int) -> Problem | None:
    """The warning where no answer ended by itself; none where one cannot be had, or was still a thought."""
    for status, raw in answers:
        if status != 200:
            return None
        choice = json.loads(raw)["choices"][0]
        text = choice["message"].get("content") or ""
        is_thinking = not text or (THOUGHT in text and END_OF_THOUGHT not in text)
        if choice["finish_reason"] != "length" or is_thinking:
            return None
    return Problem(
        "no_end_of_turn",
        "proof",
        f"none of {len(answers)} short questions was answered to an end within {tokens} tokens",
        "Unless its answers are long, train with the end-of-turn token in the labels and the base's chat template.",
    )
