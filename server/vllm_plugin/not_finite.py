"""Numbers that are not finite end a request with an error, and are never a token.

vLLM counts NaNs of each row of logits where VLLM_COMPUTE_NANS_IN_LOGITS is set, tells its metrics, and samples a token
all the same. Here the scheduler, which learns of the counts with the tokens, ends such a request before it takes the
token; a client gets the error of a failed request, and the other rows of the batch go on. Its blocks of the KV cache
are cleared before others get them. The count is ours too: one sum over a row tells of every number in it, and reads
the logits once.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

# The two reasons for which vLLM ends a request that has begun; which of them it was does not come to its server.
ENDED = "The engine ended this request: its logits were not finite, or its grammar took none of the tokens."

log = logging.getLogger("vllm.hotshoe")


def rows_not_finite(logits: torch.Tensor) -> torch.Tensor:
    """(rows,) int32, 1 for a row of `logits` (rows, vocabulary) with NaN or infinity in it, else 0.

    Minus infinity is what a grammar gives to tokens that it does not take, and counts as finite. float32 sums: a row of
    2^17 finite logits overflows from a mean of 10^33 on, where it is none any more.
    """
    return (~(logits.sum(dim=-1, dtype=torch.float32) < torch.inf)).to(torch.int32)


def count_rows(runner_module: Any) -> None:
    """Have vLLM's model runner (its module) count with `rows_not_finite`. Idempotent."""
    runner_module.count_nans_per_row = rows_not_finite


def end_requests(scheduler_class: Any, error_status: Any) -> None:
    """Have this class of schedulers end a request whose logits were not finite. Idempotent."""
    if hasattr(scheduler_class, "hotshoe_update"):
        return
    update = scheduler_class.hotshoe_update = scheduler_class.update_from_output
    take_tokens = scheduler_class._update_request_with_output

    def update_from_output(scheduler: Any, scheduler_output: Any, model_output: Any) -> Any:
        scheduler.hotshoe_not_finite = model_output.num_nans_in_logits or {}
        return update(scheduler, scheduler_output, model_output)

    def update_request(scheduler: Any, request: Any, new_token_ids: list[int], is_stale: bool = False) -> Any:
        if not scheduler.hotshoe_not_finite.get(request.request_id):
            return take_tokens(scheduler, request, new_token_ids, is_stale)
        request.hotshoe_is_not_finite = True
        request.status = error_status
        request.resumable = False
        return [], True

    scheduler_class.update_from_output = update_from_output
    scheduler_class._update_request_with_output = update_request


def clear_blocks(scheduler_class: Any, manager_class: Any) -> None:
    """Have blocks of the KV cache that may hold such numbers forgotten by the prefix cache, and zeroed before another
    request gets them: vLLM's CPU attention reads whole blocks, and NaN times the weight 0 is NaN. Idempotent.

    They are those of a request that ended so, and of one with an adapter that left before it had a first token, which
    would have told. A block that somebody else holds too is his to clear: his logits are not finite either.
    """
    if hasattr(manager_class, "hotshoe_free"):
        return
    free = manager_class.hotshoe_free = manager_class.free
    new_blocks = scheduler_class._get_new_block_ids_to_zero

    def free_and_note(manager: Any, request: Any) -> None:
        spoiled: set[int] = blocks_of(manager, request) if may_be_spoiled(request) else set()
        free(manager, request)
        if spoiled:
            manager.evict_blocks(spoiled)
            unheld = {block for block in spoiled if manager.block_pool.blocks[block].ref_cnt == 0}
            manager.hotshoe_to_zero = getattr(manager, "hotshoe_to_zero", set()) | unheld

    def get_new_block_ids_to_zero(scheduler: Any) -> list[int] | None:
        spoiled: set[int] = getattr(scheduler.kv_cache_manager, "hotshoe_to_zero", set())
        scheduler.kv_cache_manager.hotshoe_to_zero = set()
        return [*(new_blocks(scheduler) or []), *sorted(spoiled)] or None

    manager_class.free = free_and_note
    scheduler_class._get_new_block_ids_to_zero = get_new_block_ids_to_zero


def may_be_spoiled(request: Any) -> bool:
    """Whether its keys and values may hold numbers that are not finite."""
    is_untold = request.lora_request is not None and request.num_output_tokens == 0
    return is_untold or getattr(request, "hotshoe_is_not_finite", False)


def blocks_of(manager: Any, request: Any) -> set[int]:
    found = {block for group in manager.get_block_ids(request.request_id) for block in group}
    return found - {manager.block_pool.null_block.block_id}


def say_why(serving_class: Any, error_class: type[Exception]) -> None:
    """Have vLLM's server say why it ended a request (ENDED), and not only that an error was internal. Idempotent."""

    def raise_if_error(serving: Any, finish_reason: str | None, request_id: str) -> None:
        if finish_reason == "error":
            log.error("request %s: %s", request_id, ENDED)
            raise error_class(ENDED)

    serving_class._raise_if_error = raise_if_error


def install_in_core() -> None:
    """In the process of vLLM's engine core."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import RequestStatus

    end_requests(Scheduler, RequestStatus.FINISHED_ERROR)
    clear_blocks(Scheduler, KVCacheManager)


def install_in_server() -> None:
    """In vLLM's API server."""
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.exceptions import GenerationError

    say_why(GenerateBaseServing, GenerationError)


def install_in_worker() -> None:
    """In a process that has the model."""
    from vllm.v1.worker import gpu_model_runner  # of which the CPU's runner is a subclass

    count_rows(gpu_model_runner)
