"""What this machine has: main memory, or the cgroup's limit where that is lower, and GPUs as NVML shows them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import structlog

log = structlog.get_logger("hotshoe.machine")
CGROUP_V2, CGROUP_V1 = ("memory.max", "sys/fs/cgroup"), ("memory.limit_in_bytes", "sys/fs/cgroup/memory")


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes that an engine can have. `gpu_bytes` is the largest GPU, None where NVML shows none."""

    main_bytes: int
    gpu_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class GpuUse:
    """Bytes used on GPUs, of what these GPUs have. In a container NVML may show foreign process ids: then it is all
    that is used, on every GPU there is."""

    used_bytes: int
    limit_bytes: int
    is_of_all_processes: bool = False


class Gpus:
    """The GPUs through NVML; `nvml` is the module pynvml, initialised. Its errors are answered with None."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml

    def largest_bytes(self) -> int | None:
        """Memory of the largest GPU: which ones the engine will take is CUDA's to say."""
        try:
            return max((self._memory(device).total for device in self._devices()), default=None)
        except self._nvml.NVMLError as error:
            log.warning("NVML does not say what memory the GPUs have", reason=str(error))
            return None

    def used_by(self, pids: Collection[int]) -> GpuUse | None:
        """What these processes use, on the GPUs that they are on."""
        try:
            found = [(self._memory(device), self._used_on(device, pids)) for device in self._devices()]
            ours = [(memory.total, used) for memory, used in found if used]
            if ours:
                return GpuUse(sum(used for _, used in ours), sum(total for total, _ in ours))
            used, total = sum(memory.used for memory, _ in found), sum(memory.total for memory, _ in found)
            return GpuUse(used, total, is_of_all_processes=True)
        except self._nvml.NVMLError as error:
            log.warning("NVML does not say what is used on the GPUs", reason=str(error))
            return None

    def _used_on(self, device: Any, pids: Collection[int]) -> int:
        processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(device)
        return sum(process.usedGpuMemory or 0 for process in processes if process.pid in pids)

    def _devices(self) -> Iterator[Any]:
        return (self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(self._nvml.nvmlDeviceGetCount()))

    def _memory(self, device: Any) -> Any:
        return self._nvml.nvmlDeviceGetMemoryInfo(device)


def open_gpus() -> Gpus | None:
    """The GPUs of this machine; None without NVIDIA's driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.warning("NVML cannot be used: GPU memory is unknown", reason=str(error))
        return None
    return Gpus(pynvml)


def read_machine(gpus: Gpus | None, root: Path = Path("/")) -> Machine:
    """What there is. `root` is where /proc and /sys are looked for."""
    limit = cgroup_limit_bytes(root)
    total = int(psutil.virtual_memory().total)
    return Machine(total if limit is None else min(total, limit), gpus.largest_bytes() if gpus else None)


def cgroup_limit_bytes(root: Path) -> int | None:
    """The lowest memory limit of this process's cgroup and those above it, of version 1 or 2; None without one."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    rows = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    return min((limit for _, controllers, path in rows for limit in _limits(root, controllers, path)), default=None)


def _limits(root: Path, controllers: str, path: str) -> Iterator[int]:
    """The limits along one line of /proc/self/cgroup, whose controllers are empty in version 2."""
    if controllers and "memory" not in controllers.split(","):
        return
    file, mount = CGROUP_V1 if controllers else CGROUP_V2
    top = root / mount
    own = top / path.lstrip("/")
    for folder in (own, *own.parents):
        try:
            text = (folder / file).read_text().strip()
        except OSError:
            text = ""
        if text.isdigit():
            yield int(text)
        if folder == top:
            return


def process_tree(pid: int) -> list[psutil.Process]:
    """A process and every one below it; none where it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def rss_of(processes: Collection[psutil.Process]) -> int:
    """Resident bytes of them all; what ended meanwhile counts nothing."""
    total = 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total
