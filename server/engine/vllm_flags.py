"""How stock vLLM is started: its command line and environment, decided from options; and the flags that stay ours."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from adapters.bases import PROJECTIONS, stored_dtype
from adapters.child import SECRETS
from adapters.errors import ConfigInvalid
from server.engine.base import EngineOptions

ENTRY = "server.vllm_plugin.entry"  # which runs VLLM
VLLM = "vllm.entrypoints.launchers.api_server.entry"
WORKER_EXTENSION = "server.vllm_plugin.worker.HotshoeWorker"
PLUGINS = "hotshoe_cpu_lora,hotshoe_routes"
CPU_CONTEXT_LIMIT_TOKENS = 4096
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that --max-lora-rank takes

# Flag -> what to do instead. A flag is refused in every spelling: underscores, `--flag=value`, dotted, abbreviated.
OWN_FLAGS: dict[str, str] = {
    "host": "use --host of hotshoe serve: the engine listens on a private socket",
    "port": "use --port of hotshoe serve: the engine listens on a private socket",
    "uds": "the engine's socket is ours",
    "api-key": "use --api-key of hotshoe serve",
    "model": "use --base",
    "model-tag": "use --base",
    "served-model-name": "the base's name is the last part of its folder or id",
    "enable-lora": "it is on, and off with --merged of hotshoe serve",
    "lora-modules": "push adapters instead",
    "max-loras": "use --slots",
    "max-cpu-loras": "use the setting for staged adapters",
    "max-lora-rank": "use the setting for the largest rank",
    "lora-target-modules": "the seven projections are fixed",
    "kv-cache-memory-bytes": "use the setting for the KV cache",
    "middleware": "the engine runs no code but its own and ours",
    "trust-remote-code": "the engine runs no code but its own and ours",
    "tool-parser-plugin": "the engine runs no code but its own and ours",
    "reasoning-parser-plugin": "the engine runs no code but its own and ours",
    "worker-cls": "the engine runs no code but its own and ours",
    "worker-extension-cls": "it carries ours",
    "allowed-local-media-path": "clients send bytes, never paths",
    "trust-request-chat-template": "it follows HOTSHOE_ALLOW_CHAT_TEMPLATES",
    "plugins": "they are fixed",
    "config": "write the flags out, or put them under `engine` in a file for --config of hotshoe serve",
    "api-server-count": "the control state is one process",
    "headless": "the control state is one process",
    "grpc": "the engine speaks HTTP on its socket",
    "grpc-port": "the engine speaks HTTP on its socket",
    "root-path": "the gateway is what a proxy sees",
    "ssl-keyfile": "use --tls-key of hotshoe serve",
    "ssl-certfile": "use --tls-cert of hotshoe serve",
    "enable-log-requests": "prompts are in no log",
    "disable-log-stats": "our metrics need vLLM's",
}
PASSED = {"reasoning-parser"}  # flags of vLLM's that read like the beginning of one of ours
OWN_PREFIXES = {"data-parallel": "one engine is one process group; more engines are more servers"}
OWN_SHORT_FLAGS = {"-asc": "api-server-count", "-dp": "data-parallel", "-dpn": "data-parallel", "-dpr": "data-parallel"}
FORCED_ENV = {
    "VLLM_PLUGINS": PLUGINS,
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_COMPUTE_NANS_IN_LOGITS": "1",  # server/vllm_plugin/not_finite.py
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}
DEFAULT_ENV = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_COLOR": "0", "PYTHONUNBUFFERED": "1"}
REMOVED_ENV = (
    "VLLM_SERVER_DEV_MODE",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "VLLM_ALLOW_INSECURE_SERIALIZATION",
    "VLLM_API_KEY",
    "VLLM_CPU_KVCACHE_SPACE",  # vLLM lets it win over the flag that we pass
    *SECRETS,
)


def build_command(options: EngineOptions, socket_path: Path) -> list[str]:
    """The whole command of the engine process; raises ConfigInvalid for extra arguments that are ours."""
    given = check_extra_args(options.extra_args)
    config = json.loads((options.base_folder / "config.json").read_bytes())
    flags: list[str] = ["--uds", str(socket_path), "--model", str(options.base_folder)]
    flags += ["--served-model-name", options.base_id, *(_lora_flags(options) if options.slots else ())]
    flags += ["--worker-extension-cls", WORKER_EXTENSION, "--disable-uvicorn-access-log"]
    flags += ["--trust-request-chat-template"] if options.takes_templates else []
    for flag, value in _defaults(options, config).items():
        if flag not in given:
            flags += [f"--{flag}", value] if value else [f"--{flag}"]
    return [sys.executable, "-m", ENTRY, str(len(flags)), *flags, *options.extra_args]


def _lora_flags(options: EngineOptions) -> list[str]:
    flags = ["--enable-lora", "--max-loras", str(options.slots + 1)]
    flags += ["--max-cpu-loras", str(max(options.staged_limit, options.slots + 1))]
    return [*flags, "--max-lora-rank", str(lora_rank(options.max_rank)), "--lora-target-modules", *PROJECTIONS]


def _defaults(options: EngineOptions, config: Mapping[str, Any]) -> dict[str, str]:
    """Flags that a user's own of the same name replace; an empty value is a switch."""
    flags = {"enable-auto-tool-choice": "", "tool-call-parser": "hermes"}
    dtype = resolve_dtype(options.dtype, config, is_cpu=is_cpu_build())
    context = options.context_length_tokens
    if is_cpu_build():
        if not options.slots and not has_cxx():  # without LoRA vLLM compiles the model, for which torch needs one
            flags["enforce-eager"] = ""
        flags["kv-cache-memory-bytes"] = str(options.kv_cache_bytes)
        context = context or min(int(config["max_position_embeddings"]), CPU_CONTEXT_LIMIT_TOKENS)
    if context:
        flags["max-model-len"] = str(context)
    return {**flags, "dtype": dtype}


