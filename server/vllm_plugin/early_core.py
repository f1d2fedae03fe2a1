"""The engine core's process begun before vLLM begins it: it imports on another core what the API server imports too.

vLLM's API server imports vLLM for seconds, and then spawns the engine core, which imports it again. Here a process is
started at once that does those imports and waits. When vLLM starts its core, the payload that Python's `spawn` would
have given to a new process (a description of the parent, then the pickled process object) goes to this one, with the
open files that the object names; from then on it is that process, and runs Python's own code for it.

It is used only where a new process would be no different: what is imported may look at environment variables, so those
of the parent must be its own but for LATE, `LD_PRELOAD` among them. Else it is ended, and vLLM spawns its own. Nothing
is forked: neither threads nor locks nor an OpenMP pool are copied.
"""

from __future__ import annotations

import array
import importlib.util
import io
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from multiprocessing import popen_spawn_posix, reduction, resource_tracker, spawn
from multiprocessing import util as _util
from multiprocessing.context import set_spawning_popen
from pathlib import Path
from typing import Any

from server.engine.lifeline import die_with_parent
from server.vllm_plugin import startup

SWITCH = "HOTSHOE_EARLY_CORE"  # 0: begun when vLLM starts it; unset or 1: before, where that can be
NAME = "EngineCore"  # that vLLM gives its process
MODULES = (
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.qwen2",
    "vllm.model_executor.models.qwen3",
    "server.vllm_plugin.cpu_lora",
    "server.vllm_plugin.worker",
)
AHEAD = {  # as CpuPlatform.check_and_update_config of vLLM 0.32 sets them: torch reads them when it is imported
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1",
    "VLLM_DISABLE_SHARED_EXPERTS_STREAM": "1",
}
LATE = {  # read when the engine runs, and set by then
    "LOCAL_WORLD_SIZE",
    "NUMEXPR_MAX_THREADS",
    "VLLM_SSM_CONV_STATE_LAYOUT",
}
FIRST_FILE = 900  # numbers of the open files that it is given: no import has so many
MOST_FILES = 64
HEADER = 1 << 20  # bytes: a message has the environment in it

log = logging.getLogger("vllm.hotshoe")
# Of `multiprocessing`'s own, which its types do not show.
POPEN: Any = popen_spawn_posix.Popen
util: Any = _util
tracker: Any = resource_tracker
starter: Any = spawn


def is_wanted() -> bool:
    """Whether SWITCH leaves it on; raises ValueError for another word than 0 and 1."""
    asked = os.environ.get(SWITCH, "1")
    if asked not in ("", "0", "1"):
        raise ValueError(f"{SWITCH} is {asked!r}; it takes 0 or 1.")
    has_numbers = resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= FIRST_FILE + MOST_FILES
    return asked != "0" and startup.is_wanted() and has_numbers and len(os.sched_getaffinity(0)) > 1


def begin(modules: Sequence[str] = MODULES) -> EarlyCore:
    """Start the process, and have vLLM's core take it. Call it before vLLM is imported, from a thread that stays."""
    early = EarlyCore(preload(os.environ.get("LD_PRELOAD", "")), modules)
    launch = POPEN._launch

    def launch_or_hand_over(popen: Any, process_obj: Any) -> None:
        if process_obj.name != NAME or not early.take(popen, process_obj):
            launch(popen, process_obj)

    POPEN._launch = launch_or_hand_over
    return early


def preload(given: str) -> str:
    """LD_PRELOAD as vLLM 0.32 sets it for its core on a CPU: torch's OpenMP runtime, before it vLLM's tcmalloc."""
    found = given
    if not any(name in given for name in ("libomp", "libgomp", "libiomp")):
        torch = _folder_of("torch")
        libraries = [
            path for place in (torch.parent / "torch.libs", torch / "lib") for path in place.glob("libgomp*.so*")
        ]
        found = ":".join([*([found] if found else []), *map(str, libraries[:1])])
    if "libtcmalloc" not in found:
        for pattern in ("libtcmalloc_minimal*.so*", "libtcmalloc.so*"):
            if library := next((_folder_of("vllm") / "libs").glob(pattern), None):
                return ":".join([str(library), *([found] if found else [])])
    return found


