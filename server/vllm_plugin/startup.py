"""A CPU engine that is ready sooner: one process and one round of imports fewer than stock vLLM, where that is safe.

Stock vLLM (0.32, CpuPlatform.check_and_update_config) gives the model a process of its own, so that OpenMP's variables
can be set before it begins, and starts each process by `spawn`, which imports everything anew. Our engines bind no
threads (`VLLM_CPU_OMP_THREADS_BIND=nobind`): there are no variables to set, and a single worker can run in the engine
core. The core is forked from the API process where that has no thread beside the one that forks, ZMQ's own excepted:
then nobody holds a lock, and no OpenMP region has run with threads, whose pool a child would wait for in vain.

vLLM itself forks beside ZMQ's threads where it is not used as a server: pyzmq leaves a context alone in another process
than its own.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
from pathlib import Path
from typing import Any

from server.engine.lifeline import die_with_parent

BINDING, UNBOUND = "VLLM_CPU_OMP_THREADS_BIND", "nobind"
METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
SWITCH = "HOTSHOE_ENGINE_FORK"  # 0: as stock vLLM does; unset or 1: fork where it is safe
HARMLESS = ("ZMQbg/",)  # beginnings of names of threads that a fork may leave behind

log = logging.getLogger("vllm.hotshoe")


def is_wanted() -> bool:
    """Whether SWITCH leaves the short start on; raises ValueError for another word than 0 and 1."""
    asked = os.environ.get(SWITCH, "1")
    if asked not in ("", "0", "1"):
        raise ValueError(f"{SWITCH} is {asked!r}; it takes 0 or 1.")
    return asked != "0" and os.environ.get(BINDING) == UNBOUND


def install(platform: Any) -> None:
    """Have engines on this platform class start so. Idempotent.

    What starts a core is imported once a configuration is made: most processes that run plugins never start one.
    """
    if not is_wanted() or hasattr(platform, "hotshoe_checked"):
        return
    checked = platform.hotshoe_checked = platform.check_and_update_config

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        parallel = vllm_config.parallel_config
        asked = parallel.distributed_executor_backend
        checked(vllm_config)
        if asked == "uni" and parallel.world_size == 1:
            parallel.distributed_executor_backend = asked
        _fork_where_safe()

    platform.check_and_update_config = classmethod(check_and_update_config)


def _fork_where_safe() -> None:
    from vllm.v1.engine.core import EngineCoreProc as core
    from vllm.v1.engine.utils import CoreEngineProcManager as manager

    if hasattr(manager, "hotshoe_begin"):
        return
    begin, run = manager.__init__, core.run_engine_core
    manager.hotshoe_begin = begin

    @functools.wraps(begin)
    def start_cores(self: Any, *arguments: Any, **named: Any) -> None:
        stock = os.environ.get(METHOD)
        others = other_threads()
        if not others and _is_in_one_process(named["executor_class"]):
            parent = os.getpid()
            core.run_engine_core = staticmethod(functools.partial(_run_forked, run, parent))
            os.environ[METHOD] = "fork"
        else:
            log.info("The engine core is spawned, not forked: %s.", ", ".join(others) or "it has workers of its own")
        try:
            begin(self, *arguments, **named)
        finally:
            core.run_engine_core = staticmethod(run)
            os.environ.pop(METHOD) if stock is None else os.environ.update({METHOD: stock})

    manager.__init__ = start_cores


def _run_forked(run: Any, parent: int, *arguments: Any, **named: Any) -> None:
    """The engine core in its process, less what a fork takes over from its parent and plus what it loses.

    A signal to the core would be written into the pipe that wakes the parent's event loop, and be the parent's. The
    death signal is each process's own, and plugins, which ask for it in a spawned one, are not run again.
    """
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    die_with_parent(parent)
    run(*arguments, **named)


def _is_in_one_process(executor_class: Any) -> bool:
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    return issubclass(executor_class, UniProcExecutor)


def other_threads(tasks: Path = Path("/proc/self/task")) -> list[str]:
    """Names of this process's threads that a fork would lose and somebody might wait for; this thread is not one."""
    me = Path("/proc/thread-self").resolve().name
    names = []
    for task in tasks.iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            names += [(task / "comm").read_text().strip()] if task.name != me else []
    return sorted(name for name in names if not name.startswith(HARMLESS))
