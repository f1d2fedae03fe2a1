"""A sizing as JSON and as lines: every part with its basis, what fits, and the settings to start the server with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from server.room import size as shown
from server.sizing.parts import Basis, Part
from server.sizing.placed import Placed
from server.sizing.size import Sizing
from server.sizing.weights import parameters

SERVED_AT_ONCE = 64  # HOTSHOE_MAX_RUNNING's default


def as_dict(sizing: Sizing) -> dict[str, Any]:
    """Everything that is known of a sizing, in bytes and tokens."""
    placed, device, form = sizing.placed, sizing.placed.device, sizing.placed.form
    return {
        "object": "sizing",
        "fits": sizing.fits,
        "base": {
            "name": sizing.name,
            "parameters": parameters(placed.config),
            "dtype": form.dtype,
            "quantization": form.quantization,
            "kv_bytes": form.kv_bytes,
        },
        "device": asdict(device),
        "asked": asdict(sizing.traffic),
        "settings": settings_of(sizing),
        "parts": [asdict(part) for part in placed.parts()],
        "each": {
            "slot_bytes": placed.slot_bytes,
            "staged_adapter_bytes": placed.staged_adapter_bytes,
            "block_bytes": placed.block_bytes,
            "block_tokens": placed.block_tokens,
            "token_bytes": placed.block_bytes // placed.block_tokens,
        },
        "holds": {
            "kv_cache_tokens": placed.cache_tokens,
            "sequences": placed.sequences,
            "most_slots": sizing.most_slots,
            "most_staged": sizing.most_staged,
        },
        "missing_bytes": max(0, placed.needed_cache_bytes - placed.left_bytes) if not sizing.fits else 0,
        "changes": list(sizing.changes),
        "notes": list(sizing.notes),
    }


def settings_of(sizing: Sizing) -> dict[str, Any]:
    """The server's settings, and what vLLM makes of them: one slot more than are admitted."""
    placed, chosen = sizing.placed, sizing.placed.chosen
    is_cpu = placed.device.is_cpu
    return {
        "slots": chosen.slots,
        "max_loras": placed.plan.layout.max_loras,
        "staged_limit": chosen.staged,
        "max_cpu_loras": placed.plan.layout.staged_limit,
        "max_rank": chosen.max_rank,
        "context_length_tokens": chosen.context_tokens,
        "gpu_memory_utilization": None if is_cpu else chosen.memory_fraction,
        "kv_cache_bytes": placed.cache_bytes if is_cpu else None,
    }


def lines(sizing: Sizing) -> Iterator[str]:
    """For a person: the question, the parts, what they hold, and the command."""
    placed = sizing.placed
    yield from _asked(sizing)
    yield ""
    for part in placed.parts():
        yield _part_line(sizing, part)
    yield ""
    yield from _verdict(sizing)
    for note in sizing.notes:
        yield f"  note: {note}"
    if not sizing.fits:
        return
    yield ""
    yield "start it with"
    yield f"  {command(sizing)}"


def command(sizing: Sizing) -> str:
    """The `hotshoe serve` that has these settings."""
    placed, chosen, device, form = (
        sizing.placed,
        sizing.placed.chosen,
        sizing.placed.device,
        sizing.placed.form,
    )
    env = [f"HOTSHOE_STAGED_LIMIT={chosen.staged}", f"HOTSHOE_CONTEXT_LENGTH_TOKENS={chosen.context_tokens}"]
    env += [f"HOTSHOE_KV_CACHE_BYTES={placed.cache_bytes}"] if device.is_cpu else []
    env += [f"HOTSHOE_MAX_RUNNING={chosen.sequences}"] if chosen.sequences > SERVED_AT_ONCE else []
    words = [*env, "hotshoe serve --base", _base_of(sizing), f"--slots {chosen.slots} --max-rank {chosen.max_rank}"]
    words += [f"--dtype {form.dtype}"] if device.is_cpu else []
    flags = [] if device.is_cpu else [f"--gpu-memory-utilization {chosen.memory_fraction:g}"]
    flags += [f"--tensor-parallel-size {device.count}"] if device.count > 1 else []
    flags += ["--kv-cache-dtype fp8"] if form.kv_bytes < form.dtype_bytes and form.kv_bytes == 1 else []
    flags += ["--quantization fp8"] if form.quantization == "fp8" else []
    flags += [f"--max-num-seqs {chosen.max_num_seqs}"] if chosen.max_num_seqs is not None else []
    return " ".join([*words, "--", *flags] if flags else words)


