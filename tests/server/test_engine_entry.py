"""What vLLM's own parser makes of a user's flags: ours stay ours in every spelling, all others pass through."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from server.config_file import flags_of
from server.engine.base import EngineOptions
from server.engine.vllm_flags import OWN_FLAGS, advice_for, build_command, check_extra_args, flag_name
from tests.fixtures.adapters import shape_only_base

pytestmark = pytest.mark.model
PROGRAM = """
import json, sys
from server.vllm_plugin.entry import taken_over, vllm_parser
own, cases = json.load(sys.stdin)
known = [word for action in vllm_parser()._actions for word in action.option_strings]
print(json.dumps([known, [taken_over([*own, *case], len(own)) for case in cases]]))
"""
UNSEEN = {  # what a list of words lets through
    ("--no-enable-lora",): ["enable-lora"],
    ("--enforce-eager", "--no-enable-lora", "--seed", "3"): ["enable-lora"],
}
SEEN = {
    ("--max-loras", "2"): ["max-loras"],
    ("--max_lora_rank=256", "--root-path", "/x"): ["max-lora-rank", "root-path"],
    ("--data-parallel-size", "2"): ["data-parallel-size"],
    ("--trust-remote-code",): ["trust-remote-code"],
    ("--served-model-name", "other"): ["served-model-name"],
}
PASSED = [
    ("--tensor-parallel-size", "2"),
    ("-tp", "2", "--quantization", "fp8", "--kv-cache-dtype", "fp8"),
    ("--max-model-len", "8192", "--dtype", "bfloat16", "--tool-call-parser", "qwen3_coder"),
    ("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}'),
    ("--compilation-config.cudagraph_mode", "NONE", "--enforce-eager"),
    ("--chat-template", "x.jinja", "--reasoning-parser", "qwen3"),
    tuple(flags_of({"tensor_parallel_size": 2, "enforce-eager": False, "lora-dtype": "auto"}, "engine")),
    tuple(flags_of({"speculative-config": {"method": "ngram", "num_speculative_tokens": 3}}, "engine")),
]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("entry")
    base = shape_only_base(folder / "base", max_position_embeddings=32768)
    command = build_command(EngineOptions(base.folder, base.id, folder / "run"), Path("/run/e.sock"))
    assert int(command[3]) == len(command[4:])
    return command[4:]


@pytest.fixture(scope="module")
def asked(own: list[str]) -> tuple[list[str], list[list[str]]]:
    """Every flag that vLLM knows, and what of each case it would take over of ours."""
    question = json.dumps([own, [*UNSEEN, *SEEN, *PASSED]])
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=question, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    known, taken = json.loads(done.stdout.splitlines()[-1])
    return known, taken


def test_ours_are_told_by_their_values_whatever_the_spelling_and_the_others_pass(
    asked: tuple[list[str], list[list[str]]],
) -> None:
    assert asked[1] == [*UNSEEN.values(), *SEEN.values(), *([] for _ in PASSED)]
    for case in (*UNSEEN, *PASSED):
        check_extra_args(case)


def test_every_flag_of_vllm_passes_or_is_ours_by_its_whole_name(asked: tuple[list[str], list[list[str]]]) -> None:
    flags = [word for word in asked[0] if word.startswith("--") and word != "--help"]
    assert len(flags) > 200
    for word in flags:
        if advice_for(flag_name(word)) is None:
            check_extra_args([word])
    assert {name for name in OWN_FLAGS if f"--{name}" not in flags} == {
        "model-tag",
        "plugins",
    }  # an argument, a variable


def test_the_process_ends_before_a_model_is_touched_and_says_what_to_do(own: list[str]) -> None:
    words = [sys.executable, "-m", "server.vllm_plugin.entry", str(len(own)), *own, "--no-enable-lora"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: These vLLM flags are not passed through: --enable-lora "
        "(it is on, and off with --merged of hotshoe serve)."
    )
