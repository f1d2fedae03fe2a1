"""The general plugin, run in every vLLM process: the grouped CPU LoRA path, and a life no longer than the parent's.

vLLM's own CPU operators (punica_cpu.py of 0.32) gather one copy of the LoRA weights per token and index them with -1
for rows of the base, which is the last slot: the base gets that adapter's update. Here rows are grouped once per
batch mapping by slot, and base rows are in no group: linear.py, which runs kernel.py's compiled form or grouped.py's.

Where linear layers run on the kernel alone, a slot is a pointer at a packed adapter, and vLLM's stacked weights are
hollow: shapes without memory. A staged adapter (staged.py) comes packed, and `set_lora` points at it; tensors that vLLM
sets are packed there. Else `set_lora` copies into the stacked weights, which are packed before the next use.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from server.engine.lifeline import die_with_parent
from server.vllm_plugin import compiled, eager, not_finite, startup, turns
from server.vllm_plugin.grouped import Group, group_rows, is_hollow, matrix
from server.vllm_plugin.kernel import KernelSlot, SlotImage, pack_slot
from server.vllm_plugin.linear import KernelUpdate, choose_update

CORE = "EngineCore"  # what vLLM calls the process of its scheduler


def register() -> None:
    """What `vllm.general_plugins` names. Idempotent, as vLLM asks: it may run more than once in a process."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        die_with_parent(parent.pid)
    if multiprocessing.current_process().name.startswith(CORE):
        not_finite.install_in_core()
        turns.install_in_core()
    install()


def install() -> None:
    """Have vLLM's CPU platform use the grouped path; nothing changes on another platform."""
    from vllm.platforms.cpu import CpuPlatform

    wrapper = f"{__name__}.{GroupedLoraWrapper.__name__}"
    CpuPlatform.get_punica_wrapper = classmethod(lambda cls: wrapper)
    if not hasattr(BaseLinearLayerWithLoRA, "hotshoe_reset_lora"):
        BaseLinearLayerWithLoRA.hotshoe_reset_lora = BaseLinearLayerWithLoRA.reset_lora
        BaseLinearLayerWithLoRA.reset_lora = _reset_lora
        BaseLinearLayerWithLoRA.set_mapping = _set_mapping(BaseLinearLayerWithLoRA.set_mapping)
        for layer_class in set(_with_subclasses(BaseLinearLayerWithLoRA)):  # some have two bases
            if "set_lora" in vars(layer_class):
                layer_class.set_lora = _set_lora(layer_class.set_lora)
            if "create_lora_weights" in vars(layer_class):
                layer_class.create_lora_weights = _create_lora_weights(layer_class.create_lora_weights)
    compiled.mend_loading()
    if compiled.is_wanted():
        compiled.install(CpuPlatform, BaseLinearLayerWithLoRA)
    eager.install(CpuPlatform)
    startup.install(CpuPlatform)


def _with_subclasses(found: Any) -> Iterator[Any]:
    yield found
    for below in found.__subclasses__():
        yield from _with_subclasses(below)


def _create_lora_weights(original: Callable[..., None]) -> Callable[..., None]:
    """vLLM's of one class of layers, with hollow weights on a CPU: whether others are needed its wrapper knows."""

    def create_lora_weights(layer: Any, max_loras: int, *rest: Any, **named: Any) -> None:
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            original(layer, max_loras, *rest, **named)
            return
        original(layer, 1, *rest, **named)  # of one slot, for shapes and dtypes
        for side in ("lora_a_stacked", "lora_b_stacked"):
            setattr(layer, side, tuple(_hollow(stacked, max_loras) for stacked in getattr(layer, side)))

    return create_lora_weights


def _set_mapping(original: Callable[..., None]) -> Callable[..., None]:
    """vLLM's, which gives a layer its wrapper; stacked weights that will be read get their memory then."""

    def set_mapping(layer: Any, punica_wrapper: Any) -> None:
        original(layer, punica_wrapper)
        if _kernel_of(layer) is None and is_hollow(layer.lora_a_stacked[0]):
            layer.lora_a_stacked, layer.lora_b_stacked = _filled(layer.lora_a_stacked), _filled(layer.lora_b_stacked)

    return set_mapping


def _hollow(stacked: torch.Tensor, slots: int) -> torch.Tensor:
    """(slots, ...) zeros of this dtype, which are all the same one."""
    return torch.zeros((), dtype=stacked.dtype).expand(slots, *stacked.shape[1:])


def _filled(stacked: tuple[torch.Tensor, ...], slots: int | None = None) -> tuple[torch.Tensor, ...]:
    """The same shapes, or those of so many slots, with memory."""
    shapes = ((slots or one.shape[0], *one.shape[1:]) for one in stacked)
    return tuple(torch.zeros(shape, dtype=one.dtype) for shape, one in zip(shapes, stacked, strict=True))


def _set_lora(original: Callable[..., None]) -> Callable[..., None]:
    """vLLM's `set_lora` of one class of layers, for tensors; a KernelSlot is put as it is."""

    def set_lora(layer: Any, index: int, lora_a: Any, lora_b: Any) -> None:
        kernel = _kernel_of(layer)
        if kernel is not None and is_hollow(layer.lora_a_stacked[0]):
            content = lora_a if isinstance(lora_a, KernelSlot) else _packed(layer, original, lora_a, lora_b)
            kernel.put(layer.lora_a_stacked, layer.lora_b_stacked, layer.output_slices, index, content)
            return
        original(layer, index, lora_a, lora_b)
        if isinstance(layer.punica_wrapper, GroupedLoraWrapper):
            layer.punica_wrapper.forget_slot(layer.lora_a_stacked, index)

    return set_lora


