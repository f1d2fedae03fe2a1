"""Asks a model every row of a data file: locally through transformers + peft, or over HTTP.

The local way is the slow second truth that served and merged models are compared with; the HTTP way is what users get,
with the times they see. Of a conversation of several turns the last answer is asked for, with all before it given.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from adapters.errors import EngineUnavailable, InvalidRequest
from training.data.columns import Columns
from training.data.formats import read_data
from training.data.rows import Row, is_thought
from training.quiet import Progress, unwatched
from training.scores import written

if TYPE_CHECKING:
    from openai import AsyncOpenAI

Messages = list[dict[str, Any]]
One = TypeVar("One")
Reply = TypeVar("Reply")


@dataclass(frozen=True)
class Prompt:
    """What is asked: a conversation without its last answer, and the tools that it may call."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    thinking: bool | None = None  # used where no card says it


@dataclass(frozen=True)
class Example:
    """One row: what is asked, and its last learned turn, which is what should come back, as the model writes it."""

    prompt: Prompt
    expected: str
    row: Row

    @property
    def messages(self) -> Messages:
        return [dict(message) for message in self.prompt.messages]


@dataclass(frozen=True)
class Answer:
    """What one request brought, and when. `tpot_seconds` is None for an answer of fewer than two tokens."""

    text: str
    model: str
    finish_reason: str | None
    completion_tokens: int
    ttft_seconds: float
    tpot_seconds: float | None


@dataclass(frozen=True)
class Latency:
    """Seconds at two percentiles, for the first token and for each one after it."""

    ttft_p50_seconds: float
    ttft_p95_seconds: float
    tpot_p50_seconds: float
    tpot_p95_seconds: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def load_examples(path: Path, columns: Columns | None = None) -> list[Example]:
    """The rows of a data file as questions with their answers; raises DataInvalid with every bad row."""
    return [example_of(row) for row in read_data(path, columns).rows]


def example_of(row: Row) -> Example:
    """A row as a question with its answer."""
    turn = row.learned_turns()[-1]
    answer = row.messages[turn]
    prompt = Prompt(row.messages[:turn], row.tools, is_thought(answer))
    return Example(prompt, written(answer["content"], answer.get("tool_calls")), row)


def latency(answers: Iterable[Answer]) -> Latency:
    """The percentiles of the times that the answers carry."""
    counted = list(answers)
    first = [answer.ttft_seconds for answer in counted]
    later = [answer.tpot_seconds for answer in counted if answer.tpot_seconds is not None]
    return Latency(*_percentiles(first), *_percentiles(later))


def generate_local(
    base: Path,
    adapter: Path | None,
    prompts: Sequence[Messages | Prompt],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    progress: Progress = unwatched,
) -> list[str]:
    """Greedy answers of a base with or without an adapter on the reference path, in the order of the prompts."""
    from adapters.bases import load_base
    from training.reference import Reference

    return Reference(load_base(base), adapter).answers(_asked(prompts), max_new_tokens, batch_size, progress)


def generate_http(
    url: str,
    model: str,
    prompts: Sequence[Messages | Prompt],
    *,
    api_key: str = "",
    max_tokens: int = 128,
    concurrency: int = 8,
    progress: Progress = unwatched,
) -> list[Answer]:
    """Greedy streamed answers of a served model through the OpenAI SDK, in the order of the prompts.

    Where a prompt says whether to think, the request does. Raises
    EngineUnavailable when nothing answers there, InvalidRequest with the server's words when it refuses.
    """
    import openai

    async def ask_all() -> list[Answer]:
        async with openai.AsyncOpenAI(base_url=f"{server_root(url)}/v1", api_key=api_key or "none") as client:

            async def ask(prompt: Prompt) -> Answer:
                return await _stream(client, model, prompt, max_tokens)

            return await ask_each(_asked(prompts), ask, concurrency, progress)

    try:
        return asyncio.run(ask_all())
    except* openai.APIConnectionError as errors:
        raise EngineUnavailable(f"No server answers at {url}: start one with `hotshoe serve`.") from errors
    except* openai.APIStatusError as errors:
        first = errors.exceptions[0]
        raise InvalidRequest(f"The server at {url} refused: {first}", param="model") from errors


