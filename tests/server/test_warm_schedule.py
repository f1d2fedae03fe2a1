"""Loads at stated times: when an entry is due, what it loads, and what stops it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import ConfigInvalid
from server.settings import load_settings
from server.warm_schedule import DAYS, LATE_SECONDS, WarmSchedule, WarmTime
from tests.fixtures.service import Server

FRIDAY = datetime(2026, 11, 27, 7, 45)
WEEKDAYS = ("mon", "tue", "wed", "thu", "fri")
ENTRY = {"at": "07:45", "days": WEEKDAYS, "models": ["early"]}


def entry(**changes: object) -> WarmTime:
    return WarmTime.model_validate({**ENTRY, **changes})


def test_it_is_due_on_its_days_at_its_time() -> None:
    assert entry().last_due(FRIDAY) == FRIDAY
    assert entry().last_due(FRIDAY - timedelta(seconds=1)) == FRIDAY - timedelta(days=1)
    assert entry().last_due(FRIDAY + timedelta(days=3, seconds=-1)) == FRIDAY, "over a weekend"
    assert entry(days=["fri"]).last_due(FRIDAY - timedelta(minutes=1)) == FRIDAY - timedelta(days=7)


@given(
    at=st.datetimes(datetime(2024, 1, 1), datetime(2030, 1, 1)),
    clock=st.times().map(lambda one: one.replace(tzinfo=None)),
    days=st.lists(st.sampled_from(DAYS), min_size=1, unique=True),
)
def test_the_last_time_is_the_latest_of_its_days_within_a_week(at: datetime, clock: object, days: list[str]) -> None:
    due = entry(at=clock, days=days).last_due(at)
    assert due <= at < due + timedelta(days=7)
    assert DAYS[due.weekday()] in days and due.time() == clock
    between = (due + timedelta(days=n) for n in range(1, 8))
    assert not any(one <= at and DAYS[one.weekday()] in days for one in between)


def residency(server: Server, name: str) -> str:
    return str(server.http.get(f"/v1/adapters/{name}/versions/1").json()["residency"])


def cold(server: Server, name: str) -> None:
    server.call(server.services.residents._leave(server.services.registry.get("default", name, 1)))


def scheduled(make_server: Callable[..., Server], **changes: object) -> tuple[Server, WarmSchedule]:
    server = make_server(warm_schedule=[{**ENTRY, **changes}])
    schedule = WarmSchedule(server.services)
    schedule._done = {
        one: one.last_due(FRIDAY - timedelta(minutes=1)) for one in server.services.settings.warm_schedule
    }
    return server, schedule


def test_what_is_due_is_loaded_once_and_what_is_wrong_with_one_does_not_stop_the_next(
    make_server: Callable[..., Server],
) -> None:
    server, schedule = scheduled(make_server, models=["absent", "gone@7", "early"])
    server.pushed("early")
    cold(server, "early")
    assert server.call(schedule.look(FRIDAY - timedelta(seconds=1))) == [] and residency(server, "early") == "absent"
    assert server.call(schedule.look(FRIDAY)) == ["early"] and residency(server, "early") == "resident"
    cold(server, "early")
    assert server.call(schedule.look(FRIDAY + timedelta(hours=9))) == [] and residency(server, "early") == "absent"
    assert server.call(schedule.look(FRIDAY + timedelta(days=3))) == ["early"]


def test_a_schedule_makes_room_as_a_request_does(make_server: Callable[..., Server]) -> None:
    server = make_server(staged_limit=1, slots=1, warm_schedule=[ENTRY])
    server.pushed("early")
    server.pushed("other")
    assert residency(server, "early") == "absent"
    schedule = WarmSchedule(server.services)
    assert server.call(schedule.look(FRIDAY)) == ["early"]
    assert (residency(server, "early"), residency(server, "other")) == ("resident", "absent")


def test_one_that_comes_due_while_the_engine_is_away_runs_late_but_not_hours_late(
    make_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, schedule = scheduled(make_server)
    server.pushed("early")
    cold(server, "early")
    away = [True]
    is_ready = server.services.lifecycle.is_ready
    monkeypatch.setattr(server.services.lifecycle, "is_ready", lambda services: not away[0] and is_ready(services))
    assert server.call(schedule.look(FRIDAY)) == []
    away[0] = False
    assert server.call(schedule.look(FRIDAY + timedelta(seconds=LATE_SECONDS - 60))) == ["early"]
    away[0], monday = True, FRIDAY + timedelta(days=3)
    assert server.call(schedule.look(monday)) == []
    assert server.call(schedule.look(monday + timedelta(seconds=LATE_SECONDS + 1))) == []
    away[0] = False
    assert server.call(schedule.look(monday + timedelta(seconds=LATE_SECONDS + 2))) == [], "it is too late for that one"


def test_nothing_that_was_due_before_the_start_is_made_up_for(make_server: Callable[..., Server]) -> None:
    server = make_server(warm_schedule=[{"at": "00:00", "models": ["early"]}])
    server.pushed("early")
    cold(server, "early")
    schedule = WarmSchedule(server.services)
    server.call(schedule.start())
    server.call(schedule.stop())
    from server.warm_schedule import now

    assert server.call(schedule.look(now())) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"at": "25:00", "models": ["a"]}]', "warm_schedule.0.at"),
        ('[{"at": "07:00", "models": []}]', "warm_schedule.0.models"),
        ('[{"at": "07:00", "models": ["a b"]}]', "warm_schedule.0.models"),
        ('[{"at": "07:00", "days": ["monday"], "models": ["a"]}]', "warm_schedule.0.days"),
        ('[{"at": "07:00", "models": ["a"], "every": 5}]', "warm_schedule.0.every"),
    ],
)
def test_an_entry_that_cannot_be_read_is_refused_with_its_place(
    text: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOTSHOE_WARM_SCHEDULE", text)
    with pytest.raises(ConfigInvalid, match=said):
        load_settings()