def build_env(options: EngineOptions, inherited: Mapping[str, str]) -> dict[str, str]:
    """The child's environment: the parent's less secrets and switches that open vLLM, plus ours; or ConfigInvalid."""
    taken = sorted(set(options.env) & {*FORCED_ENV, *REMOVED_ENV})
    if taken:
        raise ConfigInvalid(f"{', '.join(taken)} cannot be set for the engine: it is ours.", param="env")
    kept = {name: value for name, value in inherited.items() if name not in REMOVED_ENV}
    return {**DEFAULT_ENV, **kept, **options.env, **FORCED_ENV}


def check_extra_args(arguments: Iterable[str]) -> set[str]:
    """The names of the flags among a user's vLLM arguments; raises ConfigInvalid with every one that is ours."""
    names = [flag_name(argument) for argument in arguments if argument.startswith("-") and len(argument) > 1]
    refused = {name: advice for name in names if (advice := _advice(name)) is not None}
    if refused:
        listed = "; ".join(f"--{name} ({advice})" for name, advice in refused.items())
        raise ConfigInvalid(f"These vLLM flags are not passed through: {listed}.", param="extra_args")
    return set(names)


def flag_name(argument: str) -> str:
    """`--Max_Loras=3`, `--max-loras.x` and `-asc` as the name that vLLM's parser takes them for."""
    flag = argument.partition("=")[0]
    if flag in OWN_SHORT_FLAGS:
        return OWN_SHORT_FLAGS[flag]
    return flag.lstrip("-").partition(".")[0].replace("_", "-").lower()


def advice_for(name: str) -> str | None:
    """What to do instead of setting the flag of this whole name; None for one that passes through."""
    prefixed = (advice for prefix, advice in OWN_PREFIXES.items() if name.startswith(prefix))
    return OWN_FLAGS.get(name) or next(prefixed, None)


def _advice(name: str) -> str | None:
    if name in PASSED:
        return None
    # argparse takes a unique abbreviation for the flag itself.
    matches = [flag for flag in OWN_FLAGS if flag == name or (len(name) > 2 and flag.startswith(name))]
    return OWN_FLAGS[min(matches, key=len)] if matches else advice_for(name)


def lora_rank(max_rank: int) -> int:
    """The smallest --max-lora-rank that holds `max_rank`; raises ConfigInvalid."""
    for rank in LORA_RANKS:
        if rank >= max_rank:
            return rank
    raise ConfigInvalid(f"The largest rank is {max_rank}; vLLM serves at most {LORA_RANKS[-1]}.", param="max_rank")


def resolve_dtype(
    asked: str, config: Mapping[str, Any], *, is_cpu: bool, cpu_flags: frozenset[str] | None = None
) -> str:
    """The dtype to serve in. On a CPU `auto` is not vLLM's own, which makes 16 bits of a float32 checkpoint."""
    if asked != "auto" or not is_cpu:
        return asked
    stored = stored_dtype(config) or "bfloat16"
    flags = processor_flags() if cpu_flags is None else cpu_flags
    has_bf16_units = bool(flags & {"avx512_bf16", "amx_bf16"})
    return "bfloat16" if stored != "float32" and has_bf16_units else "float32"


@cache
def processor_flags() -> frozenset[str]:
    """What the processor can do, in the kernel's words; none where that is not told."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def has_cxx() -> bool:
    """Whether there is a C++ compiler, as torch looks for one."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++"))


@cache
def is_cpu_build() -> bool:
    """Whether the vLLM that is installed is its CPU build."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return _vllm_version().endswith("cpu")
    return True


def _vllm_version() -> str:
    try:
        return version("vllm")
    except PackageNotFoundError:
        return ""
