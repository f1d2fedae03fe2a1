"""The loop of the peft side: its order, its clients and its times, with a model that answers by the clock."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

from bench.many.drive import Flight, Window
from bench.many.peft_side import BATCH, asked, parsed, serve
from bench.many.plan import Lengths, Load, Popularity

TOKEN_SECONDS = 0.01
OPEN = Load("open", Popularity(3, 1.0, 0.2), Lengths(8), Lengths(4, 0.5, 2, 8), rate=20.0)
CLOSED = Load("closed", Popularity(2), Lengths(8), Lengths(5), clients=6)


class Clockwork:
    """Generates as the model does: all rows of a batch together, each to its own length, until the end."""

    def __init__(self) -> None:
        self.batches: list[list[Flight]] = []

    def generate(self, batch: list[Flight], clock: Callable[[], float], end: float) -> None:
        self.batches.append(batch)
        for _ in range(max(one.shot.output_tokens for one in batch)):
            time.sleep(TOKEN_SECONDS)
            for one in batch:
                if len(one.times) < one.shot.output_tokens:
                    one.times.append(clock())
            if clock() >= end:
                break
        for one in batch:
            if len(one.times) == one.shot.output_tokens:
                one.tokens = one.shot.output_tokens


def test_a_batch_is_of_one_adapter_and_begins_with_the_oldest() -> None:
    model = Clockwork()
    seen = serve(OPEN, 1, Window(0.0, 2.0, 5.0), model.generate)
    assert len(seen) == len(OPEN.arrivals(1, 2.0)) and all(one.is_whole for one in seen)
    for batch in model.batches:
        assert len({one.shot.model for one in batch}) == 1 and len(batch) <= BATCH
        assert all(one.sent <= one.times[0] for one in batch)
    oldest = [batch[0].intended for batch in model.batches]
    assert oldest == sorted(oldest) and len(model.batches) < len(seen)
    assert all(one.ttft_seconds is not None and one.ttft_seconds > 0 for one in seen)


def test_closed_clients_ask_again_when_their_answer_is_whole_and_end_with_the_window() -> None:
    model = Clockwork()
    began = time.monotonic()
    seen = serve(CLOSED, 1, Window(0.2, 1.0), model.generate)
    assert time.monotonic() - began < 2.5
    at_once = [sum(other.intended <= one.intended < (other.last or 9.0) for other in seen) for one in seen]
    assert max(at_once) <= CLOSED.clients and len(seen) > CLOSED.clients
    assert sum(one.window_tokens for one in seen) > 0


def test_a_closed_load_ends_with_its_requests() -> None:
    seen = serve(CLOSED, 1, Window(0.0, 30.0, requests=7), Clockwork().generate)
    assert len(seen) == 7 and all(one.is_whole for one in seen)


@pytest.mark.parametrize("load", [OPEN, CLOSED], ids=["open", "closed"])
def test_a_load_comes_over_as_it_was(load: Load) -> None:
    window = Window(1.0, 2.0, 3.0, 4)
    assert parsed(json.loads(json.dumps(asked(load, 7, window)))) == (load, 7, window)
