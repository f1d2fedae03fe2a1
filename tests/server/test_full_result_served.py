"""What full fine-tuning leaves is served as a base of its own, and answers as the reference path does."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest

from tests.fixtures.bases import tiny_qwen3
from tests.fixtures.processes import Served
from training.config import TrainingConfig
from training.evaluate import generate_local, load_examples
from training.trainer import train

pytestmark = [pytest.mark.model, pytest.mark.long]
SERVER = {"HOTSHOE_KV_CACHE_BYTES": str(64 << 20), "HOTSHOE_CONTEXT_LENGTH_TOKENS": "1024", "HOTSHOE_STAGED_LIMIT": "4"}
START_SECONDS = 420.0
COLOURS = {"apple": "red", "grass": "green", "sea": "blue", "sun": "yellow"}


def test_a_full_result_is_served_and_answers_as_transformers_does(tmp_path: Path) -> None:
    parent = tiny_qwen3(tmp_path / "tiny-qwen3", head_dim=32, initializer_range=0.3)
    rows = tmp_path / "colours.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{thing}?", "completion": c}) + "\n" for thing, c in COLOURS.items())
    )
    out = tmp_path / "own-base"
    asked = TrainingConfig(
        rows,
        "own-base",
        out,
        base=str(parent),
        method="full",
        epochs=60,
        batch_size=4,
        learning_rate=3e-3,
        validation_share=0,
    )
    assert train(asked).card["result"]["training_loss"] < 0.1
    examples = load_examples(rows)
    expected = generate_local(out, None, [example.prompt for example in examples], max_new_tokens=12)
    assert expected == list(COLOURS.values())
    served = Served(tmp_path / "home", "--base", str(out), "--slots", "1", seconds=START_SECONDS, **SERVER)
    try:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", timeout=120, max_retries=0) as sdk:
            assert [model.id for model in sdk.models.list()] == ["own-base"]
            for example, wanted in zip(examples, expected, strict=True):
                answer = sdk.chat.completions.create(
                    model="own-base",
                    messages=example.messages,  # type: ignore[arg-type]
                    max_tokens=12,
                    temperature=0,
                    extra_body={"chat_template_kwargs": {"enable_thinking": False}},
                )
                assert answer.choices[0].message.content == wanted
                assert answer.choices[0].finish_reason == "stop"
    finally:
        served.end()
