"""The gate of an adapter: rows that a version answers, through the engine, before it may become `stable`.

It is set with rows, a metric and what is wanted of it: at least a minimum, at most a margin below the present `stable`.
A version's score at the same rows is asked for once: it is kept in its proof. Only a promote of `stable` is held to
it: the first version becomes `stable` by itself, a candidate gets its share, and a roll-back is never in the way.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import structlog

from adapters.errors import EngineFailed, HotshoeError, InvalidRequest, ModelNotFound
from adapters.types import STABLE, AdapterRef, AdapterVersion
from server.door import Asked
from server.errors import GateNotPassed
from server.services import Caller, Services
from server.serving import served_as
from training.scores import telling_scores, written

log = structlog.get_logger("hotshoe.gate")
CHAT = "/v1/chat/completions"
MAX_ROWS = 500
MAX_GATE_BYTES = 1 << 20
CONCURRENT = 8
DIGITS = 6


@dataclass(frozen=True, slots=True)
class Gate:
    """`rows` are `messages`, what is asked; `expected`, the answer; and the `tools` that may be called."""

    metric: str
    minimum: float | None
    margin: float | None
    max_tokens: int
    rows: tuple[Mapping[str, Any], ...]

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Gate:
        return cls(**{**row, "rows": tuple(row["rows"])})

    def as_row(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [dict(row) for row in self.rows]}

    @property
    def expected(self) -> list[str]:
        return [str(row["expected"]) for row in self.rows]

    @property
    def digest(self) -> str:
        """Of what decides a score; what is wanted of it may change."""
        decisive = {"metric": self.metric, "max_tokens": self.max_tokens, "rows": [dict(row) for row in self.rows]}
        text = json.dumps(decisive, sort_keys=True, ensure_ascii=False)
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    def about(self) -> dict[str, Any]:
        """Everything but the rows themselves."""
        return {
            "metric": self.metric,
            "minimum": self.minimum,
            "margin": self.margin,
            "max_tokens": self.max_tokens,
            "rows": len(self.rows),
            "digest": self.digest,
        }


def check_gate(gate: Gate) -> Gate:
    """The gate itself when it can decide anything; raises InvalidRequest."""
    if gate.minimum is None and gate.margin is None:
        raise InvalidRequest("A gate wants a minimum, a margin below stable, or both.", param="minimum")
    size = len(json.dumps(gate.as_row(), ensure_ascii=False).encode())
    if size > MAX_GATE_BYTES:
        raise InvalidRequest(
            f"The gate has {size:,} bytes; at most {MAX_GATE_BYTES:,} are kept: take fewer rows.", param="rows"
        )
    if gate.metric not in telling_scores(gate.expected, gate.expected):
        raise InvalidRequest(
            f"{gate.metric} says nothing about these rows: it needs answers that are JSON objects or tool calls. "
            "exact_match compares texts.",
            param="metric",
        )
    return gate


async def pass_gate(services: Services, caller: Caller, name: str, alias: str, number: int) -> dict[str, Any] | None:
    """The figures of a promote that its gate lets through, None where there is none; raises GateNotPassed."""
    if alias.lower() != STABLE:  # an alias has one row, however it is spelt
        return None
    row = await asyncio.to_thread(services.registry.gate, caller.tenant, name)
    if row is None:
        return None
    gate = Gate.from_row(row)
    async with services.lifecycle.one_at_a_time(f"gate {caller.tenant}/{name}"):
        new = await asyncio.to_thread(services.registry.get, caller.tenant, name, number)
        stable = await _stable(services, caller.tenant, name)
        if stable is not None and stable.number == number:
            return None
        figures = {
            **gate.about(),
            "version": new.ref,
            "score": await score_of(services, caller, new, gate),
            "stable": stable.ref if stable else None,
            "stable_score": await score_of(services, caller, stable, gate) if stable else None,
        }
    reasons = list(shortfalls(figures))
    await asyncio.to_thread(
        lambda: services.registry.note_gate(
            caller.tenant, name, number, figures, is_passed=not reasons, actor=caller.actor
        )
    )
    if reasons:
        raise GateNotPassed(f"{said(figures)}: {' and '.join(reasons)}. It is not promoted.", param="version")
    return figures


def shortfalls(figures: Mapping[str, Any]) -> Iterator[str]:
    """What the figures lack."""
    score, best = figures["score"], figures["stable_score"]
    if figures["minimum"] is not None and score < figures["minimum"]:
        yield f"at least {figures['minimum']:g} is wanted"
    if figures["margin"] is not None and best is not None and score < round(best - figures["margin"], DIGITS):
        yield f"at most {figures['margin']:g} below stable is allowed"


def said(figures: Mapping[str, Any]) -> str:
    """The figures in words."""
    stable = f", {figures['stable']} (stable) {figures['stable_score']:.4g}" if figures["stable"] else ""
    return f"{figures['metric']} over {figures['rows']} rows: {figures['version']} {figures['score']:.4g}{stable}"


async def score_of(services: Services, caller: Caller, version: AdapterVersion, gate: Gate) -> float:
    """What the version scores at the gate's rows; asked for once and kept in its proof."""
    known = (version.proof or {}).get("gate")
    if known is not None and known["digest"] == gate.digest:
        return float(known["score"])
    begun = time.monotonic()
    answers = await _answers(services, version, gate)
    texts = [answer or "" for answer in answers]
    score = round(float(telling_scores(gate.expected, texts)[gate.metric]), DIGITS)
    found = {"digest": gate.digest, "metric": gate.metric, "score": score, "rows": len(gate.rows)}
    found |= {"unanswered": answers.count(None), "at": time.time(), "seconds": round(time.monotonic() - begun, 3)}
    await asyncio.to_thread(
        lambda: services.registry.note_score(version.tenant, version.name, version.number, found, actor=caller.actor)
    )
    log.info("gate scored", model=version.ref, metric=gate.metric, score=score, seconds=found["seconds"])
    return score


