"""The inference routes of the scripted engine, in the wire form that vLLM gives them.

An answer names its model and echoes the last message, so that a test sees which adapter spoke. A token is a word.
Log-probabilities are arithmetic of the words and of the adapter's weights: an adapter without effect gives the base's.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from server.engine import control as control_routes
from server.engine.base import wire_name
from server.engine.control import Control


@dataclass(slots=True)
class Script:
    """How the double behaves; a test may change it between requests."""

    seconds_to_first_token: float = 0.0
    seconds_per_token: float = 0.0
    error_after_tokens: int | None = None  # a stream reports an engine error after so many tokens
    reports_cached_tokens: bool = False  # as vLLM's --enable-prompt-tokens-details


@dataclass(frozen=True, slots=True)
class Call:
    """One inference request, checked."""

    model: str
    words: tuple[str, ...]
    is_cut: bool
    prompt_tokens: int
    effect: int
    top_logprobs: int | None
    is_stream: bool
    has_usage_chunk: bool
    echoed: tuple[str, ...] = ()  # the prompt's words, which a completion with `echo` repeats
    cached_tokens: int | None = None  # of the prompt, as the answer reports them; None: it does not

    @property
    def finish_reason(self) -> str:
        return "length" if self.is_cut else "stop"

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
    """A request the engine refuses, with the status and body that vLLM answers."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        kind = "NotFoundError" if status == 404 else "BadRequestError"
        self.response = JSONResponse(
            {"error": {"message": message, "type": kind, "param": param, "code": status}}, status_code=status
        )


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

    def read(self, body: dict[str, Any], prompt: str) -> Call:
        """Raises RequestRefused for what vLLM refuses too."""
        model = body.get("model") or self.base_id
        if model not in self.effects:
            raise RequestRefused(404, f"The model `{model}` does not exist.", "model")
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or body.get("max_output_tokens")
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise RequestRefused(400, f"max_tokens must be at least 1, got {limit!r}.", "max_tokens")
        prompt_tokens = len(prompt.split())
        room = self.context_length_tokens - prompt_tokens
        if (limit or 1) > room:
            raise RequestRefused(
                400,
                f"This model's maximum context length is {self.context_length_tokens} tokens, and the request has "
                f"{prompt_tokens} prompt tokens and asks for {limit or 1} more.",
            )
        said = f"{wire_name(model)} heard: {prompt}".split()
        wanted = limit or min(len(said), room)
        cached_tokens = self.cached(body.get("cache_salt"), model, prompt)
        words = tuple(itertools.islice(itertools.cycle(said) if body.get("ignore_eos") else said, wanted))
        return Call(
            model=wire_name(model),
            words=words,
            is_cut=len(words) < len(said) or bool(body.get("ignore_eos")),
            prompt_tokens=prompt_tokens,
            effect=self.effects[model],
            top_logprobs=_top_logprobs(body),
            is_stream=bool(body.get("stream")),
            has_usage_chunk=bool((body.get("stream_options") or {}).get("include_usage")),
            echoed=tuple(prompt.split()) if body.get("echo") is True else (),
            cached_tokens=cached_tokens if self.script.reports_cached_tokens else None,
        )

    def cached(self, salt: Any, model: str, prompt: str) -> int:
        """How many tokens of the prompt the cache holds; all of one that it saw under the same salt and model."""
        seen = self.prompts.setdefault((salt, model), set())
        count = len(prompt.split()) if prompt in seen else 0
        seen.add(prompt)
        return count

    async def speak(self, call: Call) -> AsyncIterator[tuple[int, str]]:
        """The answer's tokens at the script's pace; raises RuntimeError where the script has the engine fail."""
        self.running += 1
        try:
            await asyncio.sleep(self.script.seconds_to_first_token)
            for i, word in enumerate(call.words):
                if self.script.error_after_tokens is not None and i >= self.script.error_after_tokens:
                    raise RuntimeError("EngineCore encountered an issue. See stack trace for the root cause.")
                yield i, word if i == 0 else f" {word}"
                await asyncio.sleep(self.script.seconds_per_token)
        finally:
            self.running -= 1


def _top_logprobs(body: dict[str, Any]) -> int | None:
    logprobs = body.get("logprobs")
    if logprobs is True:
        return int(body.get("top_logprobs") or 0)
    return None if logprobs in (None, False) else int(logprobs)


def build_app(models: ScriptedModels, control: Control) -> Starlette:
    app = Starlette(
        routes=[
            Route("/health", _health),
            Route("/metrics", _metrics),
            Route("/v1/models", _models),
            Route("/v1/chat/completions", ChatForm.answer, methods=["POST"]),
            Route("/v1/completions", CompletionForm.answer, methods=["POST"]),
        ]
    )
    app.state.models = models
    control_routes.attach(app, lambda request: control)
    return app


async def _health(request: Request) -> Response:
    return Response()


async def _metrics(request: Request) -> Response:
    models: ScriptedModels = request.app.state.models
    name = "vllm:num_requests_running"
    return PlainTextResponse(f'# TYPE {name} gauge\n{name}{{model_name="{models.base_id}"}} {models.running}\n')


