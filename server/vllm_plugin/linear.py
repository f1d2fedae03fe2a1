"""The update of a linear layer, in two forms: on the compiled kernel, or in plain torch, which is the reference for it.

Both compute y[rows of slot s] += scale * (x @ A_s^T) @ B_s^T, slice by slice, for the batch that `begin` has named, and
keep a packed copy of every slot that they have used.
"""

from __future__ import annotations

import logging
import os
from typing import Protocol

import numpy as np
import torch

from server.engine.vllm_flags import processor_flags
from server.vllm_plugin.grouped import Group, Packed, group_rows, pack
from server.vllm_plugin.kernel import Kernel, KernelBatch, KernelLayer, KernelSlot, SlotImage, apply
from server.vllm_plugin.kernel_build import SWITCH, KernelUnavailable, best_level, built_kernel

Weights = tuple[torch.Tensor, ...]  # A: (slots, 1, max_rank, in_features) each; B: (slots, 1, its columns, max_rank)

log = logging.getLogger("vllm.hotshoe")  # below vLLM's own, so that it is in the engine's log


class LinearUpdate(Protocol):
    """What the wrapper asks of either form."""

    description: str  # for the log and the worker's report

    @property
    def packed_bytes(self) -> int: ...

    def begin(self, slots: np.ndarray) -> None:
        """The next calls are for this batch: (num_rows,), the slot of each row, -1 for one of the base."""

    def add(
        self, y: torch.Tensor, x: torch.Tensor, lora_a: Weights, lora_b: Weights, scale: float, sizes: tuple[int, ...]
    ) -> None:
        """Update y (num_rows, sum of `sizes`) in place; x is (num_rows, in_features), both of one dtype."""

    def forget(self, lora_a: Weights, slot: int) -> None:
        """The layer with these weights has other contents in `slot` now."""


class KernelUpdate:
    """On the compiled kernel."""

    def __init__(self, kernel: Kernel, level: str) -> None:
        self.description = f"c ({level}{'' if kernel.is_threaded else ', one thread'})"
        self._kernel = kernel
        self._layers: dict[int, tuple[Weights, KernelLayer]] = {}  # by the id of the tuple, which is kept and so stays
        self._batch = KernelBatch(np.zeros(0, dtype=np.int64))
        self._threads = 1

    @property
    def packed_bytes(self) -> int:
        return sum(layer.nbytes for _, layer in self._layers.values())

    def begin(self, slots: np.ndarray) -> None:
        self._batch = KernelBatch(slots)
        self._threads = torch.get_num_threads()

    def add(
        self, y: torch.Tensor, x: torch.Tensor, lora_a: Weights, lora_b: Weights, scale: float, sizes: tuple[int, ...]
    ) -> None:
        if self._batch.is_empty:
            return
        apply(self._kernel, self._layer(lora_a, lora_b, sizes), self._batch, y, x, self._threads, scale)

    def forget(self, lora_a: Weights, slot: int) -> None:
        if known := self._layers.get(id(lora_a)):  # one that was not used yet looks at every slot then
            known[1].stale.add(slot)

    def put(
        self,
        lora_a: Weights,
        lora_b: Weights,
        sizes: tuple[int, ...],
        slot: int,
        content: KernelSlot | SlotImage | None,
    ) -> None:
        """The layer with these weights, which have no memory, has this in `slot` now."""
        self._layer(lora_a, lora_b, sizes).put(slot, content)

    def clear(self, slot: int) -> None:
        """No layer has anything in `slot` now."""
        for _, layer in self._layers.values():
            layer.put(slot, None)

    def _layer(self, lora_a: Weights, lora_b: Weights, sizes: tuple[int, ...]) -> KernelLayer:
        known = self._layers.get(id(lora_a))
        if known is None:
            known = self._layers[id(lora_a)] = (lora_a, KernelLayer(lora_a, lora_b, sizes))
        return known[1]


class TorchUpdate:
    """In plain torch: one small product for all A of a group and one for each B."""

    def __init__(self, why: str) -> None:
        self.description = f"torch ({why})"
        self._groups: tuple[Group, ...] = ()
        self._packed: dict[int, dict[int, tuple[torch.dtype, Packed | None]]] = {}

    @property
    def packed_bytes(self) -> int:
        entries = (entry for layer in self._packed.values() for _, entry in layer.values())
        return sum(entry.nbytes for entry in entries if entry is not None)

    def begin(self, slots: np.ndarray) -> None:
        self._groups = group_rows(slots)

    def add(
        self, y: torch.Tensor, x: torch.Tensor, lora_a: Weights, lora_b: Weights, scale: float, sizes: tuple[int, ...]
    ) -> None:
        for group in self._groups:
            packed = self._pack(lora_a, lora_b, group.slot, sizes, x.dtype)
            if packed is None:
                continue
            if group.rows is not None:
                packed.apply_to_rows(y, x, group.rows, scale)
            for run in group.runs:
                packed.apply(y[run], x[run], scale)

    def forget(self, lora_a: Weights, slot: int) -> None:
        self._packed.get(lora_a[0].data_ptr(), {}).pop(slot, None)

    def _pack(
        self, lora_a: Weights, lora_b: Weights, slot: int, sizes: tuple[int, ...], dtype: torch.dtype
    ) -> Packed | None:
        layer = self._packed.setdefault(lora_a[0].data_ptr(), {})
        entry = layer.get(slot)
        if entry is None or entry[0] != dtype:
            entry = layer[slot] = (dtype, pack(lora_a, lora_b, slot, sizes, dtype))
        return entry[1]


def choose_update(asked: str | None = None) -> LinearUpdate:
    """The form that SWITCH names (`asked`, in its place), or the kernel where there is one; says which in the log.

    Raises KernelUnavailable where the kernel is asked for and cannot be had, ValueError for another word.
    """
    asked = asked if asked is not None else os.environ.get(SWITCH, "")
    if asked not in ("", "c", "torch"):
        raise ValueError(f"{SWITCH} is {asked!r}; it takes c or torch, or leave it unset.")
    update = TorchUpdate(f"{SWITCH}=torch") if asked == "torch" else _kernel_or_torch(is_asked=asked == "c")
    log.info("LoRA on this CPU: %s", update.description)
    return update


def _kernel_or_torch(*, is_asked: bool) -> LinearUpdate:
    level = best_level(processor_flags())
    try:
        return KernelUpdate(Kernel(built_kernel(level)), level.name)
    except (KernelUnavailable, OSError) as error:
        if is_asked:
            raise KernelUnavailable(f"{SWITCH}=c, but there is no kernel: {error}") from error
        log.warning("No LoRA kernel, so adapters run on torch's products, which are slower: %s", error)
        return TorchUpdate(f"no kernel: {error}")