def _base_of(sizing: Sizing) -> str:
    """What --base takes: a folder as it was named, or the Hub's id, of which the commit is to be filled in."""
    method = sizing.placed.form.quantization
    if "quantization_config" not in sizing.placed.config and method not in (None, "fp8"):
        return f"FOLDER_OF_ITS_{method}_CHECKPOINT".upper()
    return f"{sizing.name}@COMMIT" if sizing.name.startswith("Qwen/") else sizing.name


def _asked(sizing: Sizing) -> Iterator[str]:
    placed, device, chosen, form = sizing.placed, sizing.placed.device, sizing.placed.chosen, sizing.placed.form
    count = f"{device.count} x " if device.count > 1 else ""
    held = f", {shown(device.reserved_bytes)} of it taken by others" if device.reserved_bytes else ""
    how = f"{form.dtype}, {form.quantization}" if form.quantization else form.dtype
    yield (
        f"{sizing.name} ({parameters(placed.config):,} parameters, {how}) on {count}{device.name}: "
        f"{shown(device.memory_bytes)}{held}"
    )
    adapters = "adapters" if sizing.traffic.adapters is None else f"{sizing.traffic.adapters} adapters"
    many = "at least one sequence" if sizing.traffic.concurrency is None else _many(chosen.sequences)
    yield f"{adapters} of rank {chosen.staged_rank}, {many} of {chosen.context_tokens:,} tokens at a time"


def _many(count: int) -> str:
    return f"{count:,} sequence{'' if count == 1 else 's'}"


def _slots(placed: Placed) -> str:
    chosen = placed.chosen
    if placed.device.slots_are_pointers:
        return f"{chosen.slots} + 1, each a pointer at a staged adapter"
    return f"{chosen.slots} + 1 x {shown(placed.slot_bytes)}, rank {chosen.max_rank}"


def _part_line(sizing: Sizing, part: Part) -> str:
    placed, chosen = sizing.placed, sizing.placed.chosen
    counts = {
        "slots": _slots(placed),
        "stage": f"{chosen.staged} x {shown(placed.staged_adapter_bytes)}, rank {chosen.staged_rank}",
        "kv_cache": f"{placed.cache_tokens:,} tokens x {shown(placed.block_bytes / placed.block_tokens)}",
    }
    spread = "" if part.basis is Basis.FORMULA else f"{shown(part.low_bytes)} to {shown(part.high_bytes)}"
    what = counts.get(part.name, "")
    text = f"  {part.place:<4}  {part.name:<12} {shown(part.bytes):>8}  {part.basis:<8}  {what or spread}"
    if what and spread:
        text += f" ({spread})"
    return text.rstrip()


def _verdict(sizing: Sizing) -> Iterator[str]:
    placed, chosen = sizing.placed, sizing.placed.chosen
    if sizing.fits:
        staged = "" if sizing.most_staged is None else f"; main memory keeps at most {sizing.most_staged:,} loaded"
        yield (
            f"fits: {placed.cache_tokens:,} tokens of KV cache, {_many(placed.sequences)} of {chosen.context_tokens:,} "
            f"at a time; at most {sizing.most_slots:,} adapters in slots beside them{staged}"
        )
        return
    needed, left = placed.needed_cache_bytes, placed.left_bytes
    host = placed.device.main_bytes
    if host is not None and placed.stage_bytes > host:
        yield f"does not fit: staged adapters take {shown(placed.stage_bytes)} of {shown(host)} main memory"
    else:
        over = f"the other parts are {shown(-left)} too large" if left < 0 else f"{shown(left)} is left"
        yield f"does not fit: the KV cache needs {shown(needed)} and {over}, with one slot of rank {chosen.max_rank}"
    yield "what would make it fit, each alone:" if len(sizing.changes) > 1 else "what would make it fit:"
    for change in sizing.changes:
        yield f"  {change}"
