"""The vocabulary of a sizing: a part of memory with its basis and source, a device, and what traffic asks of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

GPU, MAIN = "gpu", "main"


class Basis(StrEnum):
    """How sure a figure is."""

    FORMULA = "formula"  # what is allocated, number for number
    ESTIMATE = "estimate"  # of published or own measurements, with a range


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one thing in one place: of one GPU, or of main memory. The range is the bytes alone for a formula."""

    name: str
    place: str
    bytes: int
    basis: Basis
    source: str
    low_bytes: int
    high_bytes: int


def formula(name: str, place: str, count: int, source: str) -> Part:
    return Part(name, place, count, Basis.FORMULA, source, count, count)


def estimate(name: str, place: str, low: float, middle: float, high: float, source: str) -> Part:
    return Part(name, place, int(middle), Basis.ESTIMATE, source, int(low), int(high))


@dataclass(frozen=True, slots=True)
class Device:
    """What the engine runs on. `memory_bytes` is one GPU's as CUDA tells it, or on a CPU the main memory."""

    name: str
    memory_bytes: int
    is_cpu: bool = False
    count: int = 1  # GPUs, over which every layer is divided (tensor parallel)
    reserved_bytes: int = 0  # that other processes hold, of each GPU or of the main memory
    main_bytes: int | None = None  # main memory beside GPUs; None is unknown
    slots_are_pointers: bool = False  # a CPU on which LoRA runs on the kernel

    @property
    def host_bytes(self) -> int | None:
        return self.memory_bytes if self.is_cpu else self.main_bytes


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is to be served. None is left to the sizing."""

    adapters: int | None = None
    rank: int | None = None
    context_tokens: int | None = None
    concurrency: int | None = None  # sequences of the whole context at a time
    max_num_seqs: int | None = None  # vLLM's --max-num-seqs


@dataclass(frozen=True, slots=True)
class Form:
    """In which numbers a base is served: bytes of an activation and a slot, of the KV cache, how weights are kept."""

    dtype: str
    dtype_bytes: int
    kv_bytes: int
    quantization: str | None = None
    group_size: int = 128  # weights that share a scale, in AWQ and GPTQ
    bits: int = 4  # of a weight, in AWQ and GPTQ
