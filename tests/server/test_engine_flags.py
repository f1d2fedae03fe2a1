"""What vLLM is started with: the flags that we set, those that a user may add, and those that stay ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.errors import ConfigInvalid
from server.engine import vllm_flags
from server.engine.base import EngineOptions, engine_name, wire_name
from server.engine.vllm_flags import build_command, build_env, check_extra_args, lora_rank, resolve_dtype
from tests.fixtures.adapters import shape_only_base

SOCKET = Path("/run/engine.sock")


@pytest.fixture
def options(tmp_path: Path) -> EngineOptions:
    base = shape_only_base(tmp_path / "tiny-base", max_position_embeddings=32768)
    return EngineOptions(base.folder, base.id, tmp_path / "run")


def value_of(command: list[str], flag: str) -> str:
    assert command.count(flag) == 1, (flag, command)
    return command[command.index(flag) + 1]


def test_the_engine_has_one_slot_more_than_we_admit(options: EngineOptions) -> None:
    command = build_command(options, SOCKET)
    assert value_of(command, "--max-loras") == "9"
    assert value_of(command, "--max-cpu-loras") == "64"
    assert value_of(command, "--uds") == str(SOCKET)
    assert value_of(command, "--served-model-name") == "tiny-base"
    assert value_of(command, "--tool-call-parser") == "hermes"


def test_the_stage_is_never_smaller_than_the_slots(options: EngineOptions) -> None:
    command = build_command(replace(options, slots=100), SOCKET)
    assert value_of(command, "--max-cpu-loras") == "101"


def test_on_a_cpu_the_context_is_the_bases_but_at_most_4096(options: EngineOptions) -> None:
    assert value_of(build_command(options, SOCKET), "--max-model-len") == "4096"
    (options.base_folder / "config.json").write_text(
        json.dumps({**json.loads((options.base_folder / "config.json").read_text()), "max_position_embeddings": 2048})
    )
    assert value_of(build_command(options, SOCKET), "--max-model-len") == "2048"
    assert value_of(build_command(replace(options, context_length_tokens=777), SOCKET), "--max-model-len") == "777"


def test_the_engine_takes_templates_only_where_the_operator_allows_them(options: EngineOptions) -> None:
    assert "--trust-request-chat-template" not in build_command(options, SOCKET)
    assert "--trust-request-chat-template" in build_command(replace(options, takes_templates=True), SOCKET)


def test_without_slots_the_engine_runs_without_lora(
    options: EngineOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And compiled, as vLLM runs a model without LoRA, where torch finds a C++ compiler to do it with."""
    merged = replace(options, slots=0, base_id="acme/router@3")
    (tmp_path / "g++").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    command = build_command(merged, SOCKET)
    assert not [word for word in command if "lora" in word and word.startswith("--")], command
    assert value_of(command, "--served-model-name") == "acme/router@3"
    assert value_of(command, "--worker-extension-cls") == vllm_flags.WORKER_EXTENSION
    assert "--enforce-eager" not in command
    assert "--enforce-eager" not in build_command(options, SOCKET)
    (tmp_path / "g++").unlink()
    assert "--enforce-eager" in build_command(merged, SOCKET)
    assert "--enforce-eager" not in build_command(options, SOCKET)


def test_a_users_flag_replaces_our_default_of_the_same_name(options: EngineOptions) -> None:
    extra = ("--tool-call-parser=qwen3_coder", "--max_model_len", "1024", "--enforce-eager")
    command = build_command(replace(options, extra_args=extra), SOCKET)
    assert command[-4:] == list(extra)
    assert "--tool-call-parser" not in command
    assert "--max-model-len" not in command


