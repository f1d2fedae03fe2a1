"""Whether an engine has room on this machine, before it is started; and the lines in which its memory is printed.

Refused is only what cannot be right: what is certainly allocated is more than there is, or one sequence of the context
length has no place. Staged adapters come one by one, so that their most is printed and nothing is refused for it;
neither is anything for a size that is unknown.
"""

from __future__ import annotations

from adapters.errors import ConfigInvalid
from server.machine import Machine
from server.memory import MemoryPlan

CONTEXT = "HOTSHOE_CONTEXT_LENGTH_TOKENS (or your --max-model-len)"
UNITS = ("B", "kB", "MB", "GB", "TB")


def check_room(plan: MemoryPlan, machine: Machine) -> None:
    """Raises ConfigInvalid, with the figures and what to lower, for an engine that cannot be started in this memory."""
    if plan.layout.is_cpu:
        _check_cache(plan)
        _check_main(plan, machine)
    else:
        _check_gpu(plan, machine)


def memory_lines(plan: MemoryPlan, machine: Machine) -> list[str]:
    """What the engine's memory goes to, for the person who starts it."""
    layout = plan.layout
    cache = _cpu_cache(plan) if layout.is_cpu else _gpu_cache(plan, machine)
    slots = f"{layout.max_loras} slots x {_shown(plan.slot_bytes)} (rank {layout.max_rank})"
    if not layout.max_loras:
        slots = "no slots"
    elif layout.slots_are_pointers:
        slots = f"{layout.max_loras} slots, which take none"
    lines = [f"  memory  weights {_shown(plan.weights_bytes)}, {slots}, {cache}"]
    if plan.stage_most_bytes:  # 0: the engine runs without LoRA
        each = size(plan.stage_most_bytes // layout.staged_limit)
        lines.append(
            f"          staged adapters: at most {layout.staged_limit} x {each} = {size(plan.stage_most_bytes)} more, "
            f"of {size(machine.main_bytes)} main memory"
        )
    return lines


def size(count: float) -> str:
    """`21.2 MB`: three digits, in powers of 1,000."""
    for unit in UNITS:
        if round(count, 2) < 1000 or unit == UNITS[-1]:
            digits = 0 if unit == "B" or count >= 100 else 1 if count >= 10 else 2
            return f"{count:.{digits}f} {unit}"
        count /= 1000
    raise AssertionError


def _shown(count: int | None) -> str:
    return "unknown" if count is None else size(count)


def _cpu_cache(plan: MemoryPlan) -> str:
    sequence, cache = plan.sequence_bytes, plan.kv_cache_bytes
    if cache is None:
        return "KV cache unknown"
    fits = "" if sequence is None else f" ({cache / sequence:.1f} sequences of {plan.layout.context_tokens:,} tokens)"
    known = (plan.weights_bytes, plan.slots_bytes, cache)
    total = "" if None in known else f"; together {size(sum(part or 0 for part in known))}"
    return f"KV cache {size(cache)}{fits}{total}"


def _gpu_cache(plan: MemoryPlan, machine: Machine) -> str:
    if machine.gpu_bytes is None or plan.layout.memory_fraction is None:
        return "KV cache what is left (GPU memory unknown)"
    left, sequence = _left_on_gpu(plan, machine), _per_gpu(plan, plan.sequence_bytes)
    text = f"KV cache at most {_shown(left)} of a GPU's {size(machine.gpu_bytes)} x {plan.layout.memory_fraction:g}"
    if left is None or sequence is None:
        return text
    return f"{text} (one sequence of {plan.layout.context_tokens:,} tokens: {size(sequence)})"


def _check_cache(plan: MemoryPlan) -> None:
    given, needed, layout = plan.layout.kv_cache_bytes, plan.sequence_bytes, plan.layout
    if given is None or needed is None or given >= needed:
        return
    most = _longest(plan, given)
    shorter = f", or lower {CONTEXT} to at most {most}" if most else ""
    raise ConfigInvalid(
        f"The KV cache has {given} bytes ({size(given)}), and one sequence of {layout.context_tokens} tokens needs "
        f"{needed} ({size(needed)}): raise HOTSHOE_KV_CACHE_BYTES to {needed}{shorter}.",
        param="kv_cache_bytes",
    )


def _check_main(plan: MemoryPlan, machine: Machine) -> None:
    parts = {"weights": plan.weights_bytes, "slots": plan.slots_bytes, "KV cache": plan.kv_cache_bytes}
    known = {name: part for name, part in parts.items() if part is not None}
    total = sum(known.values())
    if total <= machine.main_bytes:
        return
    listed = ", ".join(f"{name} {size(part)}" for name, part in known.items())
    raise ConfigInvalid(
        f"The engine needs {size(total)} ({listed}) and this machine has {size(machine.main_bytes)}: lower "
        "HOTSHOE_KV_CACHE_BYTES, HOTSHOE_SLOTS or HOTSHOE_MAX_RANK, or take a smaller base or a shorter dtype.",
        param="kv_cache_bytes",
    )


def _check_gpu(plan: MemoryPlan, machine: Machine) -> None:
    left, needed = _left_on_gpu(plan, machine), _per_gpu(plan, plan.sequence_bytes)
    if left is None or needed is None or left >= needed or machine.gpu_bytes is None:
        return
    layout = plan.layout
    allowed, each = int(machine.gpu_bytes * (layout.memory_fraction or 1.0)), f"{layout.max_loras} slots"
    weights, slots = _shown(_per_gpu(plan, plan.weights_bytes)), _shown(_per_gpu(plan, plan.slots_bytes))
    most = _longest(plan, max(0, left) * (layout.workers or 1))
    shorter = f" to at most {most} tokens" if most else ""
    raise ConfigInvalid(
        f"One sequence of {layout.context_tokens} tokens needs {size(needed)} of KV cache on each GPU, and at most "
        f"{size(max(0, left))} is left: {size(allowed)} of {size(machine.gpu_bytes)} may be used "
        f"(--gpu-memory-utilization {layout.memory_fraction:g}), weights take {weights} and {each} {slots}. "
        f"Lower {CONTEXT}{shorter}, HOTSHOE_SLOTS or HOTSHOE_MAX_RANK, or take a "
        "smaller or a quantised base or more GPUs (--tensor-parallel-size).",
        param="context_length_tokens",
    )


def _left_on_gpu(plan: MemoryPlan, machine: Machine) -> int | None:
    """At most what one GPU has for the KV cache; activations and CUDA graphs come off it too."""
    weights, slots = _per_gpu(plan, plan.weights_bytes), _per_gpu(plan, plan.slots_bytes)
    fraction = plan.layout.memory_fraction
    if weights is None or slots is None or fraction is None or machine.gpu_bytes is None:
        return None
    return int(machine.gpu_bytes * fraction) - weights - slots


def _per_gpu(plan: MemoryPlan, total: int | None) -> int | None:
    """An even share: layers that do not divide put more on one of them, never less on all."""
    workers = plan.layout.workers
    return None if total is None or workers is None else total // workers


def _longest(plan: MemoryPlan, cache_bytes: int) -> int:
    """The longest context whose sequence fits; 0 for none."""
    size_of_block, block = plan.block_bytes, plan.layout.block_tokens
    if not size_of_block or block is None:
        return 0
    return max(0, cache_bytes // size_of_block - 1) * block
