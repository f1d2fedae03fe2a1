"""An adapter made ready for the kernel outside the engine's loop: read, converted, packed, in memory to be mapped.

It runs in the API process, on a thread that rests most of the time while answers are made (Pace). What comes of it is
bytes in the kernel's layout and a list of places in them, so that the engine's worker has neither to read nor to copy:
it maps the bytes and points at them (staged.py). The numbers are vLLM's own, by its own code: the checkpoint in the
LoRA dtype, B times the scaling.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch

from adapters.inspect import WEIGHTS_FILE
from server.vllm_plugin.kernel import LINE, SlotImage, pack_matrices

T = TypeVar("T")
SHARE = 0.1  # of the time that staging works while the engine makes answers
WORK_SECONDS = 0.0005  # at least so much between two rests
# Handed over between two steps: at most so many layers; after so many bytes none.
GROUP_LAYERS, GROUP_BYTES = 12, 2 << 20


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


class Pace:
    """Little rests between little pieces of work, so that a step of the engine beside it takes little longer.

    A lower priority would not do: while such a thread has Python's lock and no core, nothing in its process goes on,
    and every stream's tokens pass there.
    """

    def __init__(self, is_busy: Callable[[], bool] = lambda: False) -> None:
        self._is_busy = is_busy  # while the engine makes answers; else there is nobody to rest for
        self._rested_at = time.thread_time()

    def rest(self) -> None:
        """After a piece of work."""
        worked = time.thread_time() - self._rested_at
        if worked < WORK_SECONDS:
            return
        if self._is_busy():
            time.sleep(worked * (1 / SHARE - 1))
        self._rested_at = time.thread_time()


class Staged:
    """One adapter's bytes, kept until `close`: another process opens them at `path`."""

    def __init__(
        self, images: Sequence[tuple[str, SlotImage]], rank: int, rest: Callable[[], None] = lambda: None
    ) -> None:
        self.rank = rank
        self.rows: list[Row] = []
        self.nbytes = 0
        for name, image in images:
            parts = [list(part) for part in image.parts]
            self.rows.append((name, self.nbytes, image.stream.nbytes, image.a_dtype, image.columns, parts))
            self.nbytes += -(-image.stream.nbytes // LINE) * LINE
        self._file = os.memfd_create("hotshoe-adapter")
        try:
            self._write(images, rest)
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

    def _write(self, images: Sequence[tuple[str, SlotImage]], rest: Callable[[], None]) -> None:
        if not self.nbytes:
            return
        os.posix_fallocate(self._file, 0, self.nbytes)  # a lack of memory is an error here, not a signal later
        with mmap.mmap(self._file, self.nbytes) as memory:
            for (_, image), row in zip(images, self.rows, strict=True):
                memory[row[1] : row[1] + row[2]] = image.stream.numpy().tobytes()
                rest()


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


def stage(path: Path, layout: Layout, lora_config: Any, is_busy: Callable[[], bool] = lambda: False) -> Staged:
    """Read, check, convert and pack the adapter at `path`, at a pace while the engine `is_busy`. Raises ValueError,
    OSError or what vLLM raises for it."""
    from vllm.lora.peft_helper import PEFTHelper

    rest = Pace(is_busy).rest
    helper = PEFTHelper.from_local_dir(str(path), layout.max_positions)
    helper.validate_legal(lora_config)
    loras = read(path, layout, helper, lora_config.lora_dtype, rest)
    return Staged(list(packed(loras, layout, lora_config.max_lora_rank, rest)), helper.r, rest)


def read(path: Path, layout: Layout, helper: Any, dtype: torch.dtype, rest: Callable[[], None]) -> dict[str, Any]:
    """vLLM's weights of every module, by its own converter, one module at a time."""
    from safetensors import SafetensorError, safe_open
    from vllm.lora.lora_model import LoRAModel

    found: dict[str, Any] = {}
    try:
        with safe_open(path / WEIGHTS_FILE, framework="pt") as file:
            for _, names in groupby(sorted(file.keys()), key=_module_of):
                model = LoRAModel.from_lora_tensors(
                    lora_model_id=1,  # this object stays here
                    tensors={name: file.get_tensor(name) for name in names},
                    peft_helper=helper,
                    device="cpu",
                    dtype=dtype,
                    model_vocab_size=layout.vocabulary,
                )
                if model.modules_to_save:
                    words = ", ".join(model.modules_to_save)
                    raise ValueError(f"it replaces whole modules ({words}), which are not served.")
                found |= model.loras
                rest()
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS_FILE} cannot be read: {error}") from error
    return found


def _module_of(name: str) -> str:
    return name.rpartition(".lora_")[0] or name


def packed(
    loras: dict[str, Any], layout: Layout, max_rank: int, rest: Callable[[], None] = lambda: None
) -> Iterator[tuple[str, SlotImage]]:
    """Every layer that the adapter changes, with its image; takes the weights out of `loras` as it goes on."""
    for layer in layout.layers:
        pairs = [_pair(loras.pop(name, None), name) for name in layer.modules]
        for name, pair, size in zip(layer.modules, pairs, layer.sizes, strict=True):
            if pair is not None:
                _check_shapes(name, pair, layer.in_features, size, max_rank)
        image = pack_matrices(pairs, layer.sizes)
        if image is not None:
            yield layer.name, image
        rest()
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
    """One thread, on which torch keeps to that thread. Made when it is first used."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="staging", initializer=_alone)

    async def run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def _alone() -> None:
    """Torch's number of threads is this thread's own once it was asked for here; what later threads would begin with
    is set back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    reset = threading.Thread(target=torch.set_num_threads, args=(before,))
    reset.start()
    reset.join()
