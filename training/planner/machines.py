"""GPUs that a plan can be made for, and prices: figures of the vendors' data sheets, and prices with date and source.

`tensor_flops` are dense 16-bit rates of the data sheets, `float32_flops` those outside of tensor cores. What a run
reaches of them is `UTILISATION`, an assumption until a calibration report of that GPU says better.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, dataclass
from typing import Any

from adapters.errors import ConfigInvalid

GIB = 2**30
UTILISATION = 0.35  # of the rate in the data sheet; torchtune's published 8B runs on a 4090 come to about 0.5
CONTEXT_BYTES = 700 * 2**20  # CUDA's context, cuBLAS' and cuDNN's workspaces: judged, not measured
AUTO, CPU = "auto", "cpu"


@dataclass(frozen=True)
class Gpu:
    """One GPU. `memory_bytes` is what a program finds free on an empty one, less than its label says."""

    key: str
    name: str
    memory_bytes: int
    bandwidth_bytes: float  # a second
    tensor_flops: float
    float32_flops: float
    has_bfloat16: bool
    has_flash_attention: bool  # FlashAttention-2 wants compute capability 8.0


GPUS = (
    Gpu("t4", "NVIDIA T4 (Colab, g4dn)", int(14.56 * GIB), 320e9, 65e12, 8.1e12, False, False),
    Gpu("a10", "NVIDIA A10G (g5)", int(22.0 * GIB), 600e9, 70e12, 31.5e12, True, True),
    Gpu("l4", "NVIDIA L4 (g6)", int(22.0 * GIB), 300e9, 121e12, 30.3e12, True, True),
    Gpu("4090", "NVIDIA RTX 4090", int(23.5 * GIB), 1008e9, 165e12, 82.6e12, True, True),
    Gpu("a100", "NVIDIA A100 40 GB", int(39.4 * GIB), 1555e9, 312e12, 19.5e12, True, True),
    Gpu("h100", "NVIDIA H100 SXM 80 GB", int(79.1 * GIB), 3350e9, 989e12, 67e12, True, True),
)

ALIASES = {"a10g": "a10", "g4dn": "t4", "g5": "a10", "g6": "l4"}
LESSER = frozenset({"laptop", "mig"})  # with the name of a whole card, a smaller chip or a part of one


@dataclass(frozen=True)
class Price:
    """What an hour costs, where, and where that stood when."""

    gpu: str
    dollars_per_hour: float
    where: str
    date: str
    source: str


PRICES = (
    Price("t4", 0.18, "Google Colab, 1.84 compute units an hour", "2024-04-23", "mccormickml.com, recalled, not read"),
    Price("t4", 0.526, "AWS g4dn.xlarge, us-east-1, on demand", "2025-01-01", "AWS list price, recalled, not read"),
    Price("a10", 1.006, "AWS g5.xlarge, us-east-1, on demand", "2026-06-17", "factualminds.com, EC2 pricing"),
)  # fmt: skip


def find(key: str) -> Gpu:
    """The GPU of that name; raises ConfigInvalid with the nearest names."""
    known = [gpu.key for gpu in GPUS]
    plain = key.lower().removeprefix("nvidia").strip(" -_").removeprefix("rtx").strip(" -_")
    plain = ALIASES.get(plain, plain)
    for gpu in GPUS:
        if gpu.key == plain:
            return gpu
    nearest = difflib.get_close_matches(plain, known, n=3, cutoff=0.3) or known
    raise ConfigInvalid(
        f"gpu is {key!r}, which is not known; nearest: {', '.join(nearest)}. "
        f"Known are {', '.join(known)}, auto and cpu.",
        param="gpu",
    )


def called(name: str) -> Gpu | None:
    """The GPU of the table that a device's own name says in whole words; an L40S is no L4."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    keys = {ALIASES.get(word, word) for word in words}
    return next((gpu for gpu in GPUS if gpu.key in keys), None) if not words & LESSER else None


def prices_of(gpu: str, own: float | None) -> list[dict[str, Any]]:
    """The prices to reckon with: the user's own, else the dated ones."""
    if own is not None:
        return [{"gpu": gpu, "dollars_per_hour": own, "where": "--price", "date": None, "source": "given"}]
    return [asdict(price) for price in PRICES if price.gpu == gpu]
