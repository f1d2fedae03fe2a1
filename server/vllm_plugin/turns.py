"""Steps of the engine are shared among tenants in seconds: whoever had more than another one waits for some of them.

Places at the engine are shared already (server/shares.py), but whoever has one is in every step, and on a CPU a step
takes as long as it has rows: one tenant's sixteen requests, with the prompts of those that follow them, make each step
many times as long for the one request of somebody else. So the core charges a step to the tenants that were in it, by
tokens, and leaves out of the next one whoever is ahead of the one furthest behind (a virtual token counter, in seconds;
Sheng et al., Fairness in Serving Large Language Models, OSDI 2024). What is left out keeps its place, its blocks and
its adapter.

A tenant is known by its salt of the prefix cache; the weight of a request, where it is not 1, comes with it. On a GPU a
step of a few rows takes as long as one of many, so there it would cost all and give nothing: it is for CPUs.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple

from server.engine.base import WEIGHT

SWITCH = "HOTSHOE_STEP_TURNS"  # 0: every request is in every step
# How far ahead a flow may be and still be in the step, in seconds at weight 1. Less than a step would have two flows
# that are alike take turns instead of sharing each step, which is cheaper for both.
SLACK_SECONDS = 0.05


class Flow(NamedTuple):
    """Requests that share one account: those of a tenant with one weight."""

    tenant: str
    weight: float


class Accounts:
    """Seconds of the engine over weight that each flow was charged, as far as that still matters."""

    def __init__(self, slack_seconds: float = SLACK_SECONDS) -> None:
        self._slack = slack_seconds
        self._charged: dict[Flow, float] = {}
        self._floor = 0.0  # where the flow stood that was furthest behind, when last looked at

    def held(self, present: Iterable[Flow]) -> frozenset[Flow]:
        """Those of the flows with requests that are not in the next step; never all of them.

        A flow that comes begins where the one furthest behind stands: nobody saves up. One that left ahead of it and
        comes back soon is where it was.
        """
        flows = set(present)
        if not flows:
            return frozenset()
        for flow in flows:
            self._charged.setdefault(flow, self._floor)
        self._floor = floor = min(self._charged[flow] for flow in flows)
        self._charged = {flow: charged for flow, charged in self._charged.items() if flow in flows or charged > floor}
        return frozenset(flow for flow in flows if self._charged[flow] > self._floor + self._slack)

    def charge(self, seconds: float, tokens: Mapping[Flow, int]) -> None:
        """A step of so many seconds had so many tokens of each flow in it."""
        total = sum(tokens.values())
        for flow, count in tokens.items():
            self._charged[flow] = self._charged.get(flow, self._floor) + seconds * count / total / flow.weight


def flow_of(request: Any) -> Flow:
    """Of one of vLLM's requests."""
    extra = getattr(request.sampling_params, "extra_args", None) or {}
    return Flow(request.cache_salt or "", float(extra.get(WEIGHT, 1.0)))


def is_wanted() -> bool:
    return os.environ.get(SWITCH) != "0"


def install(scheduler_class: Any) -> None:
    """Have this class of schedulers take turns. Idempotent."""
    if hasattr(scheduler_class, "hotshoe_schedule"):
        return
    schedule = scheduler_class.hotshoe_schedule = scheduler_class.schedule
    update = scheduler_class.update_from_output
    is_ready = scheduler_class._handle_blocked_waiting_request

    def schedule_in_turns(scheduler: Any, *rest: Any, **named: Any) -> Any:
        turns = vars(scheduler).setdefault("hotshoe_turns", Turns())
        turns.begin(scheduler)
        output = schedule(scheduler, *rest, **named)
        turns.is_stuck = bool(turns.held) and not output.total_num_scheduled_tokens
        return output

    def is_ready_in_turn(scheduler: Any, request: Any) -> bool:
        return flow_of(request) not in scheduler.hotshoe_turns.held and is_ready(scheduler, request)

    def update_and_charge(scheduler: Any, output: Any, model_output: Any) -> Any:
        scheduler.hotshoe_turns.end(scheduler, output)
        return update(scheduler, output, model_output)

    scheduler_class.schedule = schedule_in_turns
    scheduler_class._handle_blocked_waiting_request = is_ready_in_turn
    scheduler_class.update_from_output = update_and_charge


class Turns:
    """The accounts of one scheduler, and what is left out of its step."""

    def __init__(self) -> None:
        self.accounts = Accounts()
        self.held: frozenset[Flow] = frozenset()
        self.is_stuck = False  # the last step was empty: who is behind could not run, so that nobody is held for him
        self._began = 0.0

    def begin(self, scheduler: Any) -> None:
        """Choose who is held, and have vLLM leave their running requests out of its next step."""
        self._began = time.monotonic()
        flows = [flow_of(request) for request in chain(scheduler.running, scheduler.waiting)]
        self.held = self.accounts.held(flows)
        if not self.held:
            return
        if self.is_stuck or _is_beyond_slots(scheduler):
            self.held = frozenset()
            return
        for request in scheduler.running:
            if flow_of(request) in self.held:  # as vLLM keeps a request from two steps of a pipeline at once
                request.next_decode_eligible_step = scheduler.current_step + 2

    def end(self, scheduler: Any, output: Any) -> None:
        """Charge a step whose tokens have come."""
        tokens: Counter[Flow] = Counter()
        for name, count in output.num_scheduled_tokens.items():
            if (request := scheduler.requests.get(name)) is not None:
                tokens[flow_of(request)] += count
        if tokens:
            self.accounts.charge(time.monotonic() - self._began, tokens)


def _is_beyond_slots(scheduler: Any) -> bool:
    """There are requests of more adapters than slots. vLLM counts those of a step only, and would let another adapter
    in beside one that is held; the gateway sends no more than there are slots."""
    if not scheduler.lora_config:
        return False
    found = (request.lora_request for request in chain(scheduler.running, scheduler.waiting))
    most: int = scheduler.lora_config.max_loras
    return len({one.lora_int_id for one in found if one}) > most


def install_in_core() -> None:
    """In the process of vLLM's engine core, on a CPU."""
    from vllm.platforms import current_platform
    from vllm.v1.core.sched.scheduler import Scheduler

    if is_wanted() and current_platform.is_cpu():
        install(Scheduler)
