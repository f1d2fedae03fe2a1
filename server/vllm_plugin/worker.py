"""The worker extension (`--worker-extension-cls`): what only a worker process knows about its slots and memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from server.vllm_plugin import not_finite
from server.vllm_plugin.grouped import is_hollow
from server.vllm_plugin.staged import Staging, layout_of

WITHOUT_LORA = {"slots": [], "slot_bytes": 0, "packed_bytes": 0, "stage_bytes": 0, "lora_kernel": None}

not_finite.install_in_worker()  # vLLM imports this module where it makes a worker


class HotshoeWorker:
    """Mixed into vLLM's worker class; called by name through `collective_rpc`, between two steps of the engine."""

    model_runner: Any

    def hotshoe_report(self) -> dict[str, Any]:
        """Ids in slots, and the bytes that each part of this worker's memory takes."""
        if not hasattr(self.model_runner, "lora_manager"):
            return {**WITHOUT_LORA, **self._own_bytes()}
        manager = self.model_runner.lora_manager._adapter_manager
        wrappers = manager.punica_wrapper_mapping.values()
        return {
            "slots": [number for number in manager.lora_index_to_id if number is not None],
            "slot_bytes": sum(tensor.nbytes for tensor in slot_tensors(manager) if not is_hollow(tensor)),
            "lora_kernel": next(
                (wrapper.linear.description for wrapper in wrappers if hasattr(wrapper, "linear")), None
            ),
            "packed_bytes": sum(getattr(wrapper, "packed_bytes", 0) for wrapper in wrappers),
            "stage_bytes": staged_bytes(manager),
            **self._own_bytes(),
        }

    def _own_bytes(self) -> dict[str, int]:
        """What a worker takes whether or not it has room for adapters."""
        caches = getattr(self.model_runner, "kv_caches", ())
        return {
            "weights_bytes": weights_bytes(self.model_runner.get_model()),
            "kv_cache_bytes": sum(cache.nbytes for cache in caches),
            "kv_cache_tokens": cache_tokens(self.model_runner),
        }

    def hotshoe_layout(self) -> dict[str, Any]:
        """What an adapter is staged for; where vLLM loads them itself, why (staged.layout_of)."""
        return layout_of(self.model_runner)

    def hotshoe_stage_begin(self, engine_id: int, path: str, nbytes: int) -> None:
        """Map a staged adapter's bytes: the first of four steps (staged.Staging)."""
        self.hotshoe_staging.begin(engine_id, path, nbytes)

    def hotshoe_stage_take(self, engine_id: int, rows: Sequence[Sequence[Any]]) -> None:
        """Some layers of it more."""
        self.hotshoe_staging.take(engine_id, rows)

    def hotshoe_stage_commit(self, engine_id: int, rank: int, num_layers: int) -> None:
        """All are here: vLLM knows the adapter from now on."""
        self.hotshoe_staging.commit(engine_id, rank, num_layers)

    def hotshoe_stage_drop(self, engine_id: int) -> None:
        """It does not come after all."""
        self.hotshoe_staging.drop(engine_id)

    def hotshoe_tidy(self) -> None:
        """Let go of what removed adapters have left in slots."""
        self.hotshoe_staging.tidy()

    @cached_property
    def hotshoe_staging(self) -> Staging:
        return Staging(self.model_runner.lora_manager._adapter_manager)


def weights_bytes(model: Any) -> int:
    """The model's parameters, and on a CPU the matrices that vLLM has packed out of sight of torch.

    `dispatch_cpu_unquantized_gemm` of vLLM 0.32 gives such a layer `cpu_linear`, and leaves a linear one no weight.
    """
    total: int = sum(parameter.nbytes for parameter in model.parameters())
    for layer in model.modules():
        if "cpu_linear" in vars(layer):  # hasattr is also true of the layer that vLLM wraps around it for LoRA
            numbers = layer.weight.numel() or layer.input_size_per_partition * layer.output_size_per_partition
            total += numbers * layer.weight.element_size()
    return total


def cache_tokens(model_runner: Any) -> int:
    """Tokens that the KV cache holds: of its blocks, but for the one that vLLM keeps; 0 before there is one."""
    config = getattr(model_runner, "kv_cache_config", None)
    if config is None or not config.kv_cache_groups:
        return 0
    tokens: int = (config.num_blocks - 1) * config.kv_cache_groups[0].kv_cache_spec.block_size
    return tokens


def slot_tensors(manager: Any) -> Iterator[Any]:
    """What `create_lora_weights` made in every layer that takes adapters."""
    for module in manager.modules.values():
        yield from getattr(module, "lora_a_stacked", ())
        yield from getattr(module, "lora_b_stacked", ())


def staged_bytes(manager: Any) -> int:
    """Of the adapters in main memory: those that slots point at, and those that slots are filled from."""
    return sum(
        adapter.hotshoe_bytes
        if hasattr(adapter, "hotshoe_bytes")
        else sum(tensor.nbytes for tensor in adapter_tensors(adapter))
        for adapter in manager.list_adapters().values()
    )


def adapter_tensors(adapter: Any) -> Iterator[Any]:
    """An adapter as vLLM loads it; a packed layer has a list of tensors, with gaps."""
    for layer in adapter.loras.values():
        for side in (layer.lora_a, layer.lora_b):
            found = side if isinstance(side, list) else [side]
            yield from (tensor for tensor in found if tensor is not None)
