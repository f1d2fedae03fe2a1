"""Staged adapters in the engine's worker: bytes that another process has packed are mapped, and a slot points at them.

vLLM registers an adapter only when all of its layers are here (`Staging.commit`); until then it is in no table of
vLLM's, so that one which fails half-way leaves nothing behind. To vLLM it is one of its LoRAModels, whose layers have a
KernelSlot where others have tensors: `set_lora` of a layer (wrapped in cpu_lora.py) then sets a pointer and copies
nothing.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from server.vllm_plugin.kernel import KernelSlot

PAGE = mmap.PAGESIZE
SWITCH = "HOTSHOE_LORA_STAGE"  # 0: vLLM loads adapters itself; unset or 1: they are staged where that can be


@dataclass(eq=False)
class StagedLayer:
    """What vLLM takes for the weights of one layer: it hands both sides to the layer's `set_lora`."""

    lora_a: KernelSlot
    lora_b: None = None


@dataclass(eq=False)
class Arriving:
    """The mapped bytes of an adapter, and the layers of it that are here."""

    memory: np.ndarray  # (bytes,), uint8
    layers: dict[str, StagedLayer] = field(default_factory=dict)

    def take(self, rows: Sequence[Sequence[Any]]) -> None:
        """Some layers more: as `stage.Row` says. Their bytes are paged in."""
        start = self.memory.ctypes.data
        for name, first, size, a_dtype, columns, parts in rows:
            self.memory[first : first + size : PAGE].max()
            self.layers[name] = StagedLayer(KernelSlot(self.memory, start + first, a_dtype, columns, parts))


class Staging:
    """The adapters that arrive in one worker, by id."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._arriving: dict[int, Arriving] = {}
        self.tidy()  # a compiled model's first run leaves vLLM's own trial adapters in slots

    def begin(self, engine_id: int, path: str, nbytes: int) -> None:
        """Map the bytes at `path`. What came of an earlier try with this id is dropped."""
        self._arriving[engine_id] = Arriving(mapped(path, nbytes))

    def take(self, engine_id: int, rows: Sequence[Sequence[Any]]) -> None:
        self._arriving[engine_id].take(rows)

    def drop(self, engine_id: int) -> None:
        self._arriving.pop(engine_id, None)

    def commit(self, engine_id: int, rank: int, num_layers: int) -> None:
        """Have vLLM know the adapter, and give it a slot when one is free. Raises RuntimeError when a layer is missing,
        or when there is no room among the staged."""
        from vllm.lora.lora_model import LoRAModel

        arrived = self._arriving.pop(engine_id)
        if len(arrived.layers) != num_layers:
            raise RuntimeError(f"{len(arrived.layers)} of {num_layers} layers arrived")
        if len(self._manager) >= self._manager.capacity:
            raise RuntimeError(f"there are {self._manager.capacity} adapters, as many as may be staged")
        model = LoRAModel(engine_id, rank, arrived.layers)
        model.hotshoe_bytes = arrived.memory.nbytes
        self._manager._registered_adapters[engine_id] = model
        if None in self._manager.lora_index_to_id:
            self._manager.activate_adapter(engine_id)

    def tidy(self) -> None:
        """Let go of what is in slots that are nobody's: an adapter that was removed."""
        for wrapper in self._manager.punica_wrapper_mapping.values():
            for slot, owner in enumerate(self._manager.lora_index_to_id):
                if owner is None:
                    wrapper.kernel.clear(slot)


def mapped(path: str, nbytes: int) -> np.ndarray:
    """(nbytes,) of the file, to be read only; they stay when the file is closed or gone."""
    if not nbytes:
        return np.zeros(0, dtype=np.uint8)
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return np.frombuffer(mmap.mmap(file, nbytes, prot=mmap.PROT_READ), dtype=np.uint8)
    finally:
        os.close(file)


def is_wanted() -> bool:
    """Whether SWITCH leaves staging on; raises ValueError for another word than 0 and 1."""
    asked = os.environ.get(SWITCH, "1")
    if asked not in ("", "0", "1"):
        raise ValueError(f"{SWITCH} is {asked!r}; it takes 0 or 1.")
    return asked != "0"


class NotStaged(Exception):
    """Why adapters are loaded by vLLM alone here."""


def layout_of(runner: Any) -> dict[str, Any]:
    """What `stage.read_layout` reads, or `why_not` alone where adapters are loaded by vLLM alone: on a GPU, without the
    kernel, in one of several workers, and for a model whose layers are not each a row of plain slices."""
    if not hasattr(runner, "lora_manager"):
        return {"why_not": "the engine runs without LoRA"}
    try:
        return _layout_of(runner.lora_manager)
    except NotStaged as reason:
        return {"why_not": str(reason)}


def _layout_of(worker_manager: Any) -> dict[str, Any]:
    manager = worker_manager._adapter_manager
    if not is_wanted():
        raise NotStaged(f"{SWITCH}=0")
    if any(getattr(wrapper, "kernel", None) is None for wrapper in manager.punica_wrapper_mapping.values()):
        raise NotStaged("LoRA does not run on the CPU kernel alone")
    if manager._is_moe or manager.is_pooling_model:
        raise NotStaged("the model has experts, or makes no text")
    _check_names(manager.model)
    return {
        "layers": [_row(manager, name, module) for name, module in manager.modules.items()],
        "expected_modules": sorted(_expected(manager)),
        "vocabulary": worker_manager.vocab_size,
        "max_positions": worker_manager.max_position_embeddings,
    }


def _row(manager: Any, name: str, module: Any) -> list[Any]:
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    slices = manager.packed_modules.get(name, [name])
    if not isinstance(module, BaseLinearLayerWithLoRA):
        raise NotStaged(f"{name} is a {type(module).__name__}, not linear")
    if module.tp_size != 1 or len(slices) != module.n_slices:
        raise NotStaged(f"{name} has {len(slices)} modules for {module.n_slices} slices in {module.tp_size} workers")
    return [name, list(slices), module.lora_a_stacked[0].shape[-1], list(module.output_slices)]


def _expected(manager: Any) -> set[str]:
    """As `WorkerLoRAManager._load_adapter` has it."""
    packed = manager.packed_modules_mapping
    return {part for module in manager.supported_lora_modules for part in packed.get(module, [module])}


def _check_names(model: Any) -> None:
    """A checkpoint's names must be the model's: nothing renamed, nothing skipped."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    renamed = [name for name, given in vars(mapper.get_rename_mapper()).items() if given] if mapper is not None else []
    if renamed or getattr(model, "lora_skip_prefixes", None):
        raise NotStaged(f"the model has other names for modules than a checkpoint ({', '.join(renamed)})")
