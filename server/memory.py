"""What an engine's memory goes to, by arithmetic over the base's config.json and the engine's flags: nothing is loaded.

    slot      = LoRA dtype * sum over the seven projections of every layer of (rank * in + out * rank)
    slots     = max_loras slots; that is one more than are admitted. On a CPU's kernel a slot is a pointer at a staged
                adapter, and takes nothing
    KV block  = KV dtype * 2 * layers * key-value heads * head size * tokens of a block
    sequence  = the blocks that hold the context length, and the one that vLLM keeps for itself

So vLLM 0.32 allocates them (`create_lora_weights` in vllm/lora/layers, `FullAttentionSpec` in vllm/v1): each of q, k,
v, gate and up has an A of its own in the packed layers. Split over N tensor-parallel workers, the outputs of the column
layers and the inputs of o and down are divided, the other side is whole in each worker unless LoRAs are fully sharded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adapters.bases import BaseModel, weight_files
from adapters.checkpoint import FLOATS, read_header

COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # split by output; o_proj and down_proj by input
EMBEDDINGS, OUTPUT_LAYER = "model.embed_tokens.weight", "lm_head.weight"
SHORTEST_STORED_BYTES = 2  # of a number in an adapter's file
TILE_RANK = 8  # STEP of vllm_plugin/kernel.py


@dataclass(frozen=True, slots=True)
class Layout:
    """How an engine is started, as far as its memory goes. None is what cannot be known from here."""

    is_cpu: bool
    max_loras: int
    max_rank: int
    staged_limit: int
    dtype_bytes: int | None  # of a weight
    lora_bytes: int | None  # of a number in a slot
    kv_bytes: int | None  # of a number in the KV cache
    context_tokens: int | None
    block_tokens: int | None
    tensor_parallel: int | None = 1
    pipeline_parallel: int | None = 1
    is_fully_sharded: bool = False
    slots_are_pointers: bool = False  # on a CPU where LoRA runs on the kernel alone
    has_plain_weights: bool = True  # the checkpoint's, each in `dtype_bytes`
    kv_cache_bytes: int | None = None  # where it is set; else it is what the GPU has left
    memory_fraction: float | None = None  # of a GPU, that vLLM may take

    @property
    def workers(self) -> int | None:
        if self.tensor_parallel is None or self.pipeline_parallel is None:
            return None
        return self.tensor_parallel * self.pipeline_parallel


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one engine, all of its workers together; None is unknown."""

    layout: Layout
    weights_bytes: int | None
    slot_bytes: int | None  # one slot
    rank_bytes: int | None  # a staged adapter of all seven projections takes this for each rank
    token_bytes: int | None  # one token in the KV cache

    @property
    def slots_bytes(self) -> int | None:
        return None if self.slot_bytes is None else self.layout.max_loras * self.slot_bytes

    @property
    def block_bytes(self) -> int | None:
        if self.token_bytes is None or self.layout.block_tokens is None:
            return None
        return self.token_bytes * self.layout.block_tokens

    @property
    def kv_cache_bytes(self) -> int | None:
        """What the KV cache takes of the bytes that are set for it: whole blocks."""
        given, block = self.layout.kv_cache_bytes, self.block_bytes
        return None if given is None or block is None else given // block * block

    @property
    def sequence_bytes(self) -> int | None:
        """The least KV cache in which one sequence of the context length can be answered to its end."""
        tokens, block, size = self.layout.context_tokens, self.layout.block_tokens, self.block_bytes
        if tokens is None or block is None or size is None:
            return None
        return (-(-tokens // block) + 1) * size

    @property
    def stage_most_bytes(self) -> int | None:
        """What staged adapters take when there are as many as may be, of the largest rank."""
        return None if self.rank_bytes is None else self.layout.staged_limit * self.layout.max_rank * self.rank_bytes

    def staged_bytes(self, rank: int, file_bytes: int) -> int | None:
        """At most what an adapter takes among the staged: all seven projections, or fewer where its file is small.

        On a CPU it lies there packed for the kernel, whose matrices A have a multiple of TILE_RANK columns.
        """
        if self.rank_bytes is None or self.layout.lora_bytes is None or self.layout.workers is None:
            return None
        taken = -(-rank // TILE_RANK) * TILE_RANK if self.layout.is_cpu else rank
        by_file = file_bytes * self.layout.lora_bytes * self.layout.workers // SHORTEST_STORED_BYTES
        return min(taken * self.rank_bytes, by_file * taken // max(1, rank))


def plan_memory(layout: Layout, base: BaseModel) -> MemoryPlan:
    """The memory of an engine on this base; reads the headers of its weight files. Raises BaseInvalid."""
    return plan_sizes(layout, base.config, weights_bytes(base, layout))


def plan_sizes(layout: Layout, config: Mapping[str, Any], weights: int | None) -> MemoryPlan:
    """The same for a base that is known by its config and the bytes of its weights, over all workers."""
    lora, workers = layout.lora_bytes, layout.workers
    slot = slot_elements(config, layout)
    token = token_elements(config, layout)
    layer = sum(inside + outside for _, inside, outside in layer_projections(config, 1))
    sizes = layer * int(config["num_hidden_layers"])
    return MemoryPlan(
        layout=layout,
        weights_bytes=weights,
        slot_bytes=0 if layout.slots_are_pointers else None if slot is None or lora is None else slot * lora,
        rank_bytes=None if lora is None or workers is None else sizes * lora * workers,
        token_bytes=None if token is None or layout.kv_bytes is None else token * layout.kv_bytes,
    )


def weights_bytes(base: BaseModel, layout: Layout) -> int | None:
    """The checkpoint's numbers in the dtype that is served; None for a quantised base and one without weights.

    On a CPU vLLM packs every matrix for its products and drops the original, but for embeddings and output layer: of
    each it keeps both, and packs the output layer on its own also where it is the embeddings.
    """
    files = weight_files(base.folder)
    if layout.dtype_bytes is None or not layout.has_plain_weights or not files:
        return None
    tensors = [tensor for file in files for tensor in read_header(file)]
    if any(tensor.dtype not in FLOATS for tensor in tensors):
        return None
    loaded = {tensor.name: tensor.elements for tensor in tensors}
    if base.is_tied:
        loaded.pop(OUTPUT_LAYER, None)
    embedded = loaded.get(EMBEDDINGS, 0)
    packed = vocabulary_copies(embedded, loaded.get(OUTPUT_LAYER, embedded)) if layout.is_cpu else 0
    return (sum(loaded.values()) + packed) * layout.dtype_bytes


def vocabulary_copies(embedding_elements: int, output_elements: int) -> int:
    """Numbers that a CPU keeps in packed copies beside embeddings and output layer, of a tied one too."""
    return embedding_elements + output_elements


def slot_elements(config: Mapping[str, Any], layout: Layout) -> int | None:
    """Numbers in one slot, over all workers."""
    split = layout.tensor_parallel
    if split is None:
        return None
    rank, divided = layout.max_rank, split if layout.is_fully_sharded else 1
    each = 0
    for name, inside, outside in layer_projections(config, split):
        if name in COLUMN:
            each += rank // divided * inside + outside * rank
        else:
            each += rank * inside + outside // divided * rank
    return each * int(config["num_hidden_layers"]) * split


def token_elements(config: Mapping[str, Any], layout: Layout) -> int | None:
    """Numbers that one token has in the KV cache, over all workers; None with a sliding window."""
    split = layout.tensor_parallel
    if split is None or config.get("use_sliding_window"):
        return None
    _, key_value_heads, head = _heads(config)
    return 2 * int(config["num_hidden_layers"]) * max(1, key_value_heads // split) * head * split


def layer_projections(config: Mapping[str, Any], split: int) -> Iterator[tuple[str, int, int]]:
    """(name, inputs, outputs) of one layer's projections in one of `split` workers."""
    hidden, middle = int(config["hidden_size"]), int(config["intermediate_size"])
    heads, key_value_heads, head = _heads(config)
    query, key_value = heads * head // split, max(1, key_value_heads // split) * head
    yield "q_proj", hidden, query
    yield "k_proj", hidden, key_value
    yield "v_proj", hidden, key_value
    yield "o_proj", query, hidden
    yield "gate_proj", hidden, middle // split
    yield "up_proj", hidden, middle // split
    yield "down_proj", middle // split, hidden


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Query heads, key-value heads, and the size of one."""
    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    return heads, int(config.get("num_key_value_heads") or heads), head