async def _models(request: Request) -> Response:
    models: ScriptedModels = request.app.state.models
    rows = [{"id": name, "object": "model", "created": 0, "owned_by": "vllm"} for name in models.effects]
    return JSONResponse({"object": "list", "data": rows})


class Form:
    """One wire form of an answer: how its prompt is read, and how whole answers and chunks look."""

    object_name: str
    chunk_name: str
    id_prefix: str

    @classmethod
    async def answer(cls, request: Request) -> Response:
        models: ScriptedModels = request.app.state.models
        form = cls()
        try:
            body = await _json_object(request)
            call = models.read(body, form.prompt(body))
        except RequestRefused as refusal:
            return refusal.response
        head = {"id": f"{form.id_prefix}-{next(models.ids):08d}", "created": int(time.time()), "model": call.model}
        if call.is_stream:
            return StreamingResponse(form.stream(models, call, head), media_type="text/event-stream")
        try:
            words = [word async for _, word in models.speak(call)]
        except RuntimeError as error:
            return JSONResponse(_engine_error(error), status_code=500)
        choice = {"index": 0, "finish_reason": call.finish_reason, **form.whole(call, "".join(words))}
        return JSONResponse({**head, "object": form.object_name, "choices": [choice], "usage": call.usage})

    async def stream(self, models: ScriptedModels, call: Call, head: dict[str, Any]) -> AsyncIterator[str]:
        head = {**head, "object": self.chunk_name}
        try:
            for opening in self.opening():
                yield _event({**head, "choices": [{"index": 0, "finish_reason": None, **opening}]})
            async for i, word in models.speak(call):
                reason = call.finish_reason if i == len(call.words) - 1 else None
                yield _event({**head, "choices": [{"index": 0, "finish_reason": reason, **self.delta(call, i, word)}]})
            if call.has_usage_chunk:
                yield _event({**head, "choices": [], "usage": call.usage})
        except RuntimeError as error:
            yield _event(_engine_error(error))
        yield "data: [DONE]\n\n"

    def prompt(self, body: dict[str, Any]) -> str:
        raise NotImplementedError

    def opening(self) -> list[dict[str, Any]]:
        return []

    def whole(self, call: Call, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def delta(self, call: Call, index: int, word: str) -> dict[str, Any]:
        raise NotImplementedError


class ChatForm(Form):
    object_name, chunk_name, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def prompt(self, body: dict[str, Any]) -> str:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
            raise RequestRefused(400, "messages must be a list of messages that is not empty.", "messages")
        content = messages[-1].get("content") or ""
        if isinstance(content, list):
            content = " ".join(str(part.get("text", "")) for part in content)
        return str(content)

    def opening(self) -> list[dict[str, Any]]:
        return [{"delta": {"role": "assistant", "content": ""}, "logprobs": None}]

    def whole(self, call: Call, text: str) -> dict[str, Any]:
        logprobs = None
        if call.top_logprobs is not None:
            logprobs = {"content": [self._token(call, word) for word in call.words]}
        return {"message": {"role": "assistant", "content": text, "tool_calls": []}, "logprobs": logprobs}

    def delta(self, call: Call, index: int, word: str) -> dict[str, Any]:
        logprobs = None if call.top_logprobs is None else {"content": [self._token(call, word.strip())]}
        return {"delta": {"content": word}, "logprobs": logprobs}

    def _token(self, call: Call, word: str) -> dict[str, Any]:
        rows = [
            {"token": token, "logprob": value, "bytes": list(token.encode())} for token, value in call.logprobs_of(word)
        ]
        return {**rows[0], "top_logprobs": rows[: call.top_logprobs]}


class CompletionForm(Form):
    object_name, chunk_name, id_prefix = "text_completion", "text_completion", "cmpl"

    def prompt(self, body: dict[str, Any]) -> str:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and prompt and all(isinstance(item, int) for item in prompt):
            return " ".join(map(str, prompt))
        if not isinstance(prompt, str) or not prompt:
            raise RequestRefused(400, "prompt must be a string that is not empty, or a list of token ids.", "prompt")
        return prompt

    def whole(self, call: Call, text: str) -> dict[str, Any]:
        shown = " ".join((*call.echoed, text))
        return {"text": shown, "logprobs": self._logprobs(call, [*call.echoed, *call.words])}

    def delta(self, call: Call, index: int, word: str) -> dict[str, Any]:
        return {"text": word, "logprobs": self._logprobs(call, [word.strip()])}

    def _logprobs(self, call: Call, words: list[str]) -> dict[str, Any] | None:
        if call.top_logprobs is None:
            return None
        rows = [call.logprobs_of(word) for word in words]
        values: list[float | None] = [row[0][1] for row in rows]
        if call.echoed and len(words) > 1:
            values[0] = None  # nothing comes before the first word
        offsets = itertools.accumulate((len(word) + 1 for word in words[:-1]), initial=0)
        return {
            "tokens": words,
            "token_logprobs": values,
            "top_logprobs": [dict(row) for row in rows],
            "text_offset": list(offsets),
        }


async def _json_object(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except ValueError as error:
        raise RequestRefused(400, f"The body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise RequestRefused(400, "The body must be a JSON object.")
    return body


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _engine_error(error: Exception) -> dict[str, Any]:
    return {"error": {"message": str(error), "type": "InternalServerError", "param": None, "code": 500}}
