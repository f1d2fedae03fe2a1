"""The planner's peaks against torch's own accounting of our trainer's code on fake tensors, and what they depend on."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from adapters.bases import PROJECTIONS
from bench.planner_fake import cases, predicted_bytes, tracked_bytes
from training.planner.peak import _in_pass, _played, peak
from training.planner.sizes import Architecture, find
from training.planner.tape import Arena, leaf, made, run_backward
from training.planner.usual import usual_peak
from training.planner.work import Method, Pass

QWEN2 = replace(find("Qwen2.5-0.5B"), layers=2, vocabulary=20_000, hidden=256, intermediate=704, heads=4)
QWEN3 = replace(find("Qwen3-8B"), layers=2, vocabulary=20_000, hidden=256, intermediate=704, heads=4, key_value_heads=2)
LORA, FULL = Method(16, PROJECTIONS, 2), Method(0, (), 4)
SHORT, LONG = Pass(8, 20, 20, 170, 60), Pass(2, 0, 600, 1100, 400)


@pytest.mark.parametrize(
    ("of", "method", "work", "passes"),
    [
        (QWEN2, replace(LORA, itemsize=4), SHORT, 1),
        (QWEN3, LORA, LONG, 1),
        (QWEN3, replace(LORA, checkpoints=True), LONG, 2),
        (QWEN2, FULL, LONG, 2),
        (QWEN3, replace(FULL, checkpoints=True), SHORT, 1),
    ],
    ids=["qwen2-lora", "qwen3-lora-16-bit", "qwen3-checkpointing", "qwen2-full", "qwen3-full-checkpointing"],
)
def test_the_planned_peak_is_what_torch_counts(of: Architecture, method: Method, work: Pass, passes: int) -> None:
    case = (of, method, work)
    assert predicted_bytes(case, passes) == pytest.approx(tracked_bytes(case, passes), rel=0.05)


@pytest.mark.long
@pytest.mark.parametrize("case", list(cases()), ids=lambda case: f"{case[0].name}-{case[1].itemsize}-{case[2].tokens}")
def test_the_planned_peak_is_what_torch_counts_at_real_widths(case: tuple[Architecture, Method, Pass]) -> None:
    assert predicted_bytes(case) == pytest.approx(tracked_bytes(case), rel=0.05)


def test_thirty_configurations_are_compared() -> None:
    assert len(list(cases())) >= 30


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen3-8B"])
def test_a_deep_model_costs_what_playing_all_its_layers_costs(name: str) -> None:
    methods = (LORA, replace(LORA, checkpoints=True), replace(LORA, is_quantised=True))
    for method, work, has in itertools.product(methods, (SHORT, LONG, Pass(1, 0, 30, 30, 20)), (False, True)):
        assert _in_pass(find(name), method, work, has) == _played(find(name), method, work, has)


def test_checkpointing_and_quantising_hold_less_and_longer_rows_more() -> None:
    size = find("Qwen2.5-7B")
    plain = peak(size, LORA, LONG, "adamw_torch").total
    assert peak(size, replace(LORA, checkpoints=True), LONG, "adamw_torch").total < plain
    assert peak(size, replace(LORA, is_quantised=True), LONG, "adamw_torch").total < plain
    assert peak(size, LORA, Pass(2, 0, 1200, 2200, 800), "adamw_torch").total > plain


def test_a_second_pass_of_a_step_holds_the_first_ones_gradients() -> None:
    size = find("Qwen2.5-0.5B")
    once, twice = (peak(size, FULL, LONG, "paged_adamw_8bit", passes) for passes in (1, 2))
    assert twice.gradients >= 4 * size.parameters > once.gradients


def test_the_usual_trainer_holds_logits_of_every_position() -> None:
    size = find("Qwen2.5-0.5B")
    ours, usual = (made(size, LORA, LONG, "adamw_torch") for made in (peak, usual_peak))
    assert usual.logits == 2 * 600 * size.vocabulary * 14 > 50 * ours.logits


def test_a_buffer_counts_until_nothing_holds_it() -> None:
    arena = Arena()
    weight = leaf(arena, 10, 4)
    value = made(arena, 100, 4, [weight], [weight.storage])
    result = made(arena, 1, 4, [value], [value.storage])
    del value
    assert arena.live_bytes == 40 + 400 + 4, "what a node saved is held"
    run_backward(result, arena.new(4))
    del result
    assert arena.live_bytes == 40 + 40, "the weight and its gradient are left"
    assert arena.peak_bytes == 40 + 400 + 4 + 4 + 400
