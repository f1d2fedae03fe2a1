"""What a machine has: cgroup limits of both versions, GPUs through NVML, resident bytes of a process tree."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pynvml
import pytest

from server.machine import Gpus, GpuUse, cgroup_limit_bytes, open_gpus, process_tree, read_machine, rss_of
from tests.fixtures.nvml import Nvml

MB = 1 << 20


def tree(root: Path, own: str, files: dict[str, str]) -> Path:
    """A root with /proc/self/cgroup and these files below it."""
    for name, text in {"proc/self/cgroup": own, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V1 = "11:cpu,cpuacct:/quick\n4:hugetlb,memory:/docker/abc\n0::/\n"
NO_LIMIT_V1 = "9223372036854771712\n"


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/pod/box\n", {"sys/fs/cgroup/pod/box/memory.max": "max\n"}, None),
        ("0::/pod/box\n", {"sys/fs/cgroup/pod/box/memory.max": "1000\n"}, 1000),
        ("0::/pod/box\n", {"sys/fs/cgroup/pod/memory.max": "500", "sys/fs/cgroup/pod/box/memory.max": "1000"}, 500),
        ("0::/\n", {"sys/fs/cgroup/memory.max": "700\n"}, 700),  # a container sees itself as the root
        ("0::/../other\n", {"sys/fs/cgroup/memory.max": "700\n"}, 700),
        (V1, {"sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "800\n"}, 800),
        (V1, {"sys/fs/cgroup/memory/memory.limit_in_bytes": "900\n"}, 900),  # the container's own mount
        (V1, {"sys/fs/cgroup/memory/quick/memory.limit_in_bytes": "1"}, None),  # another controller's path
        ("garbage\n", {}, None),
        ("", {}, None),
    ],
)
def test_the_lowest_limit_of_the_cgroups_above_counts(
    own: str, files: dict[str, str], limit: int | None, tmp_path: Path
) -> None:
    assert cgroup_limit_bytes(tree(tmp_path, own, files)) == limit


def test_main_memory_is_the_machines_or_its_cgroups_where_that_is_lower(tmp_path: Path) -> None:
    total = psutil.virtual_memory().total
    assert read_machine(None, tmp_path).main_bytes == total, "no /proc, no limit"
    limited = tree(tmp_path / "a", "0::/\n", {"sys/fs/cgroup/memory.max": str(64 * MB)})
    assert read_machine(None, limited).main_bytes == 64 * MB
    generous = tree(tmp_path / "b", V1, {"sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT_V1})
    assert read_machine(None, generous).main_bytes == total
    assert 0 < read_machine(None).main_bytes <= total


def test_the_stand_in_for_nvml_has_the_librarys_names_and_arguments() -> None:
    names = [name for name in vars(Nvml) if name.startswith("nvml")]
    assert len(names) == 4
    for name in names:
        theirs, ours = getattr(pynvml, name), getattr(Nvml([]), name)
        assert list(inspect.signature(theirs).parameters) == list(inspect.signature(ours).parameters), name
    told = {name for name, _ in pynvml.c_nvmlMemory_t._fields_} | {
        name for name, _ in pynvml.c_nvmlProcessInfo_t._fields_
    }
    assert {"total", "used", "pid", "usedGpuMemory"} <= told


def test_gpus_say_what_the_largest_has_and_what_our_processes_use() -> None:
    gpus = Gpus(Nvml([(24_000, 9_000, {11: 5_000, 12: 3_000}), (80_000, 700, {12: 400, 13: None})]))
    assert gpus.largest_bytes() == 80_000
    assert gpus.used_by({11, 12, 99}) == GpuUse(5_000 + 3_000 + 400, 24_000 + 80_000)
    assert gpus.used_by({11}) == GpuUse(5_000, 24_000), "of the GPUs that it is on"
    assert gpus.used_by({13, 99}) == GpuUse(9_700, 104_000, is_of_all_processes=True), "foreign process ids"
    assert read_machine(gpus).gpu_bytes == 80_000
    assert Gpus(Nvml([])).largest_bytes() is None


def test_an_nvml_that_fails_leaves_the_gpus_unknown() -> None:
    broken = Gpus(Nvml([(1, 1, {})], fails=True))
    assert broken.largest_bytes() is None
    assert broken.used_by({1}) is None


def test_without_nvidias_driver_there_are_no_gpus() -> None:
    gpus = open_gpus()
    if gpus is not None:
        pytest.skip("this machine has NVIDIA's driver")
    assert read_machine(gpus).gpu_bytes is None


@pytest.mark.gpu
def test_nvml_shows_this_machines_gpu_and_what_a_process_takes_on_it() -> None:
    gpus = open_gpus()
    if gpus is None:
        pytest.skip("no NVIDIA driver on this machine: NVML cannot be asked")
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA device")
    total = gpus.largest_bytes()
    assert total is not None and total >= torch.cuda.get_device_properties(0).total_memory
    held = torch.zeros(256 * MB, dtype=torch.uint8, device="cuda")
    use = gpus.used_by({os.getpid()})
    assert use is not None and use.used_bytes >= held.nbytes


def test_a_process_tree_is_counted_whole_and_one_that_is_gone_as_nothing() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    try:
        assert parent.stdout.readline() == b"1\n"
        found = process_tree(parent.pid)
        assert len(found) == 2 and found[0].pid == parent.pid
        assert rss_of(found) > rss_of(found[:1]) > 0
    finally:
        parent.communicate(b"\n", timeout=10)
    assert process_tree(parent.pid) == []
    assert rss_of(found) == 0
