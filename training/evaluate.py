"""Asks a model every row of a chat file and scores the answers: locally through transformers + peft, or over HTTP.

The local way is the slow second truth that served and merged models are compared with; the HTTP way is what users get,
with the times they see. Scores are for answers that are one JSON object: is it valid, is it equal, is its label right,
and how many of its other fields are.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import ConfigInvalid, EngineUnavailable, InvalidRequest, Problem
from training.data.formats import bad_rows, read_chat

if TYPE_CHECKING:
    from openai import AsyncOpenAI

Messages = list[dict[str, Any]]
Progress = Callable[[int, int], None]  # rows done, rows in all


def quiet(done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Example:
    """One row: what is asked, and the last assistant turn, which is what should come back."""

    messages: Messages
    expected: str


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
class Scores:
    """Shares of 1 over `n` rows. `field_f1` is micro-averaged over (field, value) pairs, the label left out."""

    n: int
    exact_match: float
    json_valid: float
    label_accuracy: float
    field_f1: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Latency:
    """Seconds at two percentiles, for the first token and for each one after it."""

    ttft_p50_seconds: float
    ttft_p95_seconds: float
    tpot_p50_seconds: float
    tpot_p95_seconds: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def load_examples(path: Path) -> list[Example]:
    """The rows of a chat JSONL file; raises DataInvalid with every row that has no text answer to compare."""
    rows = read_chat(path).rows
    problems = [
        Problem("not_scorable", f"{path}:{row.line}", "it has tools or calls them; eval compares text answers")
        for row in rows
        if row.tools or any(message.get("tool_calls") for message in row.messages)
    ]
    if problems:
        raise bad_rows(path, problems, len(rows))
    return [Example([dict(message) for message in row.messages[:-1]], row.messages[-1]["content"]) for row in rows]


def score(expected: Sequence[str], answers: Sequence[str], label: str = "intent") -> Scores:
    """Compare answers with what was expected, row by row; an answer that is no JSON object counts as an empty one."""
    if len(expected) != len(answers) or not expected:
        raise InvalidRequest(f"{len(answers)} answers cannot be scored against {len(expected)} expected ones.")
    exact = valid = labels = shared = wanted = given = 0
    for right, answer in zip(map(parse_object, expected), map(parse_object, answers), strict=True):
        valid += answer is not None
        exact += right is not None and answer == right
        labels += _canonical((answer or {}).get(label)) == _canonical((right or {}).get(label))
        right_fields, answer_fields = _fields(right, label), _fields(answer, label)
        shared += len(right_fields & answer_fields)
        wanted += len(right_fields)
        given += len(answer_fields)
    n = len(expected)
    field_f1 = 2 * shared / (wanted + given) if wanted + given else 1.0
    return Scores(n, exact / n, valid / n, labels / n, field_f1)


def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, or None. Nothing is cut out of surrounding prose."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def latency(answers: Iterable[Answer]) -> Latency:
    """The percentiles of the times that the answers carry."""
    counted = list(answers)
    first = [answer.ttft_seconds for answer in counted]
    later = [answer.tpot_seconds for answer in counted if answer.tpot_seconds is not None]
    return Latency(*_percentiles(first), *_percentiles(later))


def generate_local(
    base: Path,
    adapter: Path | None,
    prompts: Sequence[Messages],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    progress: Progress = quiet,
) -> list[str]:
    """Greedy answers of a base with or without an adapter, through transformers and peft, in the order of the prompts.

    The base keeps the dtype it is stored in.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from training.greedy import greedy_answers

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
    answers = greedy_answers(
        model,
        [tokenizer(text)["input_ids"] for text in texts],
        pad=tokenizer.pad_token_id,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    return [str(tokenizer.decode(new, skip_special_tokens=True)) for new in answers]


def generate_http(
    url: str,
    model: str,
    prompts: Sequence[Messages],
    *,
    api_key: str = "",
    max_tokens: int = 128,
    concurrency: int = 8,
    progress: Progress = quiet,
) -> list[Answer]:
    """Greedy streamed answers of a served model through the OpenAI SDK, in the order of the prompts.

    `url` is the server's root, without `/v1`. Raises EngineUnavailable when nothing answers there, InvalidRequest with
    the server's words when it refuses.
    """
    import openai

    async def ask_all() -> list[Answer]:
        gate, done = asyncio.Semaphore(concurrency), 0

        async def ask(prompt: Messages) -> Answer:
            nonlocal done
            async with gate:
                answer = await _stream(client, model, prompt, max_tokens)
            done += 1
            progress(done, len(prompts))
            return answer

        async with (
            openai.AsyncOpenAI(
                base_url=f"{url.rstrip('/').removesuffix('/v1')}/v1", api_key=api_key or "none"
            ) as client,
            asyncio.TaskGroup() as group,
        ):
            tasks = [group.create_task(ask(prompt)) for prompt in prompts]
        return [task.result() for task in tasks]

    try:
        return asyncio.run(ask_all())
    except* openai.APIConnectionError as errors:
        raise EngineUnavailable(f"No server answers at {url}: start one with `hotshoe serve`.") from errors
    except* openai.APIStatusError as errors:
        first = errors.exceptions[0]
        raise InvalidRequest(f"The server at {url} refused: {first}", param="model") from errors


async def _stream(client: AsyncOpenAI, model: str, prompt: Any, max_tokens: int) -> Answer:
    begun = time.perf_counter()
    first = last = 0.0
    pieces: list[str] = []
    named, finish_reason, tokens = model, None, 0
    stream = await client.chat.completions.create(
        model=model,
        messages=prompt,
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        named = chunk.model
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        for choice in chunk.choices:
            finish_reason = choice.finish_reason or finish_reason
            if choice.delta.content:
                pieces.append(choice.delta.content)
                last = time.perf_counter()
                first = first or last
    if not pieces:
        first = last = time.perf_counter()
    per_token = (last - first) / (tokens - 1) if tokens > 1 else None
    return Answer("".join(pieces), named, finish_reason, tokens, first - begun, per_token)


def local_folders(model: Path, base: Path | None) -> tuple[Path, Path | None]:
    """Which base and which adapter a folder given as `--model` means: an adapter folder, or a whole model's."""
    if (model / "adapter_config.json").is_file():
        if base is None:
            raise ConfigInvalid(f"{model} is an adapter: say its base with --base.", param="base")
        return base, model
    if (model / "config.json").is_file():
        return model, None
    raise ConfigInvalid(f"{model} is neither an adapter folder nor a model folder.", param="model")


def _fields(value: dict[str, Any] | None, label: str) -> set[tuple[str, str]]:
    return {(key, _canonical(field)) for key, field in (value or {}).items() if key != label}


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return (values[0], values[0]) if values else (0.0, 0.0)
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return cuts[9], cuts[18]
