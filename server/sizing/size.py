"""From traffic to settings: rank, slots, staged adapters, share of the GPU, and what to change where it does not fit.

The KV cache comes first: the sequences that are asked for must fit, or nothing is answered. Slots come second: more of
them than sequences run at a time are never used, and fewer than adapters in use only make these take turns. So slots
are the least of adapters, concurrency and what has room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from adapters.errors import BaseInvalid, ConfigInvalid
from server.engine.base import DEFAULT_SLOTS
from server.engine.vllm_flags import CPU_CONTEXT_LIMIT_TOKENS, LORA_RANKS, lora_rank
from server.sizing.overheads import beside_share
from server.sizing.parts import Device, Form, Traffic
from server.sizing.placed import Chosen, Placed

DEFAULT_RANK = 64  # the server's
FALLING_RANKS = (64, 32, 16, 8)
MOST_SLOTS, MOST_STAGED = 1024, 4096  # that the settings take
LARGEST_SHARE = 0.95  # of a GPU: fragments and what the driver takes later
SPLITS = (2, 4, 8)


@dataclass(frozen=True)
class Sizing:
    """What is recommended, its memory, and where it does not fit, what would."""

    name: str
    traffic: Traffic
    placed: Placed
    wanted_slots: int
    most_slots: int  # beside the sequences that are asked for
    changes: tuple[str, ...] = ()  # each alone makes it fit, or is what comes nearest
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.placed.fits

    @property
    def most_staged(self) -> int | None:
        """Adapters of this rank that main memory can keep loaded; None where it is not known."""
        placed, chosen = self.placed, self.placed.chosen
        if placed.device.host_bytes is None:
            return None
        return largest(MOST_STAGED, lambda count: replace(placed, chosen=replace(chosen, staged=count)))


def size(name: str, config: Mapping[str, Any], form: Form, device: Device, traffic: Traffic) -> Sizing:
    """The settings for this traffic on this device. Raises ConfigInvalid and BaseInvalid for what cannot be sized."""
    _check(config, device, traffic)
    ranks = FALLING_RANKS if traffic.rank is None else (traffic.rank,)
    tried = [_choose(name, config, form, device, replace(traffic, rank=rank)) for rank in ranks]
    fitting = [one for one in tried if one.fits]
    found = max(fitting, key=lambda one: one.placed.chosen.slots) if fitting else tried[-1]  # the first of equals
    found = replace(found, traffic=traffic, notes=tuple(_notes(found, traffic)))
    return found if found.fits else replace(found, changes=tuple(_changes(found)))


def share_of(device: Device) -> float:
    """--gpu-memory-utilization, in hundredths: what others and, at their highest, CUDA and NCCL leave, at most 0.95.

    vLLM refuses to start where its share is more than is free (`request_memory` in vllm/v1/worker/utils.py).
    """
    taken = device.reserved_bytes + sum(part.high_bytes for part in beside_share(device))
    return max(0.01, min(LARGEST_SHARE, int(100 * (1 - taken / device.memory_bytes)) / 100))


def _choose(name: str, config: Mapping[str, Any], form: Form, device: Device, traffic: Traffic) -> Sizing:
    """The most slots that are of use and have room at this rank; one slot where nothing fits."""
    rank, adapters = traffic.rank or DEFAULT_RANK, min(_or(traffic.adapters, DEFAULT_SLOTS), MOST_STAGED)
    at_once = _or(traffic.concurrency, adapters if device.slots_are_pointers else DEFAULT_SLOTS)
    wanted = min(adapters, at_once, MOST_SLOTS)
    chosen = Chosen(
        slots=1,
        max_rank=lora_rank(rank),
        context_tokens=_or(traffic.context_tokens, _default_context(config, device)),
        staged=1,
        staged_rank=rank,
        sequences=_or(traffic.concurrency, 1),
        memory_fraction=1.0 if device.is_cpu else share_of(device),
        max_num_seqs=traffic.max_num_seqs,
    )
    least = Placed(config, form, device, chosen)
    if device.is_cpu and traffic.concurrency is None:  # the KV cache is a setting there, and not what is left
        several = largest(DEFAULT_SLOTS, lambda count: replace(least, chosen=replace(chosen, sequences=count)))
        chosen = replace(chosen, sequences=max(1, several))
    most = largest(MOST_SLOTS, lambda slots: replace(least, chosen=_with_slots(chosen, slots)))
    slots = max(1, min(wanted, most))
    placed = replace(least, chosen=_with_slots(chosen, slots))
    staged = largest(adapters, lambda count: replace(placed, chosen=replace(placed.chosen, staged=count)))
    placed = replace(placed, chosen=replace(placed.chosen, staged=max(slots, staged) if placed.fits else adapters))
    return Sizing(name, traffic, placed, wanted, most)


def _with_slots(chosen: Chosen, slots: int) -> Chosen:
    """Each adapter that is in a slot is staged too."""
    return replace(chosen, slots=slots, staged=slots)


def largest(most: int, place: Callable[[int], Placed]) -> int:
    """The largest count up to `most` with which it fits, where more never takes less; 0 for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if place(middle).fits:
            low = middle
        else:
            high = middle - 1
    return low