def server_root(url: str) -> str:
    """A server's address, whether or not it was given with the `/v1` that clients of OpenAI's API are told."""
    return url.rstrip("/").removesuffix("/v1")


async def ask_each(
    asked: Sequence[One], ask: Callable[[One], Awaitable[Reply]], concurrency: int, progress: Progress
) -> list[Reply]:
    """The replies in the order of what is asked, so many requests at a time."""
    gate, done = asyncio.Semaphore(concurrency), 0

    async def ask_one(one: One) -> Reply:
        nonlocal done
        async with gate:
            reply = await ask(one)
        done += 1
        progress(done, len(asked))
        return reply

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask_one(one)) for one in asked]
    return [task.result() for task in tasks]


def with_thinking(prompts: Sequence[Prompt], thinking: bool | None) -> list[Prompt]:
    """The prompts with thinking as a model's card has it; as they are where it says nothing."""
    return [prompt if thinking is None else replace(prompt, thinking=thinking) for prompt in prompts]


def _asked(prompts: Sequence[Messages | Prompt]) -> list[Prompt]:
    return [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]


async def _stream(client: AsyncOpenAI, model: str, prompt: Prompt, max_tokens: int) -> Answer:
    begun = time.perf_counter()
    first = last = 0.0
    pieces: list[str] = []
    calls: dict[int, dict[str, str]] = {}
    named, finish_reason, tokens = model, None, 0
    stream = await client.chat.completions.create(
        model=model,
        messages=[sent(message) for message in prompt.messages],
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
        **_options(prompt),
    )
    async for chunk in stream:
        named = chunk.model
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        for choice in chunk.choices:
            finish_reason = choice.finish_reason or finish_reason
            _add_calls(calls, choice.delta.tool_calls)
            pieces.append(choice.delta.content or "")
            if choice.delta.content or choice.delta.tool_calls:
                last = time.perf_counter()
                first = first or last
    if not first:
        first = last = time.perf_counter()
    per_token = (last - first) / (tokens - 1) if tokens > 1 else None
    text = written("".join(pieces), [{"function": calls[index]} for index in sorted(calls)])
    return Answer(text, named, finish_reason, tokens, first - begun, per_token)


def sent(message: Mapping[str, Any]) -> Any:
    """A message in OpenAI's form, in which the arguments of a call are JSON text."""
    if not message.get("tool_calls"):
        return dict(message)
    calls = [
        {
            "id": call.get("id") or f"call_{index}",
            "type": "function",
            "function": {**call["function"], "arguments": json.dumps(call["function"].get("arguments") or {})},
        }
        for index, call in enumerate(message["tool_calls"])
    ]
    return {**message, "tool_calls": calls}


def _options(prompt: Prompt) -> dict[str, Any]:
    options: dict[str, Any] = {"tools": [dict(tool) for tool in prompt.tools]} if prompt.tools else {}
    if prompt.thinking is not None:
        options["extra_body"] = {"chat_template_kwargs": {"enable_thinking": prompt.thinking}}
    return options


def _add_calls(calls: dict[int, dict[str, str]], deltas: Iterable[Any] | None) -> None:
    """Take in what one event says of the answer's tool calls: their names once, their arguments in pieces."""
    for delta in deltas or ():
        call = calls.setdefault(delta.index, {"name": "", "arguments": ""})
        call["name"] += (delta.function and delta.function.name) or ""
        call["arguments"] += (delta.function and delta.function.arguments) or ""


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return (values[0], values[0]) if values else (0.0, 0.0)
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return cuts[9], cuts[18]
