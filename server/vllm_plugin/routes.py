"""The endpoint plugin: the control routes inside vLLM's HTTP server, and the model names that its answers carry."""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import Any

import psutil
from fastapi import FastAPI
from starlette.datastructures import State
from starlette.requests import Request
from vllm.engine.protocol import EngineClient
from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.version import __version__

from adapters.errors import EngineUnavailable
from server.engine.base import EngineAdapter, EngineCapacity, EngineUsage, wire_name
from server.engine.control import Control, attach
from server.vllm_plugin import not_finite
from server.vllm_plugin.stage import Layout, StagingThread, read_layout, stage

log = logging.getLogger("vllm.hotshoe")
PARTS = ("kv_cache_bytes", "packed_bytes", "slot_bytes", "stage_bytes", "weights_bytes")  # each worker's, summed


class ControlRoutes:
    """What `vllm.endpoint_plugins` names: attached to the app first, given the engine later."""

    name = "hotshoe_routes"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        attach(app, _control)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Needs an engine that runs a model; raises RuntimeError otherwise, which ends the start."""
        if engine_client is None:
            raise RuntimeError("hotshoe_routes needs an engine, and this server of vLLM has none.")
        name_by_wire_name(state.openai_serving_models)
        not_finite.install_in_server()
        state.hotshoe_control = Control(VllmWorker(engine_client, state))


def _control(request: Request) -> Control:
    control: Control = request.app.state.hotshoe_control
    return control


def name_by_wire_name(serving_models: Any) -> None:
    """Let responses, streamed or not, call a version by its name without the tenant, merged into the base or not."""
    given = serving_models.model_name

    def model_name(lora_request: LoRARequest | None = None) -> str:
        return wire_name(str(given(lora_request)))

    serving_models.model_name = model_name


class VllmWorker:
    """Loads and unloads through the engine client; asks the worker processes, through their extension, about slots."""

    def __init__(self, engine_client: EngineClient, state: State) -> None:
        self._engine: Any = engine_client
        self._state = state
        self._thread = StagingThread()
        self._layout: Layout | None = None
        self._is_layout_known = False

    async def add(self, adapter: EngineAdapter) -> None:
        """Staged beside the engine and handed over in pieces, where its worker takes that; else loaded by vLLM."""
        request = LoRARequest(lora_name=adapter.engine_name, lora_int_id=adapter.engine_id, lora_path=str(adapter.path))
        try:
            layout = await self._known_layout()
            if layout is not None:
                await self._hand_over(adapter, layout)
            elif not await self._engine.add_lora(request):
                raise RuntimeError("the engine did not take it")
        except EngineDeadError as error:
            raise EngineUnavailable("The engine died while it loaded an adapter.") from error
        except BaseException:
            # vLLM registers the id before it copies the weights: a half-loaded adapter must not keep its place.
            await self._engine.remove_lora(adapter.engine_id)
            raise
        self._state.openai_serving_models.lora_requests[adapter.engine_name] = request

    async def _known_layout(self) -> Layout | None:
        if not self._is_layout_known:
            told: list[dict[str, Any]] = await self._engine.collective_rpc("hotshoe_layout")
            why_not = told[0].get("why_not") if len(told) == 1 else f"there are {len(told)} workers"
            self._layout = read_layout(told[0]) if why_not is None else None
            self._is_layout_known = True
            log.info("Adapters are %s", "staged" if why_not is None else f"loaded by vLLM itself: {why_not}")
        return self._layout

    def _is_busy(self) -> bool:
        return bool(self._engine.get_num_unfinished_requests())

    async def _hand_over(self, adapter: EngineAdapter, layout: Layout) -> None:
        """Each call is worked off between two steps of the engine; until the last one the adapter is not there."""
        number, rpc = adapter.engine_id, self._engine.collective_rpc
        config = self._state.vllm_config.lora_config
        staged = await self._thread.run(lambda: stage(adapter.path, layout, config, self._is_busy))
        try:
            await rpc("hotshoe_stage_begin", args=(number, staged.path, staged.nbytes))
            for group in staged.groups():
                await rpc("hotshoe_stage_take", args=(number, group))
            await rpc("hotshoe_stage_commit", args=(number, staged.rank, len(staged.rows)))
        except EngineDeadError:
            raise
        except BaseException:
            await rpc("hotshoe_stage_drop", args=(number,))
            raise
        finally:
            staged.close()

    async def remove(self, adapter: EngineAdapter) -> None:
        self._state.openai_serving_models.lora_requests.pop(adapter.engine_name, None)
        try:
            await self._engine.remove_lora(adapter.engine_id)
            left = await self._engine.list_loras()
            if self._layout is not None:
                await self._engine.collective_rpc("hotshoe_tidy")
        except EngineDeadError as error:
            raise EngineUnavailable("The engine died while it unloaded an adapter.") from error
        if adapter.engine_id in left:
            raise RuntimeError(f"id {adapter.engine_id} is still in the engine")

    async def in_slots(self) -> set[int]:
        answers: list[dict[str, Any]] = await self._engine.collective_rpc("hotshoe_report")
        return set.intersection(*(set(answer["slots"]) for answer in answers))

    async def usage(self) -> EngineUsage:
        answers: list[dict[str, Any]] = await self._engine.collective_rpc("hotshoe_report")
        running, waiting, used = self._scheduler_stats()
        return EngineUsage(
            rss_bytes=rss_bytes(),
            kv_cache_used_fraction=used,
            running=running,
            waiting=waiting,
            lora_kernel=answers[0]["lora_kernel"],
            kv_cache_tokens=min(answer["kv_cache_tokens"] for answer in answers),
            is_staging=await self._known_layout() is not None,
            **{part: sum(answer[part] for answer in answers) for part in PARTS},
        )

    def capacity(self) -> EngineCapacity:
        config = self._state.vllm_config
        lora = config.lora_config  # None: the engine runs without LoRA and has room for no adapter
        return EngineCapacity(
            slots=lora.max_loras - 1 if lora else 0,
            staged_limit=lora.max_cpu_loras if lora else 0,
            max_rank=lora.max_lora_rank if lora else 0,
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            context_length_tokens=config.model_config.max_model_len,
            base_id=self._state.openai_serving_models.base_model_paths[0].name,
            engine_version=f"vllm {__version__}",
        )

    def _scheduler_stats(self) -> tuple[int, int, float]:
        """Running, waiting and the used fraction of the KV cache, from vLLM's own gauges."""
        from prometheus_client import REGISTRY

        found = {"vllm:num_requests_running": 0.0, "vllm:num_requests_waiting": 0.0, "vllm:kv_cache_usage_perc": 0.0}
        for metric in REGISTRY.collect():
            if metric.name in found:
                found[metric.name] = sum(sample.value for sample in metric.samples)
        running, waiting, used = found.values()
        return int(running), int(waiting), used


def rss_bytes() -> int:
    """Resident bytes of this process and of every process below it."""
    me = psutil.Process()
    total = 0
    for process in (me, *me.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total
