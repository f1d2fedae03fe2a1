"""Clients in a closed loop over several models, and what became of each of their requests: exactly one outcome each."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import aiohttp

from bench.client import JSON, Target

ANSWER_SECONDS = 180.0  # without a byte for so long a request is lost
SIGNATURE_LETTERS = 16  # of an answer: they tell the models apart
REFUSED_PAUSE_SECONDS = 1.0


class Outcome(StrEnum):
    WHOLE = "whole"
    ERROR_EVENT = "error event"  # a stream that said that it ends early
    SILENT = "silent"  # a stream that ended early and did not say so
    REFUSED = "refused"  # 503 with Retry-After
    FAILED = "failed"  # any other answer
    LOST = "lost"  # no answer


@dataclass
class Request:
    """One request and how far its answer has come."""

    model: str
    prompt: str
    is_stream: bool
    events: int = 0
    text: str = ""
    answered_by: str | None = None
    outcome: Outcome | None = None
    detail: str = ""
    ended_at: float = 0.0

    def body(self, max_tokens: int) -> dict[str, object]:
        messages = [{"role": "user", "content": self.prompt}]
        options = {"stream": self.is_stream, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        return {"model": self.model, "messages": messages, **options}

    @property
    def is_running(self) -> bool:
        return self.outcome is None and self.events > 0


@dataclass
class Load:
    """Clients that ask one request after the other until `is_over`; `requests` are all that were begun."""

    target: Target
    models: dict[str, str]  # what is asked for -> what must answer
    prompts: tuple[str, ...]
    max_tokens: int
    requests: list[Request] = field(default_factory=list)
    is_over: bool = False

    async def run(self, streaming: int, whole: int) -> None:
        """So many clients of each kind, until `is_over`."""
        async with self.target.session() as session:
            kinds = [True] * streaming + [False] * whole
            await asyncio.gather(*(self._client(session, place, kind) for place, kind in enumerate(kinds)))

    async def _client(self, session: aiohttp.ClientSession, place: int, is_stream: bool) -> None:
        models = list(self.models)
        turn = place
        while not self.is_over:
            prompt = self.prompts[turn % len(self.prompts)]
            one = await self.ask(session, Request(models[turn % len(models)], prompt, is_stream))
            turn += 1
            if one.outcome is not Outcome.WHOLE:
                await asyncio.sleep(REFUSED_PAUSE_SECONDS)

    async def ask(self, session: aiohttp.ClientSession, request: Request) -> Request:
        self.requests.append(request)
        timeout = aiohttp.ClientTimeout(total=None, sock_read=ANSWER_SECONDS)
        url = f"{self.target.url}/v1/chat/completions"
        try:
            async with session.post(
                url, data=json.dumps(request.body(self.max_tokens)), headers=JSON, timeout=timeout
            ) as answer:
                request.outcome = await read(answer, request)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            request.detail = type(error).__name__
            is_cut = request.events > 0 and not isinstance(error, TimeoutError)
            request.outcome = Outcome.SILENT if is_cut else Outcome.LOST
        request.ended_at = time.monotonic()
        return request


async def read(answer: aiohttp.ClientResponse, request: Request) -> Outcome:
    """Take the answer in as it comes."""
    if answer.status != 200:
        request.detail = f"{answer.status} {(await answer.text())[:200]}"
        is_refusal = answer.status == 503 and "Retry-After" in answer.headers
        return Outcome.REFUSED if is_refusal else Outcome.FAILED
    if not request.is_stream:
        body = await answer.json()
        request.answered_by, request.text = body["model"], body["choices"][0]["message"]["content"]
        return Outcome.WHOLE
    outcome = Outcome.SILENT
    async for line in answer.content:
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            return Outcome.WHOLE if outcome is Outcome.SILENT else outcome
        if data:
            request.events += 1
            outcome = take(json.loads(data), request, outcome)
    return outcome


def take(event: dict[str, Any], request: Request, outcome: Outcome) -> Outcome:
    if "error" in event:
        request.detail = str(event["error"].get("message"))[:200]
        return Outcome.ERROR_EVENT
    request.answered_by = event["model"]
    for choice in event["choices"]:
        request.text += choice["delta"].get("content") or ""
    return outcome


def is_of(request: Request, text: str) -> bool:
    """What came of the answer begins as this text does."""
    letters = min(SIGNATURE_LETTERS, len(request.text), len(text))
    return request.text[:letters] == text[:letters]


def verdict(request: Request, models: dict[str, str], known: dict[tuple[str, str], str]) -> str:
    """`right`, `wrong` (another version's name or words), or `unknown` (words of none of them)."""
    if request.answered_by is None:
        return "right"
    if request.answered_by != models[request.model]:
        return "wrong"
    if is_of(request, known[request.model, request.prompt]):
        return "right"
    others = (known[model, request.prompt] for model in models if model != request.model)
    return "wrong" if any(is_of(request, text) for text in others) else "unknown"
