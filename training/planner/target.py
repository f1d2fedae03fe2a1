"""The machine that a plan is for: a GPU of the table or this machine's processor, and what it computes a second."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

from training.planner import machines
from training.planner.machines import AUTO, CONTEXT_BYTES, CPU, UTILISATION, Gpu
from training.planner.seconds import Rate

PROCESS_BYTES = 720_000_000  # of Python with torch, transformers and PEFT before a model is loaded, measured 2026-11-29
GPU_ERROR, CPU_ERROR = (0.10, 0.20), (0.10, 0.10)  # shares below and above a peak
SPREAD_OF_GPUS, SPREAD_OF_CPUS = 2.0, 1.5  # factors either way of a time that nothing has measured
REACHED_OF_PRODUCT = 0.6  # of a large matrix product's rate, a training step on a CPU reaches about that
SIDE, ROUNDS = 768, 5


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
    if key.lower() == AUTO:
        key = _own_gpu() or CPU
    found = _cpu() if key.lower() == CPU else _gpu(machines.find(key))
    if report is not None and report["machine"]["key"] == found.key:
        return _calibrated(found, report)
    return found


def _gpu(gpu: Gpu) -> Target:
    flops = {4: gpu.float32_flops, 2: gpu.tensor_flops}
    said = f"data sheet x {UTILISATION} (assumed), unvalidated"
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

    has_bfloat16 = any(torch.cpu.get_capabilities().get(key) for key in ("avx512_bf16", "amx_bf16"))
    bandwidth = _copied_bytes_a_second()
    rates = {
        size: Rate(
            REACHED_OF_PRODUCT * _product_flops(dtype),
            bandwidth,
            SPREAD_OF_CPUS,
            f"matrix products measured just now x {REACHED_OF_PRODUCT}",
            seconds_a_layer=2e-3,
        )
        for size, dtype in ((4, torch.float32), *(((2, torch.bfloat16),) if has_bfloat16 else ()))
    }
    return Target(
        CPU,
        f"this processor, {torch.get_num_threads()} threads",
        "cpu",
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        PROCESS_BYTES,
        has_bfloat16,
        False,
        rates,
        CPU_ERROR,
        "peak memory validated by real runs on two cores (docs/planning.md); time is not",
    )


def _own_gpu() -> str | None:
    """The table's key of this machine's GPU; None where there is none. A GPU that is not in the table is an error."""
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(0).lower()
    known = {gpu.key for gpu in machines.GPUS}
    return next((key for key in sorted(known, key=len, reverse=True) if key in name), name)


def _calibrated(target: Target, report: dict[str, Any]) -> Target:
    """The target with what was measured on it in the place of what is assumed."""
    said = f"measured on {report['machine']['name']}, {report['date']}"
    rates = {}
    for size, rate in target.rates.items():
        measured = report["flops"].get(str(size))
        rates[size] = (
            rate
            if measured is None
            else Rate(measured, rate.bandwidth_bytes, report["spread"], said, True, seconds_a_layer=0.0)
        )
    low, high = target.error
    off = max((abs(ratio - 1) for ratio in report["peak_ratios"]), default=0.0)
    return Target(
        **{
            **{name: getattr(target, name) for name in target.__dataclass_fields__},
            "rates": rates,
            "error": (max(low, off), max(high, off)),
            "status": f"calibrated: {said}; peaks off by {100 * off:.0f}% at most in {len(report['peak_ratios'])} runs",
            "is_validated": True,
        }
    )


def _product_flops(dtype: Any) -> float:
    import torch

    left, right = torch.ones(SIDE, SIDE, dtype=dtype), torch.ones(SIDE, SIDE, dtype=dtype)
    taken = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        left @ right
        taken.append(time.perf_counter() - started)
    return 2 * SIDE**3 / median(taken[1:])


def _copied_bytes_a_second(size: int = 64_000_000) -> float:
    import torch

    source = torch.zeros(size, dtype=torch.uint8)
    goal = torch.empty_like(source)
    taken = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        goal.copy_(source)
        taken.append(time.perf_counter() - started)
    return 2 * size / median(taken[1:])