async def _stable(services: Services, tenant: str, name: str) -> AdapterVersion | None:
    """What is `stable` now, where it can answer."""
    try:
        found = await asyncio.to_thread(services.registry.resolve, AdapterRef(name, alias=STABLE, tenant=tenant))
    except ModelNotFound:
        return None
    return found if services.servable.may_answer(found) else None


async def _answers(services: Services, version: AdapterVersion, gate: Gate) -> Sequence[str | None]:
    """One text for each row; None where the engine refuses the row, which counts as a wrong answer."""
    answers: list[str | None] = [None] * len(gate.rows)
    waiting = iter(range(len(gate.rows)))
    async with services.residents.holding(version) as resident:

        async def work() -> None:
            for i in waiting:
                async with services.door.place(resident.engine_name, Asked(version.tenant)):
                    answers[i] = await _ask(services, version, resident.engine_name, gate, gate.rows[i])

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(CONCURRENT, len(gate.rows))):
                    group.create_task(work())
        except* HotshoeError as errors:
            raise errors.exceptions[0] from None
    return answers


async def _ask(
    services: Services, version: AdapterVersion, engine_name: str, gate: Gate, row: Mapping[str, Any]
) -> str | None:
    """As a client's request with temperature 0 is answered, the version's own defaults included."""
    body = {"messages": row["messages"], "temperature": 0, "max_tokens": gate.max_tokens}
    body |= {"tools": row["tools"]} if row.get("tools") else {}
    allowed = services.settings.allow_chat_templates
    body = served_as(CHAT, body, version, is_allowed=allowed) | {"model": engine_name}
    body["cache_salt"] = services.keyring.cache_salt(version.tenant)
    status, raw = await services.proxy.ask(CHAT, body)
    if status >= 500:
        raise EngineFailed(f"The engine answered {status} to a row of the gate of {version.name}.")
    if status != 200:
        return None
    message = json.loads(raw)["choices"][0]["message"]
    return written(message.get("content") or "", message.get("tool_calls"))
