"""One choice of slots, rank and context on a device: every part of its memory, and what the KV cache then holds.

On a GPU vLLM gives the KV cache what its share of the GPU leaves. On a CPU the KV cache is a setting, taken here as
what the traffic needs, and all parts together must fit the main memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from server.memory import Layout, MemoryPlan, plan_sizes
from server.memory_flags import CPU_BLOCK_TOKENS, GPU_BLOCK_TOKENS
from server.sizing.overheads import activations, beside_share, default_batch, within_share
from server.sizing.parts import GPU, MAIN, Basis, Device, Form, Part, formula
from server.sizing.weights import served_weights_bytes

LEAST_CPU_CACHE_BYTES = 16 * 2**20  # that HOTSHOE_KV_CACHE_BYTES takes
WEIGHTS = "numbers x bytes, from config.json (server/sizing/weights.py)"
SLOTS = "(slots + 1) x rank x (in + out) of the seven projections (create_lora_weights in vllm/lora/layers)"
POINTERS = "each is a pointer at a staged adapter (server/vllm_plugin/cpu_lora.py)"
STAGED = "adapters x rank x (in + out), for each GPU's worker (vllm/lora/lora_weights.py)"
CACHE = "blocks x 2 x layers x key-value heads x head size x bytes (FullAttentionSpec in vllm/v1)"


@dataclass(frozen=True)
class Chosen:
    """What an engine would be started with."""

    slots: int
    max_rank: int  # one that vLLM takes
    context_tokens: int
    staged: int
    staged_rank: int  # of the adapters that are staged
    sequences: int  # of the whole context, whose cache there must be
    memory_fraction: float = 1.0  # of a GPU
    max_num_seqs: int | None = None


@dataclass(frozen=True)
class Placed:
    """A choice on a device. Bytes are of each GPU, or of the main memory on a CPU; those of staged adapters always of
    main memory."""

    config: Mapping[str, Any]
    form: Form
    device: Device
    chosen: Chosen

    @cached_property
    def plan(self) -> MemoryPlan:
        """The exact part by the arithmetic that a start of the server prints, over all GPUs. Raises ConfigInvalid."""
        chosen, form, device = self.chosen, self.form, self.device
        layout = Layout(
            is_cpu=device.is_cpu,
            max_loras=chosen.slots + 1,
            max_rank=chosen.max_rank,
            staged_limit=max(chosen.staged, chosen.slots + 1),
            dtype_bytes=form.dtype_bytes,
            lora_bytes=form.dtype_bytes,
            kv_bytes=form.kv_bytes,
            context_tokens=chosen.context_tokens,
            block_tokens=CPU_BLOCK_TOKENS if device.is_cpu else GPU_BLOCK_TOKENS,
            tensor_parallel=device.count,
            slots_are_pointers=device.slots_are_pointers,
        )
        weights = served_weights_bytes(self.config, form, is_cpu=device.is_cpu, split=device.count)
        return plan_sizes(layout, self.config, weights * device.count)

    @property
    def block_tokens(self) -> int:
        return known(self.plan.layout.block_tokens)

    @property
    def block_bytes(self) -> int:
        return known(self.plan.block_bytes) // self.device.count

    @property
    def slot_bytes(self) -> int:
        return known(self.plan.slot_bytes) // self.device.count

    @property
    def staged_adapter_bytes(self) -> int:
        """Main memory of one staged adapter, all workers together."""
        return self.chosen.staged_rank * known(self.plan.rank_bytes)

    @property
    def blocks_of_a_sequence(self) -> int:
        return -(-self.chosen.context_tokens // self.block_tokens)

    @cached_property
    def fixed(self) -> tuple[Part, ...]:
        """Every part of the device but the KV cache."""
        chosen, device = self.chosen, self.device
        place = MAIN if device.is_cpu else GPU
        batch = default_batch(device, chosen.max_num_seqs)
        parts = [
            formula("weights", place, known(self.plan.weights_bytes) // device.count, WEIGHTS),
            formula(
                "slots",
                place,
                known(self.plan.slots_bytes) // device.count,
                POINTERS if device.slots_are_pointers else SLOTS,
            ),
        ]
        if device.is_cpu:
            parts.append(formula("stage", MAIN, self.stage_bytes, STAGED))
        parts += [activations(self.config, self.form, device, batch, chosen.max_rank), *within_share(device, batch)]
        return (*parts, *beside_share(device))

    @property
    def stage_bytes(self) -> int:
        return self.chosen.staged * self.staged_adapter_bytes

    @property
    def share_bytes(self) -> int:
        """What there is for all parts: vLLM's share of a GPU and what lies beside it, or the main memory."""
        device = self.device
        if device.is_cpu:
            return device.memory_bytes - device.reserved_bytes
        beside = sum(part.bytes for part in beside_share(device))
        return int(device.memory_bytes * self.chosen.memory_fraction) + beside

    @property
    def left_bytes(self) -> int:
        """What the fixed parts leave for the KV cache; negative where they do not fit."""
        return self.share_bytes - sum(part.bytes for part in self.fixed)

    @property
    def needed_cache_bytes(self) -> int:
        """The KV cache of the sequences that there must be, and the block that vLLM keeps."""
        return (self.chosen.sequences * self.blocks_of_a_sequence + 1) * self.block_bytes

    @property
    def cache_bytes(self) -> int:
        """The KV cache that there is: on a GPU what is left, on a CPU what is needed; whole blocks."""
        if not self.device.is_cpu:
            return max(0, self.left_bytes) // self.block_bytes * self.block_bytes
        return -(-max(self.needed_cache_bytes, LEAST_CPU_CACHE_BYTES) // self.block_bytes) * self.block_bytes

    @property
    def fits(self) -> bool:
        """The parts and the KV cache of its sequences have room, and staged adapters in main memory where that is
        known."""
        device = self.device
        if not device.is_cpu and device.main_bytes is not None and self.stage_bytes > device.main_bytes:
            return False
        return self.left_bytes >= max(self.needed_cache_bytes, self.cache_bytes if device.is_cpu else 0)

    @property
    def cache_tokens(self) -> int:
        """Tokens in the KV cache, without the block that vLLM keeps."""
        return max(0, self.cache_bytes // self.block_bytes - 1) * self.block_tokens

    @property
    def sequences(self) -> int:
        """Sequences of the whole context that the KV cache holds at a time."""
        return self.cache_tokens // self.block_tokens // self.blocks_of_a_sequence

    @property
    def least_cache_bytes(self) -> int:
        """The KV cache with every estimate at its highest."""
        return max(0, self.cache_bytes - sum(part.high_bytes - part.bytes for part in self._in_share))

    @property
    def _in_share(self) -> list[Part]:
        """What comes off the KV cache: on a CPU nothing does."""
        beside = {part.name for part in beside_share(self.device)}
        return [] if self.device.is_cpu else [part for part in self.fixed if part.name not in beside]

    def parts(self) -> list[Part]:
        """Every part: the device's, the KV cache, and staged adapters in main memory."""
        is_cpu = self.device.is_cpu
        high = self.cache_bytes + sum(part.bytes - part.low_bytes for part in self._in_share)
        basis = Basis.FORMULA if is_cpu else Basis.ESTIMATE  # of what the estimates leave
        place = MAIN if is_cpu else GPU
        found = [*self.fixed, Part("kv_cache", place, self.cache_bytes, basis, CACHE, self.least_cache_bytes, high)]
        return found if is_cpu else [*found, formula("stage", MAIN, self.stage_bytes, STAGED)]


def known(count: int | None) -> int:
    """A size that a sizing always knows: its layout names every number, and its base has no sliding window."""
    if count is None:
        raise AssertionError
    return count