def _default_context(config: Mapping[str, Any], device: Device) -> int:
    longest = int(config["max_position_embeddings"])
    return min(longest, CPU_CONTEXT_LIMIT_TOKENS) if device.is_cpu else longest


def _or(given: int | None, default: int) -> int:
    return default if given is None else given


def _check(config: Mapping[str, Any], device: Device, traffic: Traffic) -> None:
    if config.get("use_sliding_window"):
        raise BaseInvalid(
            "The base's config.json turns a sliding window on: its KV cache is not sized here. Start the engine and "
            "read kv_cache_bytes in /v1/system.",
            param="base",
        )
    longest = int(config["max_position_embeddings"])
    if traffic.context_tokens is not None and traffic.context_tokens > longest:
        raise ConfigInvalid(
            f"context is {traffic.context_tokens} tokens and the base has {longest}: ask for at most that.",
            param="context",
        )
    if device.reserved_bytes >= device.memory_bytes:
        raise ConfigInvalid(
            f"reserved are {device.reserved_bytes} bytes and {device.name} has {device.memory_bytes}: nothing is left.",
            param="reserved",
        )
    counts = {
        "adapters": traffic.adapters,
        "context": traffic.context_tokens,
        "concurrency": traffic.concurrency,
        "max-num-seqs": traffic.max_num_seqs,
        "gpus": device.count,
    }
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigInvalid(f"{name} is {value}; the least is 1.", param=name)
    if traffic.rank is not None and not 1 <= traffic.rank <= LORA_RANKS[-1]:
        raise ConfigInvalid(f"rank is {traffic.rank}; vLLM serves 1 to {LORA_RANKS[-1]}.", param="rank")
    _check_split(config, device.count)


def _check_split(config: Mapping[str, Any], split: int) -> None:
    """vLLM divides heads and the middle of the MLP evenly, and shares a key-value head among whole GPUs."""
    if splits(config, split):
        return
    possible = [str(one) for one in (1, *SPLITS) if splits(config, one)]
    raise ConfigInvalid(
        f"gpus is {split} and vLLM cannot divide this base over that many ({config['num_attention_heads']} heads, "
        f"{config.get('num_key_value_heads')} of keys and values); it can over {', '.join(possible)}.",
        param="gpus",
    )


def splits(config: Mapping[str, Any], split: int) -> bool:
    heads, middle = int(config["num_attention_heads"]), int(config["intermediate_size"])
    shared = int(config.get("num_key_value_heads") or heads)
    is_shared_evenly = shared % split == 0 if shared >= split else split % shared == 0
    return split >= 1 and heads % split == 0 and middle % split == 0 and is_shared_evenly


