"""The engine gets no reasoning parser by itself: it would lose answers without a thought that do not say so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.engine.base import EngineOptions
from server.engine.vllm_flags import build_command
from tests.fixtures.bases import TEMPLATES

PARSE = """
import json, sys
from tests.fixtures.bases import qwen_tokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.reasoning import ReasoningParserManager
parser, found = ReasoningParserManager.get_reasoning_parser("qwen3"), {}
tokenizer = qwen_tokenizer("qwen3", "bytes")
for said in (None, True, False):
    kwargs = {} if said is None else {"enable_thinking": said}
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "x"}], chat_template_kwargs=kwargs)
    for text in ("Red.", "<think>Look.</think>Red."):
        found[f"{said} {text}"] = parser(tokenizer, chat_template_kwargs=kwargs).extract_reasoning(text, request)
json.dump(found, sys.stdout)
"""


def command(base: Path, *extra: str) -> list[str]:
    options = EngineOptions(base, base.name, Path("/nowhere"), slots=2, max_rank=8, extra_args=extra)
    return build_command(options, Path("/nowhere/engine.sock"))


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3"])
def test_no_base_gets_the_parser_unless_its_operator_asks(tmp_path: Path, family: str) -> None:
    """Qwen2.5's template never thinks; Qwen3's does unless it is told not to, and an adapter on it may not."""
    base = tmp_path / family
    base.mkdir()
    config = {"max_position_embeddings": 1024, "torch_dtype": "float32", "vocab_size": 8, "hidden_size": 8}
    (base / "config.json").write_text(json.dumps(config))
    (base / "chat_template.jinja").write_bytes((TEMPLATES / f"{family}.jinja").read_bytes())
    assert not [word for word in command(base) if word.startswith("--reasoning-parser")]
    assert command(base, "--reasoning-parser", "qwen3")[-2:] == ["--reasoning-parser", "qwen3"]


@pytest.mark.model
def test_the_parser_takes_an_answer_without_a_thought_for_one_where_nobody_said_that_it_does_not_think() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(root), "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_PLUGINS": ""},
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["None Red."] == found["True Red."] == ["Red.", None], "all of it is reasoning, and no content is left"
    assert found["False Red."] == [None, "Red."], "as a version answers whose card says so"
    assert found["None <think>Look.</think>Red."] == ["Look.", "Red."]
