"""Requests and tokens a minute, and concurrent requests, of a key and of its tenant; the clock is passed in.

A bucket holds one minute's worth and fills evenly. A request costs one of its requests at the start and its tokens at
the end, when they are known; so the tokens may go below nothing once, and the next request waits until they are above.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from adapters.limits import UseLimits
from server.errors import RateLimited

MINUTE = 60.0
SWEEP_ABOVE = 1000


@dataclass(slots=True)
class Bucket:
    """`size` units that come back evenly within a minute."""

    size: int
    level: float
    at: float

    def fill(self, now: float, size: int) -> None:
        """Bring the level to `now`; a changed size keeps what was spent."""
        self.level += size - self.size
        self.size = size
        self.level = min(float(size), self.level + max(0.0, now - self.at) * size / MINUTE)
        self.at = now

    def seconds_until(self, level: float) -> float:
        """How long until the level is there; a minute for a bucket of nothing."""
        if self.level >= level:
            return 0.0
        return (level - self.level) * MINUTE / self.size if self.size else MINUTE


@dataclass(slots=True)
class Account:
    """What one key or one tenant has used."""

    limits: UseLimits = field(default_factory=UseLimits)
    requests: Bucket | None = None
    tokens: Bucket | None = None
    running: int = 0
    used_at: float = 0.0

    def refresh(self, limits: UseLimits, now: float) -> None:
        self.limits, self.used_at = limits, now
        self.requests = _filled(self.requests, limits.requests_per_minute, now)
        self.tokens = _filled(self.tokens, limits.tokens_per_minute, now)


@dataclass(frozen=True, slots=True)
class Share:
    """One account that a request counts against: whose it is, for the message, and its limits now."""

    id: str
    whose: str
    limits: UseLimits


class Limiter:
    """All accounts of one server. Not thread-safe: one event loop owns it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, Account] = {}

    @contextmanager
    def place(self, shares: tuple[Share, ...]) -> Iterator[None]:
        """Count one request against every share, or against none and raise RateLimited."""
        now = self._clock()
        accounts = [(share, self._account(share, now)) for share in shares]
        for share, account in accounts:
            _check(share, account)
        for _, account in accounts:
            account.running += 1
            if account.requests is not None:
                account.requests.level -= 1
        try:
            yield
        finally:
            for _, account in accounts:
                account.running -= 1

    def spend(self, shares: tuple[Share, ...], tokens: int) -> None:
        """Count the tokens of a request that ended."""
        now = self._clock()
        for share in shares:
            bucket = self._account(share, now).tokens
            if bucket is not None:
                bucket.level -= tokens

    def headers(self, shares: tuple[Share, ...]) -> list[tuple[bytes, bytes]]:
        """OpenAI's `x-ratelimit-*`, of the share that has the least left; none where nothing is limited."""
        now = self._clock()
        accounts = [self._account(share, now) for share in shares]
        rows = []
        for kind in ("requests", "tokens"):
            buckets = [bucket for account in accounts if (bucket := getattr(account, kind)) is not None]
            if buckets:
                bucket = min(buckets, key=lambda one: one.level)
                rows += [
                    (f"x-ratelimit-limit-{kind}", str(bucket.size)),
                    (f"x-ratelimit-remaining-{kind}", str(max(0, math.floor(bucket.level)))),
                    (f"x-ratelimit-reset-{kind}", duration(bucket.seconds_until(bucket.size))),
                ]
        return [(name.encode(), value.encode()) for name, value in rows]

    def _account(self, share: Share, now: float) -> Account:
        if len(self._accounts) > SWEEP_ABOVE:
            self._sweep(now)
        account = self._accounts.setdefault(share.id, Account())
        account.refresh(share.limits, now)
        return account

    def _sweep(self, now: float) -> None:
        """Forget accounts that would be full again: nothing is lost by it."""
        self._accounts = {
            name: account for name, account in self._accounts.items() if account.running or _is_filling(account, now)
        }


def duration(seconds: float) -> str:
    """As OpenAI writes it: `120ms`, `6.5s`, `1m0s`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds * 10) / 10, 60)
    return f"{int(minutes)}m{rest:g}s" if minutes else f"{rest:g}s"


def _filled(bucket: Bucket | None, size: int | None, now: float) -> Bucket | None:
    if size is None:
        return None
    if bucket is None:
        return Bucket(size, float(size), now)
    bucket.fill(now, size)
    return bucket


def _is_filling(account: Account, now: float) -> bool:
    idle_seconds = now - account.used_at
    buckets = (bucket for bucket in (account.requests, account.tokens) if bucket is not None)
    return any(bucket.seconds_until(bucket.size) > idle_seconds for bucket in buckets)


def _check(share: Share, account: Account) -> None:
    limits = account.limits
    if limits.concurrent_requests is not None and account.running >= limits.concurrent_requests:
        raise RateLimited(
            f"{share.whose} has {account.running} requests running, of at most {limits.concurrent_requests} at a time: "
            "wait for one to end.",
            param="concurrent_requests",
            retry_after=1,
        )
    if account.requests is not None and account.requests.level < 1:
        _refuse(share, "requests", account.requests, 1.0)
    if account.tokens is not None and account.tokens.level <= 0:
        _refuse(share, "tokens", account.tokens, 0.0)


def _refuse(share: Share, kind: str, bucket: Bucket, level: float) -> None:
    wait = max(bucket.seconds_until(level), 0.001) if bucket.size else MINUTE
    raise RateLimited(
        f"{share.whose} has used its {bucket.size} {kind} a minute; try again in {duration(wait)}.",
        param=f"{kind}_per_minute",
        retry_after=wait,
    )