def _packed(layer: Any, original: Callable[..., None], lora_a: Any, lora_b: Any) -> SlotImage | None:
    """What vLLM's `set_lora` makes of tensors, written into one slot that the layer has for so long."""
    hollow = layer.lora_a_stacked, layer.lora_b_stacked
    layer.lora_a_stacked, layer.lora_b_stacked = (_filled(side, slots=1) for side in hollow)
    try:
        original(layer, 0, lora_a, lora_b)
        return pack_slot(layer.lora_a_stacked, layer.lora_b_stacked, 0, layer.output_slices)
    finally:
        layer.lora_a_stacked, layer.lora_b_stacked = hollow


def _reset_lora(layer: Any, index: int) -> None:
    """The slot has nothing in this layer now."""
    kernel = _kernel_of(layer)
    if kernel is not None and is_hollow(layer.lora_a_stacked[0]):
        kernel.put(layer.lora_a_stacked, layer.lora_b_stacked, layer.output_slices, index, None)
        return
    layer.hotshoe_reset_lora(index)
    if isinstance(layer.punica_wrapper, GroupedLoraWrapper):
        layer.punica_wrapper.forget_slot(layer.lora_a_stacked, index)


def _kernel_of(layer: Any) -> KernelUpdate | None:
    return layer.punica_wrapper.kernel if isinstance(layer.punica_wrapper, GroupedLoraWrapper) else None


class GroupedLoraWrapper(PunicaWrapperCPU):  # type: ignore[misc]  # vLLM is not type-checked here
    """vLLM's LoRA operators for one model on a CPU, by groups of rows. Shapes are those of PunicaWrapperBase."""

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self.linear = choose_update()
        lora_config = kwargs.get("lora_config")
        is_sharded = lora_config is not None and lora_config.fully_sharded_loras
        # Where linear layers run on the kernel alone, so that a slot is a pointer at a packed adapter.
        self.kernel = self.linear if isinstance(self.linear, KernelUpdate) and not is_sharded else None

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        slots = self.token_lora_indices.numpy()
        self.linear.begin(slots)
        self.is_prefill = mapping.is_prefill
        self.no_lora = not (slots >= 0).any()

    def forget_slot(self, lora_a_stacked: tuple[torch.Tensor, ...], slot: int) -> None:
        """The layer with these weights has other contents in `slot` now."""
        self.linear.forget(lora_a_stacked, slot)

    @property
    def packed_bytes(self) -> int:
        return self.linear.packed_bytes

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """y[rows of slot s] += scale * (x @ A_s^T) @ B_s^T, slice by slice; rows of the base stay as they are."""
        self.linear.add(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices)

    def add_shrink(
        self,
        y: tuple[torch.Tensor, ...] | torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """y[i][rows of slot s] = scale * x @ A_s[i]^T (fully sharded layers gather between shrink and expand)."""
        x = x.view(-1, x.shape[-1])
        for buffer, stacked in zip(y, lora_a_stacked, strict=True):
            for group, run in self._runs(self._token_groups()):
                a = matrix(stacked, group.slot).to(buffer.dtype)
                buffer[run] = scale * (x[run].to(buffer.dtype) @ a.t())

    def add_expand(
        self,
        y: torch.Tensor,
        x: tuple[torch.Tensor, ...] | torch.Tensor,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y[rows of slot s, slice i] += x[i] @ B_s[i]^T (or = where `add_inputs` is false)."""
        y = y.view(-1, y.shape[-1])
        offset = offset_start
        for buffer, stacked, size in zip(x, lora_b_stacked, output_slices, strict=True):
            for group, run in self._runs(self._token_groups()):
                b = matrix(stacked, group.slot)[:size].to(y.dtype)
                update = buffer[run].to(y.dtype) @ b.t()
                columns = slice(offset, offset + size)
                y[run, columns] = y[run, columns] + update if add_inputs else update
            offset += size

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """y[rows of slot s] += x @ B_s^T."""
        self.add_expand(y, (x,), (lora_b_stacked,), (y.shape[-1],), 0, add_inputs)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **kwargs: Any,
    ) -> None:
        """y[requests of slot s] += scale * (x @ A_s^T) @ B_s^T over the columns that B has (y may be padded)."""
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        for group, run in self._runs(group_rows(self.sampler_indices.numpy())):
            a, b = matrix(lora_a_stacked, group.slot).to(x.dtype), matrix(lora_b_stacked, group.slot).to(x.dtype)
            update = (scale * (x[run] @ a.t()) @ b.t()).to(y.dtype)
            columns = min(update.shape[1], y.shape[1])
            y[run, :columns] = y[run, :columns] + update[:, :columns]

    def _token_groups(self) -> tuple[Group, ...]:
        return group_rows(self.token_lora_indices.numpy())

    @staticmethod
    def _runs(groups: tuple[Group, ...]) -> list[tuple[Group, Any]]:
        """Every group with each of its runs, or with its rows: what may index a tensor's first dimension."""
        pairs: list[tuple[Group, Any]] = [(group, run) for group in groups for run in group.runs]
        return pairs + [(group, group.rows) for group in groups if group.rows is not None]