@pytest.mark.parametrize(
    "argument",
    [
        *(
            "--host",
            "--port=9000",
            "--uds",
            "--api-key=secret",
            "--served-model-name",
            "--enable-lora",
            "--lora-modules",
        ),
        *("--max-loras", "--max_loras=3", "--Max-Loras", "--max-lor", "--max-cpu-loras", "--max-lora-rank", "--config"),
        *("--trust-remote-code", "--trust-rem", "--middleware", "--data-parallel-size", "-dp", "-asc", "--model"),
        *("--worker-extension-cls", "--enable-log-requests", "--trust-request-chat-template", "--uds.x"),
    ],
)
def test_a_flag_that_is_ours_is_refused_in_every_spelling(argument: str) -> None:
    with pytest.raises(ConfigInvalid, match="not passed through"):
        check_extra_args([argument, "1"])


def test_all_refused_flags_are_named_at_once_with_what_to_do() -> None:
    with pytest.raises(ConfigInvalid) as raised:
        check_extra_args(["--host", "0.0.0.0", "--max-loras", "3"])  # noqa: S104
    assert "--host" in raised.value.message
    assert "--slots" in raised.value.message


@pytest.mark.parametrize(
    "arguments",
    [["--tensor-parallel-size", "2"], ["-tp", "2"], ["--quantization", "awq"], ["--max-model-len", "8192"], ["-O3"]],
)
def test_other_flags_pass(arguments: list[str]) -> None:
    check_extra_args(arguments)


def test_the_child_gets_no_secret_and_no_switch_that_opens_vllm(options: EngineOptions) -> None:
    inherited = {
        "PATH": "/bin",
        "HOTSHOE_API_KEY": "secret",
        "HF_TOKEN": "secret",
        "HOTSHOE_WANDB_API_KEY": "secret",
        "WANDB_API_KEY": "secret",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_PLUGINS": "other",
    }
    env = build_env(replace(options, env={"OMP_NUM_THREADS": "2"}), inherited)
    assert "secret" not in env.values()
    assert not {"VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"} & set(env)
    assert env["VLLM_PLUGINS"] == vllm_flags.PLUGINS
    assert (env["HF_HUB_OFFLINE"], env["OMP_NUM_THREADS"], env["PATH"]) == ("1", "2", "/bin")


def test_an_environment_that_would_open_vllm_is_refused(options: EngineOptions) -> None:
    with pytest.raises(ConfigInvalid, match="VLLM_PLUGINS"):
        build_env(replace(options, env={"VLLM_PLUGINS": "all"}), {})


@pytest.mark.parametrize(
    ("asked", "stored", "flags", "expected"),
    [
        ("auto", "float32", {"avx512_bf16"}, "float32"),
        ("auto", "bfloat16", {"avx512_bf16"}, "bfloat16"),
        ("auto", "bfloat16", {"amx_bf16"}, "bfloat16"),
        ("auto", "bfloat16", {"avx2"}, "float32"),
        ("bfloat16", "float32", {"avx2"}, "bfloat16"),
    ],
)
def test_on_a_cpu_the_dtype_is_what_checkpoint_and_cpu_allow(
    asked: str, stored: str, flags: set[str], expected: str
) -> None:
    assert resolve_dtype(asked, {"dtype": stored}, is_cpu=True, cpu_flags=frozenset(flags)) == expected


def test_elsewhere_the_dtype_is_vllms_choice() -> None:
    assert resolve_dtype("auto", {"dtype": "float32"}, is_cpu=False) == "auto"


@pytest.mark.parametrize(("largest", "flag"), [(1, 1), (2, 8), (16, 16), (33, 64), (512, 512)])
def test_the_largest_rank_is_rounded_up_to_one_that_vllm_takes(largest: int, flag: int) -> None:
    assert lora_rank(largest) == flag


def test_a_rank_beyond_vllms_largest_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match="512"):
        lora_rank(513)


def test_an_engine_name_has_its_tenant_and_a_wire_name_does_not() -> None:
    assert engine_name("default", "router", 3) == "router@3"
    assert engine_name("acme", "router", 3) == "acme/router@3"
    assert wire_name("acme/router@3") == wire_name("router@3") == "router@3"
