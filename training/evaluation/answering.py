"""Models that can be asked: one in this process, or one behind a server.

Both give greedy answers to prompts, some of them in another batch order, too, so that a figure's noise can be told. A
local one also gives its loss, a served one the times that its users see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from adapters.embedded import EMBEDDED
from adapters.errors import ConfigInvalid, EngineUnavailable
from training.evaluate import Answer, Example, Prompt, generate_http, latency, server_root, with_thinking
from training.quiet import Progress, unwatched

if TYPE_CHECKING:
    from training.reference import Reference

BATCH, OTHER_BATCH = 32, 7
BASE = "base"


@dataclass(frozen=True)
class Answers:
    """Of one model: its answers, those of some rows in another batch order, and what else there is to say of it."""

    texts: list[str]
    again: Mapping[int, str]
    said: Mapping[str, Any]


class Source(Protocol):
    """A model that can be asked. `twice` are the indices of examples that are asked in another order, too."""

    name: str

    def answers(
        self, examples: Sequence[Example], max_tokens: int, twice: Sequence[int] = (), progress: Progress = unwatched
    ) -> Answers: ...

    def base(self) -> Source:
        """Its base, alone; raises ConfigInvalid where it has none."""
        ...


class Local:
    """A folder loaded here, through transformers and PEFT; `is_base` answers without the adapter."""

    def __init__(self, name: str, reference: Reference, is_base: bool = False) -> None:
        self.name = name
        self.reference = reference
        self.is_base = is_base

    def answers(
        self, examples: Sequence[Example], max_tokens: int, twice: Sequence[int] = (), progress: Progress = unwatched
    ) -> Answers:
        from contextlib import nullcontext

        prompts = [example.prompt for example in examples]
        with self.reference.without_adapter() if self.is_base else nullcontext():
            loss = self.reference.loss(self.reference.sequences([example.row for example in examples]))
            texts = self.reference.answers(prompts, max_tokens, BATCH, progress)
            order = list(reversed(twice))
            again = self.reference.answers([prompts[row] for row in order], max_tokens, OTHER_BATCH) if order else []
        return Answers(texts, dict(zip(order, again, strict=True)), {"loss": loss})

    def base(self) -> Source:
        if not self.reference.has_adapter:
            raise ConfigInvalid(f"{self.name} has no adapter, so there is no base to compare it with.", param="model")
        return Local(BASE if self.name != BASE else f"the {BASE} of {BASE}", self.reference, is_base=True)


class Served:
    """A name on a server, asked over HTTP as its users ask it."""

    def __init__(self, name: str, url: str, api_key: str = "", concurrency: int = 8) -> None:
        self.name = name
        self.url = url
        self.api_key = api_key
        self.concurrency = concurrency

    def answers(
        self, examples: Sequence[Example], max_tokens: int, twice: Sequence[int] = (), progress: Progress = unwatched
    ) -> Answers:
        thinking = enable_thinking(self.url, self.api_key, self.name)
        prompts = with_thinking([example.prompt for example in examples], thinking)
        streamed = self._ask(prompts, max_tokens, self.concurrency, progress)
        order = list(reversed(twice))
        again = self._ask([prompts[row] for row in order], max_tokens, max(1, self.concurrency // 2)) if order else []
        said = {"answered_by": sorted({answer.model for answer in streamed}), **latency(streamed).as_dict()}
        return Answers(
            [answer.text for answer in streamed],
            {row: answer.text for row, answer in zip(order, again, strict=True)},
            said,
        )

    def _ask(
        self, prompts: Sequence[Prompt], max_tokens: int, concurrency: int, progress: Progress = unwatched
    ) -> list[Answer]:
        return generate_http(
            self.url,
            self.name,
            prompts,
            api_key=self.api_key,
            max_tokens=max_tokens,
            concurrency=concurrency,
            progress=progress,
        )

    def base(self) -> Source:
        name = served_base(self.url, self.api_key)
        if name == self.name:
            raise ConfigInvalid(
                f"{self.name} is the server's base itself: name an adapter with --model.", param="model"
            )
        return Served(name, self.url, self.api_key, self.concurrency)


@dataclass(frozen=True)
class Place:
    """Where models are looked for: the server, and the base of adapter folders."""

    url: str
    api_key: str = ""
    base: str | None = None
    concurrency: int = 8


def open_source(model: str, place: Place) -> Source:
    """What a model's name means: a folder or `embedded` is loaded here, anything else is asked of the server."""
    if Path(model).is_dir() or model == EMBEDDED:
        from training.quiet import quieten
        from training.reference import open_reference

        quieten()
        return Local(model, open_reference(model, place.base))
    return Served(model, place.url, place.api_key, place.concurrency)


def enable_thinking(url: str, key: str, model: str) -> bool | None:
    """What the card of a served version says of thinking; None where it has none, or says nothing."""
    import httpx

    name, _, wanted = model.partition("@")
    try:
        with _client(url, key) as client:
            adapter = client.get(f"/v1/adapters/{quote(name, safe='')}").json()
            aliases = {row["alias"]: row["version"] for row in adapter.get("aliases", ())}
            number = int(wanted) if wanted.isdigit() else aliases.get(wanted or "stable")
            if number is None:
                return None
            card = client.get(f"/v1/adapters/{quote(name, safe='')}/versions/{number}").json().get("card")
    except (httpx.HTTPError, ValueError, AttributeError, TypeError, KeyError):  # another server than ours, or none
        return None
    template = card.get("template") if isinstance(card, dict) else None
    thinking = template.get("enable_thinking") if isinstance(template, dict) else None
    return thinking if isinstance(thinking, bool) else None


def served_base(url: str, key: str) -> str:
    """The id of a server's base, which its list of models has first; raises EngineUnavailable."""
    import httpx

    try:
        with _client(url, key) as client:
            return str(client.get("/v1/models").raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise EngineUnavailable(f"The server at {url} does not say which base it has: {error!r}") from error


def _client(url: str, key: str) -> Any:
    import httpx

    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=server_root(url), headers=headers, timeout=60)
