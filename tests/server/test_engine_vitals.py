"""When an engine is ready and when it is replaced, second by second; and what is read from its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from server.engine.vitals import (
    BUSY_HANG_SECONDS,
    HANG_SECONDS,
    STOPPED_SECONDS,
    UNREADY_SECONDS,
    Processes,
    Vitals,
    Watch,
)
from tests.fixtures.service import eventually
from tests.fixtures.stand_in import CORE, SPIN

LOOK_SECONDS = 0.5


class Story:
    """Looks at an engine twice a second, and when it was first said that it must be replaced."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.watch = Watch(self.now)
        self.cpu_seconds = 0.0
        self.reason: str | None = None

    def goes_on(
        self, seconds: float, health: int | None = 200, *, stopped: str | None = None, cpu_share: float = 0.0
    ) -> float:
        """Seconds until it had to be replaced, or all of them."""
        begun = self.now
        while self.now - begun < seconds and self.reason is None:
            self.now += LOOK_SECONDS
            self.cpu_seconds += LOOK_SECONDS * cpu_share
            vitals = Vitals(stopped=stopped, core_cpu_seconds=self.cpu_seconds)
            self.reason = self.watch.look(self.now, vitals, health)
        return self.now - begun


def test_an_engine_that_answers_is_left_alone_for_ever() -> None:
    story = Story()
    for _ in range(100):
        story.goes_on(60)
        story.watch.core_answered()
    assert story.reason is None and story.watch.is_ready


@pytest.mark.parametrize(
    ("vitals", "health"), [(Vitals(gone="process 7"), None), (Vitals(gone="process 7"), 200), (Vitals(), 503)]
)
def test_a_dead_core_is_replaced_at_the_first_look(vitals: Vitals, health: int | None) -> None:
    watch = Watch(0.0)
    assert "core is dead" in str(watch.look(0.5, vitals, health))
    assert not watch.is_ready


def test_a_stopped_process_is_not_ready_at_once_and_replaced_when_nobody_goes_on_with_it() -> None:
    story = Story()
    story.goes_on(LOOK_SECONDS, stopped="process 7")
    assert not story.watch.is_ready and story.reason is None
    assert story.goes_on(1000, stopped="process 7") == STOPPED_SECONDS
    assert "process 7 was stopped" in str(story.reason)


def test_one_that_goes_on_within_its_time_is_ready_again_and_its_time_begins_anew() -> None:
    story = Story()
    for _ in range(5):
        story.goes_on(STOPPED_SECONDS, stopped="process 7")
        assert not story.watch.is_ready
        story.goes_on(LOOK_SECONDS)
        story.watch.core_answered()
        assert story.watch.is_ready and story.reason is None


def test_a_slow_answer_of_the_health_route_does_not_make_it_unready_and_no_answer_does() -> None:
    story = Story()
    story.goes_on(UNREADY_SECONDS - LOOK_SECONDS, None)
    assert story.watch.is_ready
    story.goes_on(LOOK_SECONDS, None)
    assert not story.watch.is_ready
    story.goes_on(LOOK_SECONDS)
    assert story.watch.is_ready
    story.watch.core_answered()
    assert story.goes_on(1000, None) == HANG_SECONDS + LOOK_SECONDS and "no answer" in str(story.reason)


def test_a_core_that_neither_answers_nor_computes_is_replaced() -> None:
    story = Story()
    assert story.goes_on(10_000, cpu_share=0.001) == HANG_SECONDS + LOOK_SECONDS
    assert "did nothing" in str(story.reason)


@pytest.mark.parametrize("share", [0.02, 0.5, 2.0])
def test_a_core_that_computes_has_half_an_hour_for_one_step_and_stays_ready(share: float) -> None:
    story = Story()
    story.goes_on(BUSY_HANG_SECONDS - 1, cpu_share=share)
    assert story.reason is None and story.watch.is_ready
    story.goes_on(10, cpu_share=share)
    assert "did not answer" in str(story.reason)


def test_each_answer_of_the_core_begins_its_time_anew() -> None:
    story = Story()
    for _ in range(20):
        story.goes_on(HANG_SECONDS - 1)
        story.watch.core_answered()
    assert story.reason is None


def test_a_pause_of_the_whole_machine_counts_as_one_look() -> None:
    watch = Watch(0.0)
    assert watch.look(10_000.0, Vitals(), None) is None and watch.is_ready
    assert watch.look(20_000.0, Vitals(stopped="process 7"), None) is None


def test_processes_tell_a_stopped_one_a_dead_core_and_what_the_core_computes() -> None:
    program = (
        "import subprocess, sys, time\n"
        f"one = subprocess.Popen([{CORE!r}, '-c', {SPIN!r}], executable=sys.executable)\n"
        "two = subprocess.Popen(['sleep', '600'])\n"
        "print(one.pid, two.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    leader = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert leader.stdout is not None
        core, other = (int(number) for number in leader.stdout.readline().split())
        processes = Processes(leader.pid)
        assert processes.look().gone is None and processes.look().stopped is None
        before = processes.look().core_cpu_seconds
        eventually(lambda: processes.look().core_cpu_seconds > before + 0.02)
        os.kill(other, signal.SIGSTOP)
        eventually(lambda: processes.look().stopped == f"process {other}")
        os.kill(other, signal.SIGKILL)
        eventually(lambda: processes.look().stopped is None)
        assert processes.look().gone is None, "not one that it cannot live without"
        os.kill(core, signal.SIGKILL)
        eventually(lambda: processes.look().gone == f"process {core}")
    finally:
        os.killpg(leader.pid, signal.SIGKILL)
        leader.communicate()
    assert Processes(leader.pid).look() == Vitals()