def _notes(found: Sizing, traffic: Traffic) -> Iterator[str]:
    chosen, adapters = found.placed.chosen, _or(traffic.adapters, DEFAULT_SLOTS)
    if found.fits and chosen.slots < found.wanted_slots:
        yield (
            f"memory holds {chosen.slots} slots and {found.wanted_slots} would be of use: adapters take turns in them; "
            "a smaller rank, a shorter context or lower concurrency makes room"
        )
    if found.fits and adapters > chosen.slots and chosen.slots == found.wanted_slots:
        yield f"{adapters} adapters share {chosen.slots} slots: no more are of use, as no more sequences run at a time"
    if found.fits and traffic.rank is None and chosen.max_rank < DEFAULT_RANK:
        yield f"rank {chosen.max_rank}, and not the server's {DEFAULT_RANK}: that leaves fewer slots, or none"
    if found.fits and adapters > chosen.staged:
        yield f"{chosen.staged} of {adapters} adapters are kept loaded; the others are loaded when they are asked for"
    if found.fits and found.placed.least_cache_bytes < found.placed.needed_cache_bytes:
        yield "tight: with the estimates at their highest these sequences do not fit at the same time"
    if found.placed.form.quantization == "nf4":
        yield "vLLM 0.32 reads no bitsandbytes weights by itself: the figure is for an engine that does"


def _changes(found: Sizing) -> Iterator[str]:
    """What makes it fit, each tried; else how far away it is."""
    fitting = [words for words, changed in _alternatives(found) if changed.fits]
    yield from fitting
    if not fitting:
        yield "no single change makes it fit: combine a smaller or quantised base, more GPUs and a shorter context"


def _alternatives(found: Sizing) -> Iterator[tuple[str, Placed]]:
    """Single changes, with the placement that each leads to."""
    placed, chosen, device, form = found.placed, found.placed.chosen, found.placed.device, found.placed.form
    if chosen.sequences > 1:
        fewer = largest(chosen.sequences - 1, lambda n: replace(placed, chosen=replace(chosen, sequences=n)))
        if fewer:
            yield f"--concurrency {fewer}", replace(placed, chosen=replace(chosen, sequences=fewer))
    shorter = largest(
        chosen.context_tokens // placed.block_tokens,
        lambda n: replace(placed, chosen=replace(chosen, context_tokens=n * placed.block_tokens)),
    )
    if shorter:
        tokens = shorter * placed.block_tokens
        yield f"--context {tokens}", replace(placed, chosen=replace(chosen, context_tokens=tokens))
    if not device.is_cpu:
        yield from _gpu_alternatives(placed)
    if form.dtype_bytes == 4:
        kv_bytes = min(form.kv_bytes, 2)
        yield (
            "--dtype bfloat16",
            replace(placed, form=replace(form, dtype="bfloat16", dtype_bytes=2, kv_bytes=kv_bytes)),
        )


def _gpu_alternatives(placed: Placed) -> Iterator[tuple[str, Placed]]:
    chosen, device, form = placed.chosen, placed.device, placed.form
    if chosen.max_num_seqs is None:
        few = max(16, chosen.sequences)
        yield f"--max-num-seqs {few}", replace(placed, chosen=replace(chosen, max_num_seqs=few))
    if form.kv_bytes > 1:
        yield "--kv-dtype fp8", replace(placed, form=replace(form, kv_bytes=1))
    if form.quantization is None:
        for name in ("fp8", "awq"):
            yield f"--quantization {name}", replace(placed, form=replace(form, quantization=name))
    for count in SPLITS:
        if count > device.count and splits(placed.config, count):
            wider = replace(device, count=count)
            choice = replace(chosen, memory_fraction=share_of(wider))
            yield f"--gpus {count}", replace(placed, device=wider, chosen=choice)