def _folder_of(package: str) -> Path:
    """Where it is installed; it is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0])


class EarlyCore:
    """The process, in its parent."""

    def __init__(self, preloaded: str, modules: Sequence[str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sentinel, child_end = os.pipe()  # readable once the process has ended
        words = f"from server.vllm_plugin.early_core import main; main({theirs.fileno()}, {list(modules)!r})"
        command = [sys.executable, *util._args_from_interpreter_flags(), "-c", words]
        with _set_for_a_while({**AHEAD, "LD_PRELOAD": preloaded}):
            files = [theirs.fileno(), child_end]
            self.pid: int | None = util.spawnv_passfds(os.fsencode(sys.executable), command, files)
        theirs.close()
        os.close(child_end)

    def take(self, popen: Any, process_obj: Any) -> bool:
        """Have it be this process; False, and it is ended, where that cannot be."""
        pid, self.pid = self.pid, None
        if pid is None:
            return False  # it was taken before: this is a later core
        try:
            if os.fsdecode(spawn.get_executable()) != sys.executable:
                raise Unfit("another executable is asked for")
            self._ask_whether_alike()
        except (OSError, Unfit) as error:
            log.warning("The engine core is started anew, and not the one that was begun early: %s", error)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._close(self._sentinel)
            return False
        self._hand_over(pid, popen, process_obj)
        log.info("The engine core is process %d, which was begun early.", pid)
        return True

    def _ask_whether_alike(self) -> None:
        """Waits until it has imported. Raises Unfit when its environment is another, OSError when it is gone."""
        self._socket.send(json.dumps(dict(os.environ)).encode())
        answer = self._socket.recv(HEADER).decode()
        if answer != "alike":
            raise Unfit(answer or "it ended while it imported")

    def _hand_over(self, pid: int, popen: Any, process_obj: Any) -> None:
        """As `multiprocessing.popen_spawn_posix.Popen._launch` gives it to a new process."""
        files: list[int] = []

        def duplicate_for_child(file: int) -> int:
            files.append(file)
            return FIRST_FILE + len(files) - 1

        popen.duplicate_for_child = duplicate_for_child
        payload = io.BytesIO()
        reader, writer = os.pipe()
        duplicate_for_child(reader)
        duplicate_for_child(tracker.getfd())
        set_spawning_popen(popen)
        try:
            reduction.dump(spawn.get_preparation_data(process_obj._name), payload)
            reduction.dump(process_obj, payload)
        finally:
            set_spawning_popen(None)
        socket.send_fds(self._socket, [b"files"], files)
        os.close(reader)
        popen.pid, popen.sentinel = pid, self._sentinel
        popen.finalizer = util.Finalize(popen, util.close_fds, [self._sentinel, writer])
        with open(writer, "wb", closefd=False) as file:
            file.write(payload.getbuffer())
        self._close()

    def _close(self, *files: int) -> None:
        self._socket.close()
        for file in files:
            os.close(file)


@contextmanager
def _set_for_a_while(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Unfit(Exception):
    """Why the process cannot be the core."""


def main(file: int, modules: Sequence[str]) -> None:
    """The process itself: imports, waits, and becomes the core."""
    die_with_parent(os.getppid())
    with suppress(ImportError):  # vLLM names its processes by it, and it finds room while the environment is untouched
        import_module("setproctitle").getproctitle()
    parent = socket.socket(fileno=file)
    for name in modules:
        import_module(name)
    told = parent.recv(HEADER)
    if not told:
        return  # the parent needs none
    environment = json.loads(told)
    differing = other_variables(os.environ, environment)
    parent.send(f"other variables: {', '.join(differing)}".encode() if differing else b"alike")
    os.environ.update(environment)
    pipe, tracker_file = receive(parent)
    parent.close()
    tracker._resource_tracker._fd = tracker_file
    sys.argv = ["-c", "--multiprocessing-fork"]
    sys.exit(starter._main(pipe, os.dup(pipe)))


def other_variables(own: Mapping[str, str], parents: Mapping[str, str]) -> Sequence[str]:
    """Names of those that differ, and that something imported may have looked at."""
    return sorted(
        name for name in own.keys() | parents.keys() if own.get(name) != parents.get(name) and name not in LATE
    )


def receive(parent: socket.socket) -> tuple[int, int]:
    """Take the open files over under the numbers that the payload has for them; the first two are for `spawn`."""
    _, found, _, _ = socket.recv_fds(parent, 16, MOST_FILES)
    for place, file in enumerate(array.array("i", found)):
        os.dup2(file, FIRST_FILE + place)
        os.close(file)
    return FIRST_FILE, FIRST_FILE + 1
