"""The door's policy by a clock of the test's: each rule of server/admission.py in one small case."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapters.types import Priority
from server.admission import Admission, Admitted, Limits, Quantum, Queued, Refusal, Rejected, Ticket

QUANTUM = Quantum(loads=10.0, floor_seconds=0.5, ceiling_seconds=5.0)  # of a load of 0.1 s: one second


def door(
    slots: int = 2, running: int = 100, queued: int = 100, patience: float = 1.0, adapter_queued: int | None = None
) -> Admission:
    return Admission(Limits(slots, running, queued, patience, adapter_queued, QUANTUM))


def admitted(admission: Admission, adapter: str | None, now: float = 0.0, tenant: str = "") -> Ticket:
    answer = admission.ask(adapter, now, tenant)
    assert isinstance(answer, Admitted), answer
    return answer.ticket


def queued(admission: Admission, adapter: str | None, now: float = 0.0, tenant: str = "") -> Ticket:
    answer = admission.ask(adapter, now, tenant)
    assert isinstance(answer, Queued), answer
    return answer.ticket


def refused(admission: Admission, adapter: str | None, now: float = 0.0, timeout: float | None = None) -> Rejected:
    answer = admission.ask(adapter, now, timeout_seconds=timeout)
    assert isinstance(answer, Rejected), answer
    return answer


def test_as_many_distinct_adapters_run_as_there_are_slots_and_the_base_needs_none() -> None:
    admission = door(slots=2)
    first = admitted(admission, "a")
    admitted(admission, "b")
    second = admitted(admission, "a")
    admitted(admission, None)
    waiting = queued(admission, "c")
    admission.release(first, 1.0, 0.0)
    assert admission.admit_waiting(0.0) == []  # a still runs once
    admission.release(second, 1.0, 0.0)
    assert admission.admit_waiting(0.0) == [waiting]


def test_requests_for_a_running_adapter_pass_a_cold_one_until_its_quantum_and_the_others_patience_are_over() -> None:
    admission = door(slots=1, patience=1.0)
    hot = admitted(admission, "hot", now=0.0)
    cold = queued(admission, "cold", now=0.4)
    also = admitted(admission, "hot", now=1.3)  # the quantum is over, nobody has waited for a second
    younger = queued(admission, "hot", now=1.5)
    admitted(admission, None, now=1.5)
    admission.release(hot, 1.0, 2.0)
    assert admission.admit_waiting(2.0) == []
    admission.release(also, 1.0, 2.1)
    assert admission.admit_waiting(2.1) == [cold]
    admission.release(cold, 1.0, 2.2)
    assert admission.admit_waiting(2.2) == [younger]


def test_an_adapter_keeps_its_slot_for_a_quantum_whoever_waits() -> None:
    admission = door(slots=1, patience=0.01)
    admitted(admission, "hot", now=0.0)
    queued(admission, "cold", now=0.0)
    admitted(admission, "hot", now=0.99)
    queued(admission, "hot", now=1.01)


def test_a_dear_load_gives_a_longer_quantum_up_to_the_ceiling() -> None:
    admission = door(slots=1, patience=0.01)
    admitted(admission, "hot", now=0.0)
    admission.loaded("hot", 0.4, now=0.4)
    queued(admission, "cold", now=0.4)
    admitted(admission, "hot", now=4.3)
    queued(admission, "hot", now=4.5)
    other = door(slots=1, patience=0.01)
    admitted(other, "hot", now=0.0)
    other.loaded("hot", 9.0, now=1.0)
    queued(other, "cold", now=1.0)
    admitted(other, "hot", now=4.9)
    queued(other, "hot", now=5.1)


def test_only_as_many_slots_are_closed_as_adapters_have_waited_too_long() -> None:
    admission = door(slots=3, patience=0.1)
    for name in "abc":
        admitted(admission, name, now=0.0)
    queued(admission, "cold", now=2.0)
    assert [isinstance(admission.ask(name, 3.0), Admitted) for name in "abc"] == [False, True, True]


def test_of_the_slots_that_may_close_the_one_with_fewest_running_does() -> None:
    admission = door(slots=2, patience=0.1)
    admitted(admission, "busy", now=0.0)
    admitted(admission, "busy", now=0.0)
    admitted(admission, "calm", now=0.1)
    queued(admission, "cold", now=2.0)
    queued(admission, "calm", now=3.0)
    admitted(admission, "busy", now=3.0)


def test_a_slot_that_is_slow_to_empty_holds_nobody_up_who_could_have_another() -> None:
    admission = door(slots=2, patience=1.0)
    admitted(admission, "slow", now=0.0)
    other = admitted(admission, "other", now=0.1)
    cold = queued(admission, "cold", now=2.0)
    held = queued(admission, "slow", now=3.5)  # its slot is closed, and what runs there goes on
    last = admitted(admission, "other", now=4.4)
    queued(admission, "other", now=4.6)  # one patience later its slot is closed too
    admission.release(other, 4.6, 4.7)
    admission.release(last, 0.4, 4.8)
    assert admission.admit_waiting(4.8) == [cold, held], "once nobody is overdue, the slow one goes on"


def test_what_waits_for_an_adapter_that_lost_its_slot_has_patience_anew() -> None:
    admission = door(slots=2, patience=1.0)
    first = admitted(admission, "a", now=0.0)
    admitted(admission, "b", now=0.0)
    cold = queued(admission, "cold", now=1.5)
    queued(admission, "a", now=3.0)  # its slot has closed
    admission.release(first, 3.5, 3.5)
    assert admission.admit_waiting(3.5) == [cold]
    admitted(admission, "b", now=4.4)
    admitted(admission, "b", now=4.6)
    queued(admission, "cold", now=4.6)  # now one has closed for a, that with fewer running


def test_a_turn_of_a_tenant_that_had_less_goes_before_requests_that_need_none() -> None:
    admission = door(running=1)
    running = admitted(admission, None, tenant="flood")
    queued(admission, None, tenant="flood")
    cold = queued(admission, "cold", now=1.0, tenant="calm")
    admission.release(running, 2.0, 2.0)
    assert admission.admit_waiting(2.0) == [cold]


def test_a_slot_that_is_closed_for_somebody_who_left_goes_on() -> None:
    admission = door(slots=1, patience=0.1)
    admitted(admission, "hot", now=0.0)
    cold = queued(admission, "cold", now=2.0)
    hot = queued(admission, "hot", now=3.0)
    admission.leave(cold, 3.1)
    assert admission.admit_waiting(3.1) == [hot]


def test_a_slot_without_work_goes_to_the_next_at_once_and_the_longest_idle_first() -> None:
    admission = door(slots=2)
    first, second = admitted(admission, "a"), admitted(admission, "b")
    admission.release(second, 0.1, 0.1)
    admission.release(first, 0.2, 0.2)
    admitted(admission, "c", now=0.3)
    assert set(admission.slots.owners) == {"a", "c"}
    assert admission.slots.switches == 3


def test_turns_go_round_the_tenants_whoever_waits_with_how_many_adapters() -> None:
    admission = door(slots=1)
    running = admitted(admission, "x", tenant="flood")
    for name in "abcd":
        queued(admission, name, now=0.1, tenant="flood")
    queued(admission, "mine", now=0.5, tenant="calm")
    order = []
    for _ in range(4):
        admission.release(running, 0.1, 1.0)
        [running] = admission.admit_waiting(1.0)
        order.append(running.adapter)
    assert order == ["mine", "a", "b", "c"]


def test_of_one_tenants_adapters_that_came_together_the_one_with_most_requests_is_next() -> None:
    admission = door(slots=1, patience=10.0)
    running = admitted(admission, "x")
    queued(admission, "a", now=1.0)
    both = [queued(admission, "b", now=now) for now in (2.0, 3.0)]
    admission.release(running, 0.1, 4.0)
    assert admission.admit_waiting(4.0) == both


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    admission = door(running=1, queued=1)
    admitted(admission, None)
    queued(admission, None)
    answer = refused(admission, None)
    assert answer.why is Refusal.TENANT_QUEUE and "1 of your requests run and 1 wait" in answer.reason
    assert answer.retry_after_seconds == 4.0  # two of two seconds before it, one place


def test_an_adapters_queue_has_its_own_length() -> None:
    admission = door(slots=1, adapter_queued=1)
    admitted(admission, "hot")
    queued(admission, "a")
    answer = refused(admission, "a")
    assert answer.why is Refusal.ADAPTER_QUEUE and "1 requests wait for this adapter" in answer.reason
    queued(admission, "b")


def test_a_request_whose_client_would_be_gone_is_refused_at_once_and_one_with_time_waits() -> None:
    admission = door(running=1)
    admitted(admission, None)
    answer = refused(admission, None, timeout=1.5)
    assert answer.why is Refusal.CLIENT_TIMEOUT
    assert answer.reason == "It would start in about 2 s, and its client waits 1.5 s."
    assert isinstance(admission.ask(None, 0.0, timeout_seconds=2.5), Queued)


def test_an_answer_that_comes_whole_has_to_end_while_its_client_waits() -> None:
    admission = door(running=1)
    for _ in range(40):
        admission.release(admitted(admission, None), 1.0, 0.0)
    running = admitted(admission, None)
    answer = admission.ask(None, 0.0, timeout_seconds=1.5, is_whole=True)
    assert isinstance(answer, Rejected) and answer.why is Refusal.CLIENT_TIMEOUT
    assert answer.reason == "It would be answered in about 2 s, and its client waits 1.5 s."
    assert isinstance(admission.ask(None, 0.0, timeout_seconds=1.5), Queued), "a stream has to start only"
    late = admission.ask(None, 0.0, timeout_seconds=3.5, is_whole=True)
    assert isinstance(late, Queued) and late.ticket.deadline == pytest.approx(2.5, rel=0.01)
    admission.release(running, 2.6, 2.6)
    assert admission.admit_waiting(2.6) == [], "neither can be met any more"


def test_a_request_whose_client_is_gone_is_not_started() -> None:
    admission = door(running=1)
    running = admitted(admission, None)
    late = admission.ask(None, 0.0, timeout_seconds=2.5)
    assert isinstance(late, Queued)
    patient = queued(admission, None)
    admission.release(running, 2.5, 2.5)
    assert admission.admit_waiting(2.5) == [patient]
    admission.leave(late.ticket, 2.6)
    assert admission.waiting == 0


def test_the_estimate_follows_what_requests_took() -> None:
    admission = door(running=1)
    for _ in range(40):
        admission.release(admitted(admission, None), 0.1, 0.0)
    admitted(admission, None)
    assert admission.estimated_seconds(None) == pytest.approx(0.1, rel=0.01)
    queued(admission, None)
    assert admission.estimated_seconds(None) == pytest.approx(0.2, rel=0.01)
    assert admission.estimated_seconds(None, "another") == pytest.approx(0.2, rel=0.01)  # every second place


def test_a_request_that_leaves_the_queue_frees_its_place() -> None:
    admission = door(running=1, queued=1)
    admitted(admission, None)
    ticket = queued(admission, "a")
    admission.leave(ticket, 0.0)
    queued(admission, "b")


def test_arrivals_do_not_overtake_older_requests_that_only_wait_for_room() -> None:
    admission = door(running=1)
    ticket = admitted(admission, None)
    first, second = queued(admission, None), queued(admission, None)
    admission.release(ticket, 1.0, 1.0)
    assert admission.admit_waiting(1.0) == [first]
    admission.release(first, 1.0, 2.0)
    assert admission.admit_waiting(2.0) == [second]


def test_p4_places_go_round_the_tenants_whatever_one_of_them_queued_before() -> None:
    admission = door(running=2)
    first, _ = (admitted(admission, None, tenant="flood") for _ in range(2))
    flood = [queued(admission, None, tenant="flood") for _ in range(50)]
    mine = [queued(admission, None, now=5.0, tenant="calm") for _ in range(2)]
    started, running = [], first
    for now in (6.0, 7.0, 8.0):
        admission.release(running, 1.0, now)
        [running] = admission.admit_waiting(now)
        started.append(running)
    assert started == [mine[0], flood[0], mine[1]]


def test_p4_each_tenant_has_a_queue_of_its_own_length() -> None:
    admission = door(running=1, queued=2)
    for _ in range(3):
        admission.ask(None, 0.0, "flood")
    assert isinstance(admission.ask(None, 0.0, "flood"), Rejected)
    queued(admission, None, tenant="calm")


def test_places_are_shared_by_seconds_not_by_requests() -> None:
    admission = door(running=1)
    running, now, seconds = admitted(admission, None), 0.0, {"long": 0.0, "short": 0.0}
    for tenant in ("long", "short"):
        for _ in range(60):
            queued(admission, None, tenant=tenant)
    for _ in range(60):
        took = 4.0 if running.tenant == "long" else 1.0
        now += took
        admission.release(running, took, now)
        seconds[running.tenant] = seconds.get(running.tenant, 0.0) + took
        [running] = admission.admit_waiting(now)
    assert seconds["long"] == pytest.approx(seconds["short"], abs=8.0)


def test_a_tenants_weight_is_its_share_of_places_and_of_turns() -> None:
    weighted = replace(door(running=1).limits, tenant_weights={"paying": 3.0})
    admission = Admission(weighted)
    running = admitted(admission, None)
    for _ in range(40):
        for tenant in ("paying", "other"):
            admission.ask(None, 0.0, tenant)
    started = []
    for now in range(1, 41):
        admission.release(running, 1.0, float(now))
        [running] = admission.admit_waiting(float(now))
        started.append(running.tenant)
    assert started.count("paying") == pytest.approx(30, abs=1)
    turns = Admission(replace(door(running=4, slots=1, patience=0.1).limits, tenant_weights={"paying": 3.0}))
    ticket, now, opened = admitted(turns, "first"), 1.0, list[str]()
    for number in range(24):
        for tenant in ("paying", "other"):
            turns.ask(f"{tenant}{number}", now, tenant)
    for _ in range(24):
        turns.release(ticket, 1.0, now)
        now += 10.0
        [ticket] = turns.admit_waiting(now)
        opened.append(ticket.tenant)
    assert opened.count("paying") == pytest.approx(18, abs=1)


def test_priorities_are_shares_so_that_the_low_ones_are_served_too() -> None:
    admission = door(running=1, queued=180)
    running, started = admitted(admission, None), []
    for priority in Priority:
        for _ in range(60):
            admission.ask(None, 0.0, "one", priority=priority)
    for step in range(42):
        admission.release(running, 2.0, float(step))
        [running] = admission.admit_waiting(float(step))
        started.append(running.priority)
    assert [started.count(priority) for priority in Priority] == pytest.approx([32, 8, 2], abs=1)


def test_the_adapters_that_are_next_are_known_while_they_wait() -> None:
    admission = door(slots=1)
    admitted(admission, "hot")
    for name, tenant in (("a", "one"), ("b", "one"), ("c", "two")):
        queued(admission, name, tenant=tenant)
    assert admission.next_adapters(2) == ["a", "c"]
    assert admission.next_adapters(9) == ["a", "c", "b"]


def test_who_runs_less_than_its_share_does_not_wait_for_a_place_of_a_flood() -> None:
    admission = Admission(Limits(8, 4, 100, 1.0, None, QUANTUM, spare=4))
    flood = [admitted(admission, "hot", tenant="flood") for _ in range(4)]
    waiting = queued(admission, "hot", tenant="flood")
    admitted(admission, "cool", tenant="calm")
    ticket = admitted(admission, None, tenant="calm")
    queued(admission, "cool", tenant="calm")  # half of four places are its share
    admitted(admission, None, tenant="third")
    assert admission.running == 7
    queued(admission, None, tenant="third")  # one is more than a third of four: it has one for that it had none
    admission.release(flood[0], 1.0, 1.0)
    assert admission.admit_waiting(1.0) == []  # six run, and nobody who waits is below its share
    admission.release(ticket, 1.0, 1.0)
    assert admission.admit_waiting(1.0) == [], "the share of three tenants is one"
    for one in flood[1:]:
        admission.release(one, 1.0, 1.0)
    assert waiting in admission.admit_waiting(1.0)


def test_spare_places_are_no_more_than_there_are_and_weights_count() -> None:
    limits = Limits(8, 4, 100, 1.0, None, QUANTUM, {"big": 3.0}, spare=1)
    admission = Admission(limits)
    for _ in range(4):
        admitted(admission, None, tenant="flood")
    admitted(admission, None, tenant="big")
    queued(admission, None, tenant="big")
    roomy = Admission(replace(limits, spare=9))
    for _ in range(4):
        admitted(roomy, None, tenant="flood")
    for _ in range(3):  # three quarters of four
        admitted(roomy, None, tenant="big")
    queued(roomy, None, tenant="big")
