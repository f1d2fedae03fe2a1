"""The one seam to an engine: an HTTP server on a Unix socket, plus five control calls.

The inference routes on the socket are OpenAI's, for the base and every loaded adapter; nobody re-implements them. An
engine name is `NAME@N` for the default tenant and `TENANT/NAME@N` for any other; a response's `model` is that name
without its tenant (`wire_name`). (engine name, path, engine id) is one triple for the life of the engine.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from adapters.types import DEFAULT_TENANT

RestartCallback = Callable[[], Awaitable[None]]
DEFAULT_SLOTS = 8  # where a slot takes memory
WEIGHT = "hotshoe_weight"  # in the `vllm_xargs` of a request: its share of the steps, where that is not 1


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine is started with. Whatever else vLLM has a flag for goes through `extra_args`."""

    base_folder: Path
    base_id: str  # what answers call the base; of a merged one, the version's engine name
    run_dir: Path  # the socket and the log lie here; made with mode 0700
    slots: int = DEFAULT_SLOTS  # adapters admitted into one batch; the engine has one more. 0: it runs without LoRA
    max_rank: int = 64
    staged_limit: int = 64  # adapters that may be loaded at a time, in a slot or beside the slots
    dtype: str = "auto"
    context_length_tokens: int | None = None  # None: the base's, at most 4,096 on a CPU
    kv_cache_bytes: int = 1 << 30  # on a CPU; zeroing it is part of the start
    start_timeout_seconds: float = 900.0
    takes_templates: bool = False  # a request may carry a chat template, which the engine then runs
    extra_args: tuple[str, ...] = ()
    log_path: Path | None = None  # None: run_dir/engine.log
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineAdapter:
    """One adapter version as an engine knows it. `path` holds canonical files that never change."""

    engine_name: str
    path: Path
    engine_id: int  # from 1


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    engine_name: str
    engine_id: int
    is_in_slot: bool  # else it is staged beside the slots, in main memory


@dataclass(frozen=True, slots=True)
class EngineUsage:
    """What the engine uses just now."""

    rss_bytes: int  # of all of its processes
    kv_cache_bytes: int
    kv_cache_used_fraction: float
    slot_bytes: int  # of all adapter slots together
    running: int  # requests in the batch
    waiting: int  # requests not yet in it
    packed_bytes: int = 0  # copies of what is in slots, without the unused rank; on a CPU where `is_staging` is false
    stage_bytes: int = 0  # of loaded adapters in main memory, those in slots among them
    is_staging: bool = False  # adapters come packed, and slots point at them: nothing of them is copied
    weights_bytes: int = 0
    kv_cache_tokens: int = 0  # that the KV cache holds
    lora_kernel: str | None = None  # what computes adapters on a CPU: "c (avx512)", or "torch (why)"; None on a GPU


@dataclass(frozen=True, slots=True)
class EngineCapacity:
    """What the engine can hold: fixed from its start to its end."""

    slots: int
    staged_limit: int
    max_rank: int
    dtype: str  # of activations and slots, e.g. "float32"
    context_length_tokens: int
    base_id: str
    engine_version: str  # e.g. "vllm 0.32.0"


class Engine(Protocol):
    """An engine process under supervision. Control calls raise EngineUnavailable while nobody answers on the socket."""

    socket_path: Path
    phases: Mapping[str, float]  # seconds of each part of the last start, in order

    async def start(self) -> None:
        """Return when the socket answers; raises EngineUnavailable with the reason, ConfigInvalid for bad options."""

    async def stop(self, grace_seconds: float) -> None:
        """Let running requests end within the grace, then end every process of the engine. May be called twice."""

    def is_ready(self) -> bool:
        """The process lives and answered. False within two seconds of its death."""

    def on_restart(self, callback: RestartCallback) -> None:
        """Call it each time a dead engine is back and answers, with no adapter in it: the caller loads them again."""

    async def load(self, adapter: EngineAdapter) -> None:
        """Load a triple; the same triple again is no error. A failed load burns the id. Raises Conflict when the name
        or id stands for another triple or the id is burnt, EngineBusy at the staged limit, EngineFailed when it fails.
        """

    async def unload(self, engine_name: str) -> None:
        """Forget the name and remove the weights; they are gone on return. Raises ModelNotFound for a name unknown."""

    async def loaded(self) -> list[LoadedAdapter]: ...

    async def usage(self) -> EngineUsage: ...

    async def capacity(self) -> EngineCapacity: ...


def engine_name(tenant: str, name: str, number: int) -> str:
    """The model name an engine knows a version by."""
    return f"{name}@{number}" if tenant == DEFAULT_TENANT else f"{tenant}/{name}@{number}"


def wire_name(engine_name: str) -> str:
    """The engine name without its tenant: what a response calls the model."""
    return engine_name.rpartition("/")[2]
