"""Step 6 of the demo: a second version goes live under a running stream, goes back, goes live again; nothing fails."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

from openai import OpenAI, OpenAIError

from examples.agent_routing.console import StepFailed
from examples.agent_routing.learn import Results, Schedule, train
from examples.agent_routing.prompts import prompt
from examples.agent_routing.serving import push, sdk
from examples.agent_routing.workshop import Workshop

NAME = "router-en"
STREAM_TOKENS = 400  # long enough to outlive a promote
MESSAGES: Any = prompt("turn on the desk lamp in the kitchen")


def train_second(shop: Workshop, results: Results, schedule: Schedule) -> None:
    """Version 2: other rows and one more label, gone on from version 1; pushed, not yet live."""
    folder = train(shop, NAME, "en-more", ("--from", f"{NAME}@1", *schedule.more), out="router-en-2")
    pushed = push(shop, results, folder, NAME)
    if pushed != f"{NAME}@2":
        raise StepFailed(f"The second push gave {pushed}; {NAME}@2 was expected.")
    expect(shop, sdk(shop), f"{NAME}@1", "after the push, before any promote")


def swap(shop: Workshop, results: Results) -> None:
    """Promote under a running stream and background requests, roll back, promote again."""
    client = sdk(shop)
    with Background(sdk(shop)) as background:
        stream = LongStream(client)
        promoted = time.monotonic()
        shop.hotshoe_json("promote", f"{NAME}@2")
        still_running = stream.is_running()
        results.facts["promote_seconds"] = time.monotonic() - promoted
        expect(shop, client, f"{NAME}@2", "after the promote, the stream still running")
        names = stream.finish()
        shop.console.lines(f"the stream of {len(stream.pieces)} pieces ended with {stream.finish_reason!r} on {names}")
        if names != {f"{NAME}@1"}:
            raise StepFailed(f"The stream that began on {NAME}@1 was answered by {sorted(names)}.")
        if not still_running:
            raise StepFailed("The stream had ended before the promote was done, so it shows nothing.")
        shop.hotshoe_json("rollback", NAME)
        expect(shop, client, f"{NAME}@1", "after the roll-back")
        shop.hotshoe_json("promote", f"{NAME}@2")
        expect(shop, client, f"{NAME}@2", "after the second promote")
    shop.console.lines(f"requests in the background: {background.counts}, failed: {len(background.failures)}")
    results.facts["background_requests"] = dict(background.counts)
    if background.failures:
        raise StepFailed(f"{len(background.failures)} requests failed during the swaps: {background.failures[0]}")


def expect(shop: Workshop, client: OpenAI, wanted: str, when: str) -> None:
    """The bare name is answered by this version now."""
    answer = client.chat.completions.create(model=NAME, messages=MESSAGES, temperature=0, max_tokens=64)
    shop.console.lines(f"{when}: {NAME} -> {answer.model}: {(answer.choices[0].message.content or '')!r}")
    if answer.model != wanted:
        raise StepFailed(f"{when.capitalize()} {NAME} was answered by {answer.model}; {wanted} was expected.")


class LongStream:
    """A stream on the bare name that has begun to answer and goes on for STREAM_TOKENS, read in a thread."""

    def __init__(self, client: OpenAI) -> None:
        self.pieces: list[str] = []
        self.names: set[str] = set()
        self.finish_reason: str | None = None
        self._error: OpenAIError | None = None
        self._begun = threading.Event()
        self._client = client
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        if not self._begun.wait(60) or self._error:
            raise StepFailed(f"The stream did not begin: {self._error or 'no token within 60 s'}")

    def is_running(self) -> bool:
        return self._thread.is_alive()

    def finish(self) -> set[str]:
        """Wait for its end; returns the models that its chunks named."""
        self._thread.join(120)
        if self._error or self._thread.is_alive():
            raise StepFailed(f"The stream did not end well: {self._error or 'still running after 120 s'}")
        return self.names

    def _read(self) -> None:
        try:
            stream = self._client.chat.completions.create(
                model=NAME,
                messages=MESSAGES,
                temperature=0,
                max_tokens=STREAM_TOKENS,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            for chunk in stream:
                self.names.add(chunk.model)
                for choice in chunk.choices:
                    self.pieces.append(choice.delta.content or "")
                    self.finish_reason = choice.finish_reason or self.finish_reason
                self._begun.set()
        except OpenAIError as error:
            self._error = error
        finally:
            self._begun.set()


@dataclass
class Background:
    """One request after the other on the bare name while the block runs; counts answers by version, keeps failures."""

    client: OpenAI
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Background:
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join(60)

    def _ask(self) -> None:
        while not self._stop.is_set():
            try:
                answer = self.client.chat.completions.create(
                    model=NAME,
                    messages=MESSAGES,
                    temperature=0,
                    max_tokens=8,
                )
                self.counts[answer.model] = self.counts.get(answer.model, 0) + 1
            except OpenAIError as error:
                self.failures.append(repr(error))
