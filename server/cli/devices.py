"""Devices by name for `hotshoe size`: GPUs with the memory that CUDA finds on them, sizes as 24GB, this machine.

A card has less than its label says: the driver and error correction take a part. Figures are what torch's messages of a
full GPU say of these cards ("total capacity of 23.64 GiB"), recalled, and differ by a percent between drivers. A size
that is given (`24GB`, `24GiB`) is taken as it is.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import replace

from adapters.errors import ConfigInvalid
from server.machine import open_gpus, read_machine
from server.sizing.parts import Device
from server.vllm_plugin.kernel_build import is_kernel_there

GIB = 2**30
AUTO, CPU = "auto", "cpu"
SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B", re.IGNORECASE)
POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}

# Beside those that `hotshoe plan` knows: key -> name, memory in GiB.
MORE = {
    "v100": ("NVIDIA V100 16 GB", 15.7),
    "v100-32gb": ("NVIDIA V100 32 GB", 31.7),
    "3090": ("NVIDIA RTX 3090", 23.6),
    "5090": ("NVIDIA RTX 5090", 31.3),
    "a6000": ("NVIDIA RTX A6000", 47.4),
    "a40": ("NVIDIA A40", 44.3),
    "l40": ("NVIDIA L40", 44.4),
    "l40s": ("NVIDIA L40S", 44.4),
    "a100-80gb": ("NVIDIA A100 80 GB", 79.1),
    "h200": ("NVIDIA H200", 139.7),
    "b200": ("NVIDIA B200", 178.3),
}
SAME = {"a100-40gb": "a100", "h100-80gb": "h100", "a10g": "a10", "v100-16gb": "v100", "t4-16gb": "t4", "l4-24gb": "l4"}


def bytes_of(param: str, text: str) -> int:
    """`24GB` is 24 x 10^9 bytes, `24GiB` 24 x 2^30; raises ConfigInvalid."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigInvalid(f"{param} is {text!r}: write a size as 24GB or 22.5GiB.", param=param)
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** POWERS[unit.upper()])


def find_device(text: str, count: int, reserved_bytes: int, main_bytes: int | None) -> Device:
    """The device of that name or size, `cpu`, or `auto` for this machine's; raises ConfigInvalid with the nearest."""
    device = _find(text.strip(), main_bytes)
    if device.is_cpu and count != 1:
        raise ConfigInvalid(f"gpus is {count} and the device is a CPU: leave --gpus out.", param="gpus")
    return replace(device, count=count, reserved_bytes=reserved_bytes)


def _find(text: str, main_bytes: int | None) -> Device:
    key = text.lower()
    if key in (AUTO, CPU):
        machine = read_machine(open_gpus() if key == AUTO else None)
        if machine.gpu_bytes is not None:
            return Device("this machine's GPU", machine.gpu_bytes, main_bytes=main_bytes or machine.main_bytes)
        if main_bytes is not None:
            return Device("a CPU", main_bytes, is_cpu=True, slots_are_pointers=True)
        return Device("this machine's CPU", machine.main_bytes, is_cpu=True, slots_are_pointers=is_kernel_there())
    if SIZE.fullmatch(text):
        return Device(f"a GPU of {text}", bytes_of("gpu", text), main_bytes=main_bytes)
    cards = known_cards()
    plain = re.sub(r"[ _]+", "-", key).removeprefix("nvidia-").removeprefix("geforce-").removeprefix("rtx").strip("-")
    plain = SAME.get(plain, plain)
    if plain not in cards:
        nearest = difflib.get_close_matches(plain, cards, n=3, cutoff=0.4) or list(cards)
        raise ConfigInvalid(
            f"gpu is {text!r}, which is not known; nearest: {', '.join(nearest)}. Give its memory as 24GB, or one of "
            f"{', '.join(cards)}, cpu and auto.",
            param="gpu",
        )
    name, memory_bytes = cards[plain]
    return Device(name, memory_bytes, main_bytes=main_bytes)


def known_cards() -> dict[str, tuple[str, int]]:
    """Every GPU by its key: name and bytes. Those that `hotshoe plan` knows have its figures."""
    from training.planner.machines import GPUS

    planned = {gpu.key: (gpu.name, gpu.memory_bytes) for gpu in GPUS}
    return planned | {key: (name, int(gib * GIB)) for key, (name, gib) in MORE.items()}
