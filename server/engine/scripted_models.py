"""What the scripted engine says: a request read and checked, and an answer that is arithmetic of it.

An answer names its model and echoes the last message, so that a test sees which adapter spoke; where a tool is forced
it is a call of that tool. A token is a word. Log-probabilities are arithmetic of the words and of the adapter's
weights: an adapter without effect gives the base's.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import zlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from server.engine.base import wire_name

EMPTY: Mapping[str, Any] = {"array": [], "object": {}, "boolean": True, "null": None}


@dataclass(slots=True)
class Script:
    """How the double behaves; a test may change it between requests."""

    seconds_to_first_token: float = 0.0
    seconds_per_token: float = 0.0
    seconds_to_load: float = 0.0
    error_after_tokens: int | None = None  # a stream reports an engine error after so many tokens
    reports_cached_tokens: bool = False  # as vLLM's --enable-prompt-tokens-details
    engine_version: str = "scripted 1"
    is_inert: bool = False  # adapters load and change nothing, as under an engine that reads their names otherwise


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that a request forces: its name, its parameters' schema, and whether it was forced by its name."""

    name: str
    parameters: Mapping[str, Any]
    is_named: bool = True


@dataclass(frozen=True, slots=True)
class Asked:
    """What one wire form found in a body: the last message, and the tool that must be called."""

    prompt: str
    tool: Tool | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """One inference request, checked."""

    number: int
    model: str
    words: tuple[str, ...]
    is_cut: bool
    prompt_tokens: int
    effect: int
    top_logprobs: int | None
    is_stream: bool
    has_usage_chunk: bool
    tool: Tool | None = None  # the words are its arguments then
    echoed: tuple[str, ...] = ()  # the prompt's words, which a completion with `echo` repeats
    cached_tokens: int | None = None  # of the prompt, as the answer reports them; None: it does not

    @property
    def finish_reason(self) -> str:
        if self.is_cut:
            return "length"
        return "stop" if self.tool is None or self.tool.is_named else "tool_calls"

    @property
    def usage(self) -> dict[str, Any]:
        count = len(self.words)
        counts = {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + count,
            "completion_tokens": count,
        }
        if self.cached_tokens is None:
            return counts
        return {**counts, "prompt_tokens_details": {"cached_tokens": self.cached_tokens}}

    def logprobs_of(self, word: str) -> list[tuple[str, float]]:
        """The word and its alternatives with their log-probabilities, best first."""
        top = max(1, self.top_logprobs or 0)
        shift = 0.0 if self.effect == 0 else (zlib.crc32(f"{self.effect}{word}".encode()) % 900 + 100) / 2000
        return [(word if i == 0 else f"{word}~{i}", -0.1 - i - shift / (i + 1)) for i in range(top)]


class RequestRefused(Exception):
    """A request the engine refuses, with the status and words that vLLM answers."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = "NotFoundError" if status == 404 else "BadRequestError"
        self.message = message
        self.param = param


class EngineError(Exception):
    """The engine itself failed in the middle of an answer."""


class ScriptedModels:
    """The base and its adapters: reads a request, says what the answer is."""

    def __init__(self, base_id: str, context_length_tokens: int, script: Script) -> None:
        self.base_id = base_id
        self.context_length_tokens = context_length_tokens
        self.script = script
        self.effects: dict[str, int] = {base_id: 0}
        self.prompts: dict[tuple[Any, str], set[str]] = {}  # by cache salt and model, as vLLM's prefix cache is kept
        self.running = 0
        self.ids = itertools.count(1)

    def add(self, name: str, effect: int) -> None:
        self.effects[name] = effect

    def remove(self, name: str) -> None:
        del self.effects[name]

    def read(self, body: dict[str, Any], asked: Asked) -> Call:
        """Raises RequestRefused for what vLLM refuses too."""
        model = body.get("model") or self.base_id
        if model not in self.effects:
            raise RequestRefused(404, f"The model `{model}` does not exist.", "model")
        prompt_tokens = len(asked.prompt.split())
        limit = self._limit(body, prompt_tokens)
        said = spoken(wire_name(model), asked).split()
        wanted = limit or min(len(said), self.context_length_tokens - prompt_tokens)
        cached_tokens = self.cached(body.get("cache_salt"), model, asked.prompt)
        words = tuple(itertools.islice(itertools.cycle(said) if body.get("ignore_eos") else said, wanted))
        return Call(
            number=next(self.ids),
            model=wire_name(model),
            words=words,
            is_cut=len(words) < len(said) or bool(body.get("ignore_eos")),
            prompt_tokens=prompt_tokens,
            effect=0 if self.script.is_inert else self.effects[model],
            top_logprobs=_top_logprobs(body),
            is_stream=bool(body.get("stream")),
            has_usage_chunk=bool((body.get("stream_options") or {}).get("include_usage")),
            tool=asked.tool,
            echoed=tuple(asked.prompt.split()) if body.get("echo") is True else (),
            cached_tokens=cached_tokens if self.script.reports_cached_tokens else None,
        )

    def cached(self, salt: Any, model: str, prompt: str) -> int:
        """How many tokens of the prompt the cache holds; all of one that it saw under the same salt and model."""
        seen = self.prompts.setdefault((salt, model), set())
        count = len(prompt.split()) if prompt in seen else 0
        seen.add(prompt)
        return count

    async def speak(self, call: Call) -> AsyncIterator[tuple[int, str]]:
        """The answer's tokens at the script's pace; raises EngineError where the script has the engine fail."""
        self.running += 1
        try:
            await asyncio.sleep(self.script.seconds_to_first_token)
            for i, word in enumerate(call.words):
                if self.script.error_after_tokens is not None and i >= self.script.error_after_tokens:
                    raise EngineError("EngineCore encountered an issue. See stack trace for the root cause.")
                yield i, word if i == 0 else f" {word}"
                await asyncio.sleep(self.script.seconds_per_token)
        finally:
            self.running -= 1

    def _limit(self, body: dict[str, Any], prompt_tokens: int) -> int | None:
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or body.get("max_output_tokens")
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise RequestRefused(400, f"max_tokens must be at least 1, got {limit!r}.", "max_tokens")
        if (limit or 1) > self.context_length_tokens - prompt_tokens:
            raise RequestRefused(
                400,
                f"This model's maximum context length is {self.context_length_tokens} tokens, and the request has "
                f"{prompt_tokens} prompt tokens and asks for {limit or 1} more.",
            )
        return limit


def spoken(model: str, asked: Asked) -> str:
    """The whole answer: what was heard, or the forced tool's arguments as JSON."""
    if asked.tool is None:
        return f"{model} heard: {asked.prompt}"
    return json.dumps(filled(asked.tool.parameters, asked.prompt))


def filled(schema: Any, text: str) -> Any:
    """A value that a plain JSON schema allows, made of the text."""
    schema = schema if isinstance(schema, dict) else {}
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type", "object")
    if kind == "object":
        return {name: filled(inner, text) for name, inner in (schema.get("properties") or {}).items()}
    if kind in ("integer", "number"):
        return len(text.split())
    return EMPTY.get(kind, " ".join(text.split()))


def _top_logprobs(body: dict[str, Any]) -> int | None:
    logprobs = body.get("logprobs")
    if logprobs is True:
        return int(body.get("top_logprobs") or 0)
    return None if logprobs in (None, False) else int(logprobs)
