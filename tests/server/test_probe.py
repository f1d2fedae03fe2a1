from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest

from adapters.errors import EngineFailed
from server.probe import PROMPTS, judge, probe, read_log_probabilities
from server.vllm_plugin.not_finite import ENDED


def test_an_adapter_that_moves_a_log_probability_is_proven() -> None:
    proof = judge([-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.5], 1e-4)
    assert (proof.is_proven, proof.largest_change, proof.noise) == (True, 0.5, 0.0)


def test_an_adapter_that_moves_nothing_or_no_more_than_the_noise_is_not() -> None:
    assert judge([-1.0], [-1.0], [-1.00005], 1e-4).code == "no_effect"
    assert judge([-1.0], [-1.1], [-1.2], 1e-4).code == "no_effect"
    assert judge([-1.0], [-1.1], [-1.4], 1e-4).code == "proven"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_never_proven(value: float) -> None:
    assert judge([-1.0, -1.0], [-1.0, -1.0], [-1.5, value], 1e-4).code == "non_finite"


def test_the_prompts_tokens_are_read_and_the_generated_one_only_checked() -> None:
    assert read_log_probabilities(answer([None, -1.0, -2.0, -9.0])) == [-1.0, -2.0]
    assert math.isnan(read_log_probabilities(answer([None, -1.0, -2.0, math.nan]))[0])


@pytest.mark.parametrize("said", ["Out of range float values are not JSON compliant", ENDED])
def test_an_engine_that_cannot_answer_because_logits_are_not_finite_shows_that_they_are(said: str) -> None:
    async def complete(body: dict[str, Any]) -> tuple[int, bytes]:
        if body["model"] == "bad":
            return 500, json.dumps({"error": {"message": said}}).encode()
        return 200, answer([None, -1.0, -2.0])

    assert asyncio.run(probe(complete, "base", "bad", 1e-4)).code == "non_finite"


def test_a_probe_that_the_engine_refuses_is_the_engines_failure() -> None:
    async def complete(body: dict[str, Any]) -> tuple[int, bytes]:
        return 500, b"{}"

    with pytest.raises(EngineFailed):
        asyncio.run(probe(complete, "base", "x", 1e-4))


def test_every_prompt_is_asked_of_base_adapter_and_base() -> None:
    asked: list[str] = []

    async def complete(body: dict[str, Any]) -> tuple[int, bytes]:
        asked.append(body["model"])
        return 200, answer([None, -1.0 - len(body["model"]), -2.0])

    assert asyncio.run(probe(complete, "base", "adapter", 1e-4)).is_proven
    assert asked == ["base"] * len(PROMPTS) + ["adapter"] * len(PROMPTS) + ["base"] * len(PROMPTS)


def answer(values: list[float | None]) -> bytes:
    return json.dumps({"choices": [{"logprobs": {"token_logprobs": values}}]}).encode()
