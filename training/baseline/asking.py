"""Who answers: a base or an adapter on the reference path, or a model of a server over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from training.evaluate import Answer, Prompt, generate_http, latency, with_thinking
from training.quiet import Progress, unwatched

if TYPE_CHECKING:
    from training.reference import Reference

BATCH = 32


@dataclass(frozen=True)
class Replies:
    """The answers in the order of the prompts; of a server also who gave them, and the times."""

    texts: list[str]
    answered_by: tuple[str, ...] = ()
    ttft_p50_seconds: float | None = None


class Asker(Protocol):
    """One model, however it is reached."""

    @property
    def form(self) -> str:
        """In which form the base is, in words."""

    def answers(self, prompts: Sequence[Prompt], max_tokens: int, progress: Progress = unwatched) -> Replies:
        """Greedy answers."""


@dataclass(frozen=True)
class Local:
    """A base, an adapter on its base or a whole model, on the reference path."""

    reference: Reference
    form: str

    def answers(self, prompts: Sequence[Prompt], max_tokens: int, progress: Progress = unwatched) -> Replies:
        return Replies(self.reference.answers(prompts, max_tokens, BATCH, progress))


@dataclass(frozen=True)
class Served:
    """A model of a server; `thinking` is what its card says of it, which goes before the row's own."""

    url: str
    model: str
    api_key: str = ""
    thinking: bool | None = None

    @property
    def form(self) -> str:
        return f"served over HTTP as {self.model}"

    def ask(
        self, prompts: Sequence[Prompt], max_tokens: int, concurrency: int = 8, progress: Progress = unwatched
    ) -> list[Answer]:
        """Greedy answers with their times, so many requests at a time."""
        return generate_http(
            self.url,
            self.model,
            with_thinking(prompts, self.thinking),
            api_key=self.api_key,
            max_tokens=max_tokens,
            concurrency=concurrency,
            progress=progress,
        )

    def answers(self, prompts: Sequence[Prompt], max_tokens: int, progress: Progress = unwatched) -> Replies:
        found = self.ask(prompts, max_tokens, progress=progress)
        who = tuple(sorted({answer.model for answer in found}))
        return Replies([answer.text for answer in found], who, latency(found).ttft_p50_seconds)
