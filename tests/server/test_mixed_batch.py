"""Base and adapters in one batch of the real engine with every slot full: each answers as it does alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import SLOTS
from tests.fixtures.engines import EngineRig
from tests.fixtures.reference import assert_same_greedy, largest_difference, prompt_logprobs, served_prompt_logprobs

pytestmark = pytest.mark.model
PROMPTS = (
    "The capital of France is",
    "Turn on the light in the kitchen and",
    "def fibonacci(n):",
    "Once upon a time there was a small",
    "Water boils at a temperature of",
)
RANKS = (4, 16, 64, 8)


@pytest.fixture(scope="module")
def models(vllm_engine: EngineRig) -> Iterator[list[str]]:
    """The base and as many adapters as the engine has slots, its spare one included."""
    assert len(RANKS) == SLOTS + 1
    vllm_engine.unload_all()
    adapters = [vllm_engine.load(rank=rank, alpha=2 * rank, scale=0.05) for rank in RANKS]
    assert all(row.is_in_slot for row in vllm_engine.call(vllm_engine.engine.loaded()))
    yield [vllm_engine.base.id, *(adapter.engine_name for adapter in adapters)]
    vllm_engine.unload_all()


def requests(models: list[str]) -> list[dict[str, Any]]:
    common = {"max_tokens": 16, "logprobs": 5, "ignore_eos": True}
    return [{"model": model, "prompt": prompt, **common} for model, prompt in zip(models, PROMPTS, strict=True)]


@pytest.fixture(scope="module")
def mixed(vllm_engine: EngineRig, models: list[str]) -> list[dict[str, Any]]:
    return vllm_engine.complete_together(requests(models))


def test_each_answer_of_a_mixed_batch_is_the_answer_given_alone(
    vllm_engine: EngineRig, models: list[str], mixed: list[dict[str, Any]]
) -> None:
    for request, answer in zip(requests(models), mixed, strict=True):
        alone = vllm_engine.complete(**request).json()
        assert answer["model"] == request["model"]
        assert_same_greedy(answer, alone)


@pytest.mark.parametrize("row", [0, 4], ids=["base", "the last adapter"])
def test_in_a_batch_of_the_same_composition_log_probabilities_are_the_same(
    vllm_engine: EngineRig, models: list[str], mixed: list[dict[str, Any]], row: int
) -> None:
    """The same five prompts at once, all of them to the one model: what the others are must not matter to a row."""
    pure = vllm_engine.complete_together(requests([models[row]] * len(PROMPTS)))
    assert largest_difference(mixed[row], pure[row]) < 1e-4


def test_the_adapters_do_differ_from_the_base(mixed: list[dict[str, Any]], vllm_engine: EngineRig) -> None:
    """Random weights may leave any one token's score alone; sixteen greedy ones in a row they cannot."""
    for request, answer in zip(requests([vllm_engine.base.id] * len(PROMPTS)), mixed, strict=True):
        base = vllm_engine.complete(**request).json()
        if answer["model"] == vllm_engine.base.id:
            assert_same_greedy(answer, base)
            continue
        scores = zip(*(body["choices"][0]["logprobs"]["token_logprobs"] for body in (answer, base)), strict=True)
        assert max(abs(ours - plain) for ours, plain in scores) > 1e-2


@pytest.mark.parametrize(
    "spec",
    [
        {"rank": 16, "alpha": 32},
        {
            "rank": 4,
            "alpha": 8,
            "use_rslora": True,
            "targets": ("q_proj", "v_proj", "up_proj", "down_proj"),
            "rank_pattern": {"model.layers.3.self_attn.q_proj": 12},
            "alpha_pattern": {"model.layers.3.self_attn.q_proj": 48},
        },
    ],
    ids=["all linear", "rsLoRA on some modules, one with its own rank and alpha"],
)
def test_a_served_adapter_computes_what_peft_computes(vllm_engine: EngineRig, spec: dict[str, Any]) -> None:
    vllm_engine.unload_all()
    adapter = vllm_engine.load(scale=0.05, **spec)
    ids = [504, 2644, 17054, 282, 4649, 314, 7042, 30, 1, 4093, 198, 28120, 335, 260, 1420]
    body = vllm_engine.complete(adapter.engine_name, ids, max_tokens=1, prompt_logprobs=0).json()
    expected = prompt_logprobs(vllm_engine.base.folder, adapter.path, ids)
    plain = prompt_logprobs(vllm_engine.base.folder, None, ids)
    assert served_prompt_logprobs(body, ids) == pytest.approx(expected, abs=1e-3)
    assert max(abs(a - b) for a, b in zip(expected, plain, strict=True)) > 0.05
