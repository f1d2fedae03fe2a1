"""The machine that a plan is for: a GPU of the table or this machine's processor, and what it computes a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from training.machine import has_bfloat16, memory_bytes, own_device
from training.planner import machines
from training.planner.machines import AUTO, CONTEXT_BYTES, CPU, UTILISATION, Gpu
from training.planner.seconds import Rate

PROCESS_BYTES = 760_000_000  # of Python with its libraries on a CPU, measured 2026-11-29
LATER_BYTES = 130_000_000  # of these, what comes only after the data is read
ADAPTER_RUN_BYTES = 330_000_000  # more in runs with an adapter: measured, not explained
GPU_ERROR, CPU_ERROR = (0.10, 0.20), (0.10, 0.10)  # shares below and above a peak
SPREAD_OF_GPUS, SPREAD_OF_CPUS = 2.0, 1.5  # factors either way of a time that nothing has measured
REACHED_OF_PRODUCT = 0.6  # of a large matrix product's rate, a training step on a CPU reaches about that
SIDES, COPIED_BYTES, ROUNDS = {CPU: 768, "cuda": 8192}, 64_000_000, 5


@dataclass(frozen=True)
class Target:
    """What a plan needs to know of a machine. `workspace_bytes` is held beside what torch allocates."""

    key: str
    name: str
    device: str  # cpu or cuda
    memory_bytes: int
    workspace_bytes: int
    has_bfloat16: bool
    has_flash_attention: bool
    rates: dict[int, Rate]  # by bytes of a number
    error: tuple[float, float]  # of a peak, below and above
    status: str  # what stands behind the figures
    is_validated: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "name": self.name,
            "device": self.device,
            "memory_bytes": self.memory_bytes,
            "workspace_bytes": self.workspace_bytes,
            "has_bfloat16": self.has_bfloat16,
            "is_validated": self.is_validated,
            "status": self.status,
        }


def target_of(key: str, report: dict[str, Any] | None = None) -> Target:
    """The machine that `--gpu` names; `auto` is this machine's GPU, else its processor. Raises ConfigInvalid."""
    found = _own() if key.lower() == AUTO else _cpu() if key.lower() == CPU else _gpu(machines.find(key))
    if report is not None and report["machine"]["key"] == found.key:
        return _calibrated(found, report)
    return found


def _gpu(gpu: Gpu, figures: str = "data sheet") -> Target:
    flops = {4: gpu.float32_flops, 2: gpu.tensor_flops}
    said = f"{figures} x {UTILISATION} (assumed), unvalidated"
    rates = {size: Rate(UTILISATION * rate, gpu.bandwidth_bytes, SPREAD_OF_GPUS, said) for size, rate in flops.items()}
    return Target(
        gpu.key,
        gpu.name,
        "cuda",
        gpu.memory_bytes,
        CONTEXT_BYTES,
        gpu.has_bfloat16,
        gpu.has_flash_attention,
        rates,
        GPU_ERROR,
        "unvalidated: no calibration report of this GPU (hotshoe plan --calibrate REPORT on it makes one)",
    )


def _cpu() -> Target:
    import torch

    has_units, bandwidth = has_bfloat16(CPU), _copied_bytes_a_second()
    rates = {
        size: Rate(
            REACHED_OF_PRODUCT * _product_flops(dtype),
            bandwidth,
            SPREAD_OF_CPUS,
            f"matrix products measured just now x {REACHED_OF_PRODUCT}",
            seconds_a_layer=2e-3,
        )
        for size, dtype in ((4, torch.float32), *(((2, torch.bfloat16),) if has_units else ()))
    }
    return Target(
        CPU,
        f"this processor, {torch.get_num_threads()} threads",
        "cpu",
        memory_bytes(CPU),
        PROCESS_BYTES,
        has_units,
        False,
        rates,
        CPU_ERROR,
        "peak memory validated by real runs on two cores (docs/planning.md); time is not",
    )


def _own() -> Target:
    """This machine's GPU, or its processor where it has none."""
    import torch

    if own_device() == CPU:
        return _cpu()
    return of_device(torch.cuda.get_device_name(0), memory_bytes("cuda")) or _measured()


def of_device(name: str, memory: int) -> Target | None:
    """The GPU of the table that a device's name says, with the device's own memory; None where the table lacks it."""
    gpu = machines.called(name)
    return _gpu(replace(gpu, name=name, memory_bytes=memory)) if gpu is not None else None


def _measured() -> Target:
    """This machine's GPU by its own figures."""
    import torch

    name, has_units = torch.cuda.get_device_name(0), has_bfloat16("cuda")
    gpu = Gpu(
        key=name.lower().replace(" ", "-"),
        name=name,
        memory_bytes=memory_bytes("cuda"),
        bandwidth_bytes=_copied_bytes_a_second("cuda"),
        tensor_flops=_product_flops(torch.bfloat16 if has_units else torch.float16, "cuda"),
        float32_flops=_product_flops(torch.float32, "cuda"),
        has_bfloat16=has_units,
        has_flash_attention=torch.cuda.get_device_capability(0) >= (8, 0),
    )
    return _gpu(gpu, "matrix products measured just now")


def _calibrated(target: Target, report: dict[str, Any]) -> Target:
    """The target with what was measured on it in the place of what is assumed."""
    said = f"measured on {report['machine']['name']}, {report['date']}"
    rates = {}
    for size, rate in target.rates.items():
        measured = report["flops"].get(str(size))
        rates[size] = (
            rate
            if measured is None
            else Rate(measured, rate.bandwidth_bytes, report["spread"], said, seconds_a_layer=0.0)
        )
    low, high = target.error
    off = max((abs(ratio - 1) for ratio in report["peak_ratios"]), default=0.0)
    return replace(
        target,
        rates=rates,
        error=(max(low, off), max(high, off)),
        status=f"calibrated: {said}; peaks off by {100 * off:.0f}% at most in {len(report['peak_ratios'])} runs",
        is_validated=True,
    )


def _product_flops(dtype: Any, device: str = CPU) -> float:
    """Of a matrix product, which on a GPU has to be larger to fill it."""
    import torch

    side = SIDES[device]
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / _seconds(lambda: left @ right, device)


def _copied_bytes_a_second(device: str = CPU) -> float:
    """Read and written."""
    import torch

    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    goal = torch.empty_like(source)
    return 2 * COPIED_BYTES / _seconds(lambda: goal.copy_(source), device)


def _seconds(work: Callable[[], Any], device: str) -> float:
    """The median of some rounds after one that warms up."""
    import torch

    taken = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        if device != CPU:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return median(taken[1:])
