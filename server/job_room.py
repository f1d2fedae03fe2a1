"""The part of a GPU that the engine leaves to fine-tuning jobs."""

from __future__ import annotations

from adapters.errors import ConfigInvalid
from server.machine import Machine, open_gpus, read_machine
from server.memory_flags import FRACTION, MEMORY_FRACTION, given_flags
from server.room import size

FLAG = "gpu-memory-utilization"


def with_reserve(flags: tuple[str, ...], reserve_bytes: int | None) -> tuple[str, ...]:
    """The engine's flags, by which it leaves so many bytes of a GPU; as they are on a CPU and without a reserve.

    Raises ConfigInvalid where there is not so much.
    """
    from server.engine.vllm_flags import is_cpu_build

    if reserve_bytes is None or is_cpu_build():
        return flags
    return reserved(flags, reserve_bytes, read_machine(open_gpus()))


def reserved(flags: tuple[str, ...], reserve_bytes: int, machine: Machine) -> tuple[str, ...]:
    """As `with_reserve`, on this machine. What the engine may take is lowered by the reserve, whoever has set it."""
    total = machine.gpu_bytes
    if total is None:
        raise ConfigInvalid(
            f"job_gpu_memory_bytes is {reserve_bytes}, and no GPU's memory is known here: leave it out, or set the "
            f"engine's --{FLAG} yourself.",
            param="job_gpu_memory_bytes",
        )
    given = given_flags(flags).get(FLAG, str(MEMORY_FRACTION)) if flags else str(MEMORY_FRACTION)
    if not FRACTION.fullmatch(given):
        raise ConfigInvalid(
            f"job_gpu_memory_bytes is set, and what --{FLAG} says cannot be read: write the flag out, as --{FLAG}=0.9.",
            param="job_gpu_memory_bytes",
        )
    share = float(given)
    left = share - reserve_bytes / total
    if left <= 0:
        raise ConfigInvalid(
            f"job_gpu_memory_bytes is {reserve_bytes} ({size(reserve_bytes)}), and the engine may take {share:.0%} of "
            f"a GPU's {size(total)}: nothing would be left to serve with. Lower it.",
            param="job_gpu_memory_bytes",
        )
    return (*flags, f"--{FLAG}={left:.4f}")
