from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from server.admission import Admission, Admitted, Limits, Queued, Rejected, Ticket


def door(slots: int = 2, running: int = 100, queued: int = 100, patience: float = 1.0) -> Admission:
    return Admission(Limits(slots, running, queued, patience))


def admitted(admission: Admission, adapter: str | None, now: float = 0.0) -> Ticket:
    answer = admission.ask(adapter, now)
    assert isinstance(answer, Admitted), answer
    return answer.ticket


def queued(admission: Admission, adapter: str | None, now: float = 0.0) -> Ticket:
    answer = admission.ask(adapter, now)
    assert isinstance(answer, Queued), answer
    return answer.ticket


def test_as_many_distinct_adapters_run_as_there_are_slots_and_the_base_needs_none() -> None:
    admission = door(slots=2)
    first = admitted(admission, "a")
    admitted(admission, "b")
    admitted(admission, "a")
    admitted(admission, None)
    waiting = queued(admission, "c")
    admission.release(first, 1.0)
    assert admission.admit_waiting(0.0) == []  # a still runs once
    admission.release(first, 1.0)
    assert admission.admit_waiting(0.0) == [waiting]


def test_requests_for_a_running_adapter_pass_a_cold_one_only_until_its_patience_is_over() -> None:
    admission = door(slots=1, patience=1.0)
    hot = admitted(admission, "hot")
    cold = queued(admission, "cold", now=0.0)
    admitted(admission, "hot", now=0.5)
    younger = queued(admission, "hot", now=1.5)
    admitted(admission, None, now=1.5)
    admission.release(hot, 1.0)
    assert admission.admit_waiting(2.0) == []
    admission.release(hot, 1.0)
    assert admission.admit_waiting(2.0) == [cold]
    admission.release(cold, 1.0)
    assert admission.admit_waiting(3.0) == [younger]


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    admission = door(running=1, queued=1)
    admitted(admission, None)
    queued(admission, None)
    assert admission.is_full()
    answer = admission.ask(None, 0.0)
    assert isinstance(answer, Rejected)
    assert 1.0 <= answer.retry_after_seconds <= 60.0


def test_arrivals_do_not_overtake_older_requests_that_only_wait_for_room() -> None:
    admission = door(running=1)
    ticket = admitted(admission, None)
    first, second = queued(admission, "a"), queued(admission, None)
    admission.release(ticket, 1.0)
    assert admission.admit_waiting(0.0) == [first]
    admission.release(first, 1.0)
    assert admission.admit_waiting(0.0) == [second]


def test_a_request_that_leaves_the_queue_frees_its_place() -> None:
    admission = door(running=1, queued=1)
    admitted(admission, None)
    ticket = queued(admission, "a")
    admission.leave(ticket)
    queued(admission, "b")


def test_p4_places_go_in_turn_between_tenants_whatever_one_of_them_queued_before() -> None:
    admission = door(running=2)
    first, second = (admission.ask(None, 0.0, "flood") for _ in range(2))
    for _ in range(50):
        admission.ask(None, 0.0, "flood")
    mine = [admission.ask(None, 5.0, "calm") for _ in range(2)]
    assert isinstance(first, Admitted) and isinstance(second, Admitted)
    assert all(isinstance(one, Queued) for one in mine)
    admission.release(first.ticket, 1.0)
    assert admission.admit_waiting(6.0) == [mine[0].ticket]  # type: ignore[union-attr]
    admission.release(mine[0].ticket, 1.0)  # type: ignore[union-attr]
    assert admission.admit_waiting(7.0) == [mine[1].ticket]  # type: ignore[union-attr]
    admission.release(mine[1].ticket, 1.0)  # type: ignore[union-attr]
    assert [ticket.tenant for ticket in admission.admit_waiting(8.0)] == ["flood"]


def test_p4_each_tenant_has_a_queue_of_its_own_length() -> None:
    admission = door(running=1, queued=2)
    for _ in range(3):
        admission.ask(None, 0.0, "flood")
    refused = admission.ask(None, 0.0, "flood")
    assert isinstance(refused, Rejected) and "1 of your requests run and 2 wait" in refused.reason
    assert admission.is_full("flood") and not admission.is_full("calm")
    assert isinstance(admission.ask(None, 0.0, "calm"), Queued)


def test_a_cold_adapters_patience_holds_against_other_tenants_too() -> None:
    admission = door(slots=1, patience=1.0)
    hot = admitted(admission, "hot")
    for _ in range(3):
        admission.ask("cold", 0.0, "flood")
    assert isinstance(admission.ask("hot", 0.5, "calm"), Admitted)
    assert isinstance(admission.ask("hot", 1.5, "new"), Queued)
    assert isinstance(admission.ask(None, 1.5, "new"), Admitted)
    admission.release(hot, 1.0)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([None, "a", "b", "c", "d"]), st.booleans(), st.sampled_from("xyz")), max_size=60)
)
def test_limits_hold_and_everybody_is_served_in_the_end(steps: list[tuple[str | None, bool, str]]) -> None:
    admission = door(slots=2, running=3, queued=8, patience=0.5)
    running: list[Ticket] = []
    waiting: list[Ticket] = []
    now = 0.0

    def finish_one() -> None:
        admission.release(running.pop(0), 0.1)
        started = admission.admit_waiting(now)
        running.extend(started)
        for ticket in started:
            waiting.remove(ticket)

    for adapter, is_finishing, tenant in steps:
        now += 0.2
        answer = admission.ask(adapter, now, tenant)
        if isinstance(answer, Admitted):
            running.append(answer.ticket)
        elif isinstance(answer, Queued):
            waiting.append(answer.ticket)
        if is_finishing and running:
            finish_one()
        assert len(running) == admission.running <= 3
        assert len({ticket.adapter for ticket in running} - {None}) <= 2
        assert admission.queue == waiting
    while running:
        now += 0.2
        finish_one()
    assert not waiting and not admission.active and not admission.running_by
