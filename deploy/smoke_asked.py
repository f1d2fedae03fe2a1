"""Asking a running server as the smoke run does: one answer, a stream's times, a load that goes on."""

from __future__ import annotations

import json
import math
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

PROMPT = "List the planets of the solar system, each with one sentence."
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Answer:
    """Which version answered, its text, and the log-probability of each token."""

    model: str
    text: str
    logprobs: tuple[float, ...]


def apart(one: Answer, other: Answer) -> float:
    """How far two answers are from each other: infinitely by another text, else by a token's log-probability."""
    if one.text != other.text:
        return math.inf
    return max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True))


@dataclass
class Load:
    """What a load that went on saw: (started, model) of each answer, and what failed."""

    answers: list[tuple[float, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Asking:
    """A server that is asked at `url`."""

    url: str

    def body(self, model: str, **more: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": PROMPT}]
        return {"model": model, "messages": messages, "max_tokens": ANSWER_TOKENS, "temperature": 0, **more}

    def ask(self, model: str) -> Answer:
        """One whole answer; raises httpx.HTTPError."""
        got = httpx.post(f"{self.url}/v1/chat/completions", json=self.body(model, logprobs=True), timeout=300)
        got.raise_for_status()
        body = got.json()
        choice = body["choices"][0]
        listed = tuple(float(token["logprob"]) for token in choice["logprobs"]["content"])
        return Answer(body["model"], choice["message"]["content"], listed)

    def together(self, models: list[str]) -> list[Answer]:
        """All at the same time, so that they share batches."""
        with ThreadPoolExecutor(len(models)) as pool:
            return list(pool.map(self.ask, models))

    def stream_times(self, model: str) -> tuple[float, float]:
        """Seconds to the first token, and between tokens, of one stream."""
        started, arrivals = time.perf_counter(), list[float]()
        body = self.body(model, stream=True, ignore_eos=True)
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=300) as got:
            got.raise_for_status()
            for line in got.iter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line.removeprefix("data: "))["choices"]
                    if choices and choices[0]["delta"].get("content"):
                        arrivals.append(time.perf_counter())
        return arrivals[0] - started, (arrivals[-1] - arrivals[0]) / max(1, len(arrivals) - 1)

    def times(self, model: str, rounds: int) -> tuple[float, float]:
        """Medians of `stream_times`, one stream after the other; the first is not counted."""
        measured = [self.stream_times(model) for _ in range(rounds + 1)][1:]
        return statistics.median(t[0] for t in measured), statistics.median(t[1] for t in measured)

    @contextmanager
    def load(self, model: str, threads: int = 4) -> Iterator[Load]:
        """Requests without a pause while the block runs."""
        seen, stop = Load(), threading.Event()

        def go_on() -> None:
            while not stop.is_set():
                started = time.monotonic()
                try:
                    seen.answers.append((started, self.ask(model).model))
                except httpx.HTTPError as error:
                    seen.failures.append(str(error))
                    time.sleep(0.2)

        workers = [threading.Thread(target=go_on) for _ in range(threads)]
        for worker in workers:
            worker.start()
        try:
            yield seen
        finally:
            stop.set()
            for worker in workers:
                worker.join()

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def wait(self, is_ready: bool, timeout_seconds: float) -> float:
        """Seconds until /ready says so; raises TimeoutError."""
        began = time.monotonic()
        while self.is_ready() is not is_ready:
            if time.monotonic() - began > timeout_seconds:
                raise TimeoutError(f"/ready is not {is_ready} after {timeout_seconds:g} s")
            time.sleep(0.05)
        return time.monotonic() - began

    def system(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/v1/system", timeout=30).json()
        return found

    def metric(self, name: str) -> dict[str, float]:
        """The samples of one metric: labels as they are written, value."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        pairs = [line.rpartition(" ") for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
        return {labelled.removeprefix(name): float(value) for labelled, _, value in pairs}
