"""Loads at stated times of the day: before an office opens, say, the versions that it will ask for.

Times are of the server's own clock and zone. An entry that comes due while the engine is not ready is run as soon as it
is, within LATE_SECONDS; after that it waits for its next day.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, time, timedelta
from typing import TYPE_CHECKING, Literal, get_args

import structlog
from pydantic import BaseModel, ConfigDict, Field, field_validator

from adapters.errors import HotshoeError
from adapters.types import DEFAULT_TENANT, AdapterRef, AdapterVersion, check_name
from server.tasks import end_tasks

if TYPE_CHECKING:
    from server.services import Services

log = structlog.get_logger("hotshoe.warm_schedule")
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = get_args(Day)  # as datetime.weekday counts them
LOOK_SECONDS = 5.0
LATE_SECONDS = 900.0


class WarmTime(BaseModel):
    """One entry of HOTSHOE_WARM_SCHEDULE."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: time = Field(description="`07:45`.")
    days: tuple[Day, ...] = Field(DAYS, min_length=1)
    models: tuple[str, ...] = Field(min_length=1, description="NAME, NAME@N or NAME@ALIAS, TENANT/ before another's.")

    @field_validator("models")
    @classmethod
    def _are_models(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for model in value:
            try:
                ref_of(model)
            except HotshoeError as error:
                raise ValueError(error.message) from None
        return value

    def last_due(self, now: datetime) -> datetime:
        """The latest time not after `now` at which it was due."""
        for back in range(8):
            day = now.date() - timedelta(days=back)
            due = datetime.combine(day, self.at)
            if DAYS[day.weekday()] in self.days and due <= now:
                return due
        raise AssertionError  # at least one day of a week is among them


def ref_of(model: str) -> AdapterRef:
    """Raises NameInvalid."""
    owner, slash, rest = model.rpartition("/")
    return AdapterRef.parse(rest, check_name(owner) if slash else DEFAULT_TENANT)


class WarmSchedule:
    """A worker that loads what HOTSHOE_WARM_SCHEDULE names, when it says."""

    def __init__(self, services: Services, look_seconds: float = LOOK_SECONDS) -> None:
        self._services = services
        self._look_seconds = look_seconds
        self._entries = services.settings.warm_schedule
        self._done: dict[WarmTime, datetime] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._done = {entry: entry.last_due(now()) for entry in self._entries}  # what was due before is not made up for
        if self._entries:
            self._task = asyncio.create_task(self._run(), name="warm schedule")

    async def stop(self) -> None:
        await end_tasks(self._task)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._look_seconds)
            try:
                await self.look(now())
            except Exception:  # a worker that ended would be missed weeks later
                log.exception("the schedule was not looked at")

    async def look(self, at: datetime) -> list[str]:
        """Load what has come due since the last look; the models that were loaded, or were there."""
        loaded: list[str] = []
        for entry in self._entries:
            due = entry.last_due(at)
            if due <= self._done.get(entry, datetime.min):
                continue
            if not self._services.lifecycle.is_ready(self._services):
                if (at - due).total_seconds() > LATE_SECONDS:
                    self._done[entry] = due
                    log.warning("not warmed: the engine was not ready", at=str(entry.at), models=entry.models)
                continue
            self._done[entry] = due
            for model in entry.models:
                loaded += [model] if await self._warm(model) else []
        return loaded

    async def _warm(self, model: str) -> bool:
        """The version that the name means now, and an alias's candidate; what is wrong with one is in the log."""
        try:
            split = await self._services.resolver.split(ref_of(model))
            for version in (split.version, split.candidate):
                if version is not None and self._may_answer(version, is_candidate=version is split.candidate):
                    await self._services.residents.warm(version)
        except HotshoeError as error:
            log.warning("not warmed", model=model, code=error.code, reason=error.message)
            return False
        log.info("warmed by the schedule", model=model)
        return True

    def _may_answer(self, version: AdapterVersion, *, is_candidate: bool) -> bool:
        """A candidate that may not is passed over, as requests pass it over; raises NotServable for a version."""
        if is_candidate:
            return self._services.servable.may_answer(version)
        self._services.servable.check(version)
        return True


def now() -> datetime:
    """The server's local time, without its zone: where clocks are set back an entry runs once."""
    return datetime.now().astimezone().replace(tzinfo=None)
