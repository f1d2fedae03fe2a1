"""Whether the time to the first token tells one tenant what another asked, with and without the tenants' cache salts.

A victim sends a long secret prefix. The attacker then times two guesses, the secret and another prefix that nobody
sent, in random order. Over many secrets the AUC of the time as a classifier says how well it tells the right guess from
the wrong one: 0.5 is a coin, 1.0 is certainty. Two ways: straight to the engine's socket without a salt, as on any
shared engine, and through the server, each tenant with its key. There is no setting that turns the salts off.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx

from bench.client import Target, stream_once
from bench.gateway import WORDS
from bench.report import Report
from bench.served import Served, serve
from training.statistics import auc

PAIRS = 100
PREFIX_WORDS = 80
BLOCK_TOKENS = 32  # the cache is shared in whole blocks; a CPU's own 128 would need prompts that take seconds
RESAMPLES = 1000
OPERATOR_KEY = "the-key-of-the-bench"
SEED = 17


@dataclass(frozen=True)
class Tenant:
    """One tenant's way to an answer: where it goes, and its key there."""

    target: Target
    key: str | None = None

    async def seconds(self, model: str, prefix: str) -> float:
        """Seconds to the first event of a one-token answer to the prefix."""
        body: dict[str, object] = {"model": model, "stream": True, "temperature": 0, "max_tokens": 1}
        body["messages"] = [{"role": "user", "content": prefix}]
        async with self.target.session() as session:
            if self.key is not None:
                session.headers["authorization"] = f"Bearer {self.key}"
            return (await stream_once(session, self.target, body)).first_seconds


@dataclass
class Times:
    """Seconds to the first token of the attacker's guesses."""

    right: list[float] = field(default_factory=list)
    wrong: list[float] = field(default_factory=list)


async def attack(victim: Tenant, attacker: Tenant, model: str, pairs: int, seed: str) -> Times:
    """Time the attacker's two guesses of each of so many secrets; another seed has other secrets."""
    chance, times = random.Random(seed), Times()
    await attacker.seconds(model, prefix(chance))  # the first request of all is not measured
    for _ in range(pairs):
        secret, other = prefix(chance), prefix(chance)
        await victim.seconds(model, secret)
        guesses = [(secret, times.right), (other, times.wrong)]
        chance.shuffle(guesses)
        for guess, found in guesses:
            found.append(await attacker.seconds(model, guess))
    return times


def prefix(chance: random.Random) -> str:
    """A text of PREFIX_WORDS words that has never been sent; it differs from every other in its first words."""
    return " ".join([str(chance.randrange(10**9)), *chance.choices(WORDS, k=PREFIX_WORDS)])


def quicker(right: Sequence[float], wrong: Sequence[float]) -> float:
    """How often a right guess is the quicker one of a right and a wrong guess; ties count half."""
    return auc(wrong, right)


def interval(times: Times) -> tuple[float, float]:
    """A 95% interval of the AUC: its 2.5th and 97.5th percentile over resampled secrets."""
    chance, count = random.Random(SEED), len(times.right)
    found = []
    for _ in range(RESAMPLES):
        drawn = chance.choices(range(count), k=count)
        found.append(quicker([times.right[i] for i in drawn], [times.wrong[i] for i in drawn]))
    cuts = statistics.quantiles(found, n=40)
    return cuts[0], cuts[-1]


def ways(served: Served) -> dict[str, tuple[Tenant, Tenant]]:
    """Victim and attacker of each of the two ways."""
    engine, gateway = served.engine, served.gateway
    keys = [key_of(gateway, tenant) for tenant in ("victim", "attacker")]
    return {
        "salt off: the bare engine": (Tenant(engine), Tenant(engine)),
        "salt on: through the server": (Tenant(gateway, keys[0]), Tenant(gateway, keys[1])),
    }


def model_of(engine: Target) -> str:
    """What the engine calls its base."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(engine.socket)), timeout=30) as client:
        return str(client.get(f"{engine.url}/v1/models").json()["data"][0]["id"])


def key_of(gateway: Target, tenant: str) -> str:
    """A new key of the tenant."""
    headers = {"authorization": f"Bearer {OPERATOR_KEY}"}
    body = {"tenant": tenant, "scopes": ["infer"]}
    answer = httpx.post(f"{gateway.url}/v1/keys", json=body, headers=headers, timeout=30)
    answer.raise_for_status()
    return str(answer.json()["key"])


def run(rounds: int) -> list[Report]:
    """At least PAIRS secrets for each way, more with more rounds than five."""
    pairs = max(PAIRS, PAIRS * rounds // 5)
    report = Report(f"Telling another tenant's prompt by the time to the first token ({pairs} secrets a way)")
    with serve("--api-key", OPERATOR_KEY, "--", "--block-size", str(BLOCK_TOKENS)) as served:
        model = model_of(served.engine)
        for name, (victim, attacker) in ways(served).items():
            times = asyncio.run(attack(victim, attacker, model, pairs, seed=f"{SEED} {name}"))
            low, high = interval(times)
            report.rows.append(
                {
                    "way": name,
                    "AUC": quicker(times.right, times.wrong),
                    "95% interval": f"{low:.3f}..{high:.3f}",
                    "right guess, median ms": statistics.median(times.right) * 1e3,
                    "wrong guess, median ms": statistics.median(times.wrong) * 1e3,
                }
            )
    report.notes.append(
        f"Prefixes of {PREFIX_WORDS} words, cache blocks of {BLOCK_TOKENS} tokens; 0.5 is a coin, 1.0 is certainty."
    )
    return [report]
