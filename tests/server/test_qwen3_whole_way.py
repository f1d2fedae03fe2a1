"""A tiny Qwen3 with the real tokenizer and template goes the whole way: train, push, serve, export, merged answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.fixtures.bases import tiny_qwen3
from tests.fixtures.processes import Served

pytestmark = pytest.mark.model
SERVER = {"HOTSHOE_KV_CACHE_BYTES": str(64 << 20), "HOTSHOE_CONTEXT_LENGTH_TOKENS": "1024", "HOTSHOE_STAGED_LIMIT": "4"}
START_SECONDS = 420.0
COLOURS = {"apple": "red", "grass": "green", "sea": "blue", "sun": "yellow"}
THOUGHT = "Look at it."


def question(thing: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"Colour of {thing}?"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Weights wide enough that logits can be sure of one token among 151,936; and the smallest head that vLLM's CPU
    # attention has a kernel for.
    return tiny_qwen3(tmp_path_factory.mktemp("way") / "tiny-qwen3", head_dim=32, initializer_range=0.3)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every question twice: once answered after a thought, once at once."""
    path = tmp_path_factory.mktemp("rows") / "colours.jsonl"
    with path.open("w") as file:
        for thing, colour in COLOURS.items():
            answer = {"role": "assistant", "content": colour}
            for turn in (answer, answer | {"reasoning_content": THOUGHT}):
                file.write(json.dumps({"messages": [*question(thing), turn]}) + "\n")
    return path


@pytest.fixture(scope="module")
def served(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("qwen3-way") / "home"
    one = Served(home, "--base", str(base), "--slots", "2", seconds=START_SECONDS, **SERVER)
    yield one
    one.end()


@pytest.fixture(scope="module")
def pushed(served: Served, base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`colours@1`, trained by QLoRA until it knows its rows, and pushed."""
    folder = tmp_path_factory.mktemp("trained") / "colours"
    words = ("--name", "colours", "--base", str(base), "--out", str(folder), "--method", "qlora", "--epochs", "100")
    words += ("--batch-size", "8", "--learning-rate", "1e-2", "--validation-share", "0")
    trained = served.run("train", str(rows), *words, "--json")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert json.loads(trained.stdout)["card"]["result"]["training_loss"] < 0.1
    done = served.run("push", str(folder), "--name", "colours", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def expected(colour: str, is_thinking: bool) -> str:
    return f"<think>\n{THOUGHT}\n</think>\n\n{colour}" if is_thinking else colour


@pytest.mark.parametrize("is_thinking", [True, False], ids=["thinking", "not thinking"])
def test_the_served_adapter_answers_as_it_was_taught_with_thinking_on_and_off(
    served: Served, pushed: dict[str, Any], is_thinking: bool
) -> None:
    assert (pushed["id"], pushed["status"]) == ("colours@1", "ready")
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", timeout=120, max_retries=0) as sdk:
        for thing, colour in COLOURS.items():
            answer = sdk.chat.completions.create(
                model="colours",
                messages=question(thing),  # type: ignore[arg-type]
                max_tokens=24,
                temperature=0,
                extra_body={"chat_template_kwargs": {"enable_thinking": is_thinking}},
            )
            assert answer.choices[0].finish_reason == "stop"
            assert answer.choices[0].message.content == expected(colour, is_thinking)


@pytest.mark.long
def test_the_merged_export_answers_so_in_vllm(
    served: Served, pushed: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("in-vllm")
    done = served.run("export", pushed["id"], "--out", str(place / "merged"), "--no-parity")
    assert done.returncode == 0, done.stdout + done.stderr
    one = Served(place / "home", "--base", str(place / "merged"), "--slots", "1", seconds=START_SECONDS, **SERVER)
    try:
        with openai.OpenAI(base_url=f"{one.url}/v1", api_key="unused", timeout=120, max_retries=0) as sdk:
            for thing, colour in COLOURS.items():
                answer = sdk.chat.completions.create(
                    model="merged",
                    messages=question(thing),  # type: ignore[arg-type]
                    max_tokens=24,
                    temperature=0,
                    extra_body={"chat_template_kwargs": {"enable_thinking": False}},
                )
                assert answer.choices[0].message.content == expected(colour, False)
    finally:
        one.end()


def test_the_merged_export_answers_so_in_plain_transformers(
    served: Served, pushed: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "merged"
    done = served.run("export", pushed["id"], "--out", str(out), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["parity"]["verdict"] == "passed"
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert model.config.model_type == "qwen3" and model.config.tie_word_embeddings
    for is_thinking in (True, False):
        for thing, colour in COLOURS.items():
            ids = tokenizer.apply_chat_template(
                question(thing),
                add_generation_prompt=True,
                enable_thinking=is_thinking,
                return_tensors="pt",
                return_dict=True,
            )
            new = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
            assert tokenizer.decode(new[:-1]) == expected(colour, is_thinking)
            assert new[-1] == tokenizer.eos_token_id
