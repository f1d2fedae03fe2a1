"""What this machine has for a run: its device, bfloat16 units and memory."""

from __future__ import annotations

import os

BFLOAT16_UNITS = ("avx512_bf16", "amx_bf16")


def own_device() -> str:
    """`cuda` where torch finds a GPU, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def has_bfloat16(device: str) -> bool:
    """Whether the device computes in bfloat16 itself; a GPU before Ampere, such as a T4, only imitates it."""
    import torch

    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities()
    return any(found.get(unit) for unit in BFLOAT16_UNITS)


def memory_bytes(device: str) -> int:
    """The first GPU's memory, or this machine's."""
    import torch

    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
