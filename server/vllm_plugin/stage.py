"""An adapter made ready for the kernel outside the engine's loop: read, converted, packed, in memory to be mapped.

It runs in the API process, on a thread of low priority. What comes of it is bytes in the kernel's layout and a list of
places in them, so that the engine's worker has neither to read nor to copy: it maps the bytes and points at them
(staged.py). The numbers are vLLM's own, by its own code: the checkpoint in the LoRA dtype, B times the scaling.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from server.vllm_plugin.kernel import LINE, SlotImage, pack_matrices

T = TypeVar("T")
NICE = 15  # of the staging thread, beside the server's own: whoever decodes goes first
GROUP_LAYERS, GROUP_BYTES = (
    12,
    2 << 20,
)  # handed over between two steps: at most so many layers; after so many bytes none


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer that takes adapters: the modules that a checkpoint has for its slices, and their sizes."""

    name: str
    modules: tuple[str, ...]
    in_features: int
    sizes: tuple[int, ...]  # columns of the output, by slice


@dataclass(frozen=True, slots=True)
class Layout:
    """What an engine takes adapters with."""

    layers: tuple[Layer, ...]
    expected_modules: tuple[str, ...]  # last parts of names
    vocabulary: int
    max_positions: int | None


def read_layout(told: dict[str, Any]) -> Layout:
    """What `staged.layout_of` told, after its way through messages."""
    layers = (
        Layer(name, tuple(modules), in_features, tuple(sizes)) for name, modules, in_features, sizes in told["layers"]
    )
    return Layout(tuple(layers), tuple(told["expected_modules"]), told["vocabulary"], told["max_positions"])


Row = tuple[str, int, int, int, int, list[list[int]]]  # layer, first byte, bytes, dtype and columns of A, places of B


class Staged:
    """One adapter's bytes, kept until `close`: another process opens them at `path`."""

    def __init__(self, images: Sequence[tuple[str, SlotImage]], rank: int) -> None:
        self.rank = rank
        self.rows: list[Row] = []
        self.nbytes = 0
        for name, image in images:
            parts = [list(part) for part in image.parts]
            self.rows.append((name, self.nbytes, image.stream.nbytes, image.a_dtype, image.columns, parts))
            self.nbytes += -(-image.stream.nbytes // LINE) * LINE
        self._file = os.memfd_create("hotshoe-adapter")
        try:
            self._write(images)
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def close(self) -> None:
        """Let go of the bytes; who has mapped them keeps them."""
        os.close(self._file)

    def groups(self) -> Iterator[list[Row]]:
        """The rows in order, in pieces that one pause between two steps has room for."""
        return groups(self.rows)

    def _write(self, images: Sequence[tuple[str, SlotImage]]) -> None:
        if not self.nbytes:
            return
        os.posix_fallocate(self._file, 0, self.nbytes)  # a lack of memory is an error here, not a signal later
        with mmap.mmap(self._file, self.nbytes) as memory:
            for (_, image), row in zip(images, self.rows, strict=True):
                memory[row[1] : row[1] + row[2]] = image.stream.numpy().tobytes()


def groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """At most GROUP_LAYERS rows at a time, and none more after GROUP_BYTES of bytes."""
    group: list[Row] = []
    for row in rows:
        group.append(row)
        if len(group) == GROUP_LAYERS or sum(one[2] for one in group) >= GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group


def stage(path: Path, layout: Layout, lora_config: Any) -> Staged:
    """Read, check, convert and pack the adapter at `path`. Raises ValueError, OSError or what vLLM raises for it."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_local_dir(str(path), layout.max_positions)
    helper.validate_legal(lora_config)
    model = LoRAModel.from_local_checkpoint(
        str(path),
        set(layout.expected_modules),
        helper,
        lora_model_id=1,  # this object stays here
        device="cpu",
        dtype=lora_config.lora_dtype,
        model_vocab_size=layout.vocabulary,
    )
    if model.modules_to_save:
        raise ValueError(f"it replaces whole modules ({', '.join(model.modules_to_save)}), which are not served.")
    return Staged(list(packed(model.loras, layout, lora_config.max_lora_rank)), helper.r)


def packed(loras: dict[str, Any], layout: Layout, max_rank: int) -> Iterator[tuple[str, SlotImage]]:
    """Every layer that the adapter changes, with its image; takes the weights out of `loras` as it goes on."""
    for layer in layout.layers:
        pairs = [_pair(loras.pop(name, None), name) for name in layer.modules]
        for name, pair, size in zip(layer.modules, pairs, layer.sizes, strict=True):
            if pair is not None:
                _check_shapes(name, pair, layer.in_features, size, max_rank)
        image = pack_matrices(pairs, layer.sizes)
        if image is not None:
            yield layer.name, image
    if loras:
        raise ValueError(f"the model has no such modules: {', '.join(sorted(loras)[:5])} ({len(loras)} in all).")


def _pair(weights: Any, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    if weights is None:
        return None
    if weights.lora_a is None or weights.lora_b is None:
        raise ValueError(f"{name} has only one of lora_A and lora_B.")
    weights.optimize()  # B times the scaling
    return weights.lora_a, weights.lora_b


def _check_shapes(
    name: str, pair: tuple[torch.Tensor, torch.Tensor], in_features: int, size: int, max_rank: int
) -> None:
    a, b = (tuple(side.shape) for side in pair)
    rank = a[0] if a else 0
    if a != (rank, in_features) or b != (size, rank) or not 0 < rank <= max_rank:
        raise ValueError(
            f"{name} has A {a} and B {b}; the layer takes (r, {in_features}) and ({size}, r), r at most {max_rank}."
        )


class StagingThread:
    """One thread of low priority, on which torch keeps to that thread. Made when it is first used."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="staging", initializer=_lower)

    async def run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def _lower() -> None:
    """Linux keeps a nice value for each thread. Torch's number of threads is this thread's own once it was asked for
    here; what later threads would begin with is set back."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    reset = threading.Thread(target=torch.set_num_threads, args=(before,))
    reset.start()
    reset.join()
