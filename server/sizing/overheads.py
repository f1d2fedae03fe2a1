"""What a vLLM engine takes beside weights, slots and KV cache: activations, CUDA graphs, CUDA itself, processes.

None of it is allocated by a formula, so that each has a range and says where its figure is from. vLLM 0.32 profiles one
step of `max_num_batched_tokens` tokens and then one sampling of `max_num_seqs` sequences, and takes their higher peak,
growth outside of torch and CUDA graphs off its share of the GPU (`determine_available_memory` in
vllm/v1/worker/gpu_worker.py). What was there before its first snapshot, CUDA's context and NCCL, lies beside the share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from server.memory import layer_projections
from server.sizing.parts import GPU, MAIN, Device, Form, Part, estimate

GIB, MIB = 2**30, 2**20
SLICES = 3  # q, k and v: the most low-rank products that one layer holds at a time, each in float32
LOGIT_BYTES = (14, 20, 41)  # of one logit at the sampler's peak
GRAPH_BYTES = (3 * MIB, 8 * MIB, 20 * MIB)
CONTEXT_BYTES = (0.3e9, 0.5e9, 0.8e9)
NCCL_BYTES = (0.3e9, 1.0e9, 1.9e9)
GROWTH_BYTES = (0.03e9, 0.1e9, 0.3e9)
PROCESS_BYTES = (2.2e9, 2.5e9, 3.0e9)

ACTIVATIONS = (
    "one step's widest layer, tokens x (2 hidden + 3 intermediate) x dtype + float32 LoRA products, or the sampler's "
    "logits if more: 20 bytes each (vLLM 0.32 without a sort), at most 41 (vllm#10511, vllm#13882 with one)"
)
GRAPHS = "8 MiB a graph, 3 to 20; vllm#39559 estimated 1.62 GiB for 86, vllm#15039 and others less; LoRA doubles them"
GROWTH = "published logs: 0.03 GiB (vllm#13882), 0.2 (vllm#14447), 0.28 (vllm#15039)"
CONTEXT = "CUDA's context, judged: not measured here; outside of vLLM's share"
NCCL = "of vllm#10511 (1.8 GiB more at two GPUs), judged; outside of vLLM's share"
PROCESSES = "measured here: 2.4 to 2.6 GB for the processes of a server and a vLLM on a CPU (docs/engine.md)"


@dataclass(frozen=True, slots=True)
class Batch:
    """vLLM's limits of one step."""

    tokens: int  # max_num_batched_tokens
    sequences: int  # max_num_seqs


def default_batch(device: Device, max_num_seqs: int | None) -> Batch:
    """vLLM's own limits on this device (`get_batch_defaults` in vllm/engine/arg_utils.py, 0.32)."""
    if device.is_cpu:
        batch = Batch(2048, 128)
    elif device.memory_bytes >= 160 * GIB:
        batch = Batch(16_384, 1024)
    elif device.memory_bytes >= 70 * GIB and "a100" not in device.name.lower():
        batch = Batch(8192, 1024)
    else:
        batch = Batch(2048, 256)
    if max_num_seqs is None:
        return batch
    return Batch(max(batch.tokens, max_num_seqs), max_num_seqs)


def step_bytes(config: Mapping[str, Any], form: Form, batch: Batch, max_rank: int, split: int) -> int:
    """One layer's activations of the largest step: hidden and residual, gate and up, and their product."""
    sizes = {name: (inside, outside) for name, inside, outside in layer_projections(config, split)}
    hidden, middle = sizes["gate_proj"]
    numbers = batch.tokens * (2 * hidden + 3 * middle)
    return numbers * form.dtype_bytes + SLICES * batch.tokens * max_rank * 4


def activations(config: Mapping[str, Any], form: Form, device: Device, batch: Batch, max_rank: int) -> Part:
    """The higher of a step's and the sampler's peak. Logits are gathered whole on each GPU's first worker."""
    step = step_bytes(config, form, batch, max_rank, device.count)
    logits = batch.sequences * int(config["vocab_size"])
    low, middle, high = (max(step, logits * each) for each in LOGIT_BYTES)
    place = MAIN if device.is_cpu else GPU
    return estimate("activations", place, 0.8 * low, middle, 1.2 * high, ACTIVATIONS)


def graph_count(batch: Batch) -> int:
    """CUDA graphs that vLLM captures: sizes of mixed steps and of decoding ones, each with and without LoRA."""
    mixed = _capture_sizes(min(2 * batch.sequences, 512, batch.tokens))
    return 2 * (mixed + _capture_sizes(min(batch.sequences, 512)))


def _capture_sizes(largest: int) -> int:
    """How many of 1, 2, 4, then steps of 8 to 256, then of 16 (`_set_cudagraph_sizes` in vllm/config/vllm.py)."""
    small = sum(size <= largest for size in (1, 2, 4))
    return small + len(range(8, min(largest + 1, 256), 8)) + len(range(256, largest + 1, 16))


def within_share(device: Device, batch: Batch) -> Iterator[Part]:
    """What vLLM takes off its share of a GPU before the KV cache, beside weights, slots and activations."""
    if device.is_cpu:
        return
    graphs = graph_count(batch)
    low, middle, high = (graphs * each for each in GRAPH_BYTES)
    yield estimate("cuda_graphs", GPU, low, middle, high, GRAPHS)
    yield estimate("cuda_growth", GPU, *GROWTH_BYTES, GROWTH)


def beside_share(device: Device) -> Iterator[Part]:
    """What is taken whatever vLLM's share is."""
    if device.is_cpu:
        yield estimate("processes", MAIN, *PROCESS_BYTES, PROCESSES)
        return
    yield estimate("cuda_context", GPU, *CONTEXT_BYTES, CONTEXT)
    if device.count > 1:
        yield estimate("nccl", GPU, *NCCL_BYTES, NCCL)
