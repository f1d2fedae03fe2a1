"""A CPU engine that is ready sooner: the model runs in the engine core's process, and needs none of its own.

Stock vLLM (0.32, CpuPlatform.check_and_update_config) turns the executor `uni`, its choice for one worker, into `mp`,
so that OpenMP's variables can be set before the worker's process begins. Our engines bind no threads
(`VLLM_CPU_OMP_THREADS_BIND=nobind`): `OMPProcessManager` then sets none, and what is left of the second process is its
imports and two copies of every step's data.
"""

from __future__ import annotations

import os
from typing import Any

BINDING, UNBOUND = "VLLM_CPU_OMP_THREADS_BIND", "nobind"
SWITCH = "HOTSHOE_ENGINE_WORKER"  # 1: a process of its own for the model, as stock vLLM has it; unset or 0: none


def is_wanted() -> bool:
    """Whether the model may run in the engine core; raises ValueError where SWITCH is another word than 0 and 1."""
    asked = os.environ.get(SWITCH, "0")
    if asked not in ("", "0", "1"):
        raise ValueError(f"{SWITCH} is {asked!r}; it takes 0 or 1.")
    return asked != "1" and os.environ.get(BINDING) == UNBOUND


def install(platform: Any) -> None:
    """Have this platform class leave an engine of one worker in one process. Idempotent."""
    if not is_wanted() or hasattr(platform, "hotshoe_checked"):
        return
    checked = platform.hotshoe_checked = platform.check_and_update_config

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        parallel = vllm_config.parallel_config
        asked = parallel.distributed_executor_backend
        checked(vllm_config)
        if asked == "uni" and parallel.world_size == 1:
            parallel.distributed_executor_backend = asked

    platform.check_and_update_config = classmethod(check_and_update_config)
