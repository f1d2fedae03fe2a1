"""The worker extension (`--worker-extension-cls`): what only a worker process knows about its slots and memory."""

from __future__ import annotations

from typing import Any


class HotshoeWorker:
    """Mixed into vLLM's worker class; called by name through `collective_rpc`, between two steps of the engine."""

    model_runner: Any

    def hotshoe_report(self) -> dict[str, Any]:
        """Ids in slots, and the bytes that slots and the KV cache take in this worker."""
        manager = self.model_runner.lora_manager._adapter_manager
        stacked = (
            tensor
            for module in manager.modules.values()
            for name in ("lora_a_stacked", "lora_b_stacked")
            for tensor in getattr(module, name, ())
        )
        packed = sum(getattr(wrapper, "packed_bytes", 0) for wrapper in manager.punica_wrapper_mapping.values())
        caches = getattr(self.model_runner, "kv_caches", ())
        return {
            "slots": [number for number in manager.lora_index_to_id if number is not None],
            "slot_bytes": sum(tensor.nbytes for tensor in stacked) + packed,
            "kv_cache_bytes": sum(cache.nbytes for cache in caches),
        }
