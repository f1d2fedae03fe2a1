"""Reads back what PEFT merged, and holds every element of every tensor to formulas computed apart from PEFT.

For a tensor W of the base (or what was saved in its place: trained modules, biases, embeddings), in float64:

    low-rank updates      W + scaling * B @ A            of embeddings W + scaling * (B @ A)^T
    DoRA                  m * V / |V|, V the line above; norms of each row, of embeddings of each column
    lora_bias             bias + scaling * (bias of B)
    trained tokens        their rows are those that were saved
    everything else       W

rounded once to the dtype. PEFT computes in float32, so an element may be off by half a unit in its last place and by
what float32 sums may lose: of the rank's products, and of the squares in a norm, which torch adds up in at least eight
lanes. Rows are read in blocks, so memory is bounded whatever the size of the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from adapters.bases import BaseModel, weight_files
from adapters.checkpoint import StoredTensor, read_checkpoint, read_header
from adapters.errors import MergeFailed
from adapters.merge_plan import ADAPTER_CONFIG, ADAPTER_WEIGHTS, by_pattern
from adapters.readback import (
    CHECK_ELEMENTS,
    EPSILON32,
    Factors,
    Floats,
    TensorCheck,
    WeightsReport,
    compare,
    in_threads,
    read_floats,
    verified,
)
from adapters.tensor_names import TRAINED_COPY, unwrapped

EMBEDDINGS, HEAD = "model.embed_tokens", "lm_head"
MAGNITUDE = ".lora_magnitude_vector"
NORM_LANES = 8


@dataclass(frozen=True)
class Formula:
    """What one tensor must be. `start` is W; of the rest None is what does not apply to it."""

    name: str
    start: StoredTensor
    scaling: float = 0.0
    a: StoredTensor | None = None
    b: StoredTensor | None = None
    is_embedding: bool = False
    is_dora: bool = False
    magnitude: StoredTensor | None = None  # of DoRA; as PEFT begins with it, |W|, where none was saved
    bias: StoredTensor | None = None  # of B
    rows: Mapping[int, int] = field(default_factory=dict)  # row of the tensor -> row of `trained`
    trained: StoredTensor | None = None
    is_base: bool = True  # W is the base's own

    @property
    def is_copy(self) -> bool:
        return self.is_base and self.a is None and self.bias is None and self.trained is None

    @property
    def columns(self) -> int:
        return self.start.shape[1] if len(self.start.shape) == 2 else 1

    @cached_property
    def factors(self) -> Factors | None:
        """scaling * B and A, so that their product lies as W does."""
        if self.a is None or self.b is None:
            return None
        a, b = (read_floats(one).reshape(one.shape) for one in (self.a, self.b))
        return Factors.of_floats(a.T, b.T, self.scaling) if self.is_embedding else Factors.of_floats(b, a, self.scaling)

    @cached_property
    def column_factor(self) -> Floats | None:
        """m / |V| of every column, of DoRA on embeddings."""
        if not (self.is_dora and self.is_embedding):
            return None
        before = after = np.zeros(self.columns)
        for first, end in blocks(self):
            weight, update, _ = self.low_rank(first, end)
            before = before + np.square(weight).sum(axis=0)
            after = after + np.square(weight + update).sum(axis=0)
        magnitude = np.sqrt(before) if self.magnitude is None else read_floats(self.magnitude)
        return np.asarray(magnitude / np.sqrt(after))

    def low_rank(self, first: int, end: int) -> tuple[Floats, Floats, Floats]:
        """Rows of W, of its low-rank update, and (rows, 1) of what float32 may lose of that."""
        span = (first * self.columns, end * self.columns)
        weight = read_floats(self.start, span).reshape(-1, self.columns)
        if self.factors is None:
            return weight, np.zeros_like(weight), np.zeros((len(weight), 1))
        held = self.factors.rows(first, end)
        return weight, np.asarray(held.b @ held.a), held.slack

    def exact(self, first: int, end: int) -> tuple[Floats, Floats, Floats]:
        """Rows of W, of what is added to it in all, and (rows, 1) of what float32 may lose of that."""
        weight, update, slack = self.low_rank(first, end)
        whole = weight + update
        if self.is_dora:
            lost = slack + 2 * EPSILON32 * np.abs(whole).max(axis=1, keepdims=True)
            factor = self._dora_factor(weight, whole, first)
            whole = whole * factor
            summed = self.start.shape[0] if self.is_embedding else self.columns
            in_norm = EPSILON32 * (summed / NORM_LANES + 16)
            slack = lost * np.abs(factor).max(axis=1, keepdims=True) + in_norm * np.abs(whole).max(
                axis=1, keepdims=True
            )
        if self.bias is not None:
            added = self.scaling * read_floats(self.bias)[first:end, None]
            whole, slack = whole + added, slack + 2 * EPSILON32 * np.abs(added)
        if self.trained is not None:
            mine = [row for row in self.rows if first <= row < end]
            for row in mine:
                at = self.rows[row] * self.columns
                whole[row - first] = read_floats(self.trained, (at, at + self.columns))
        return weight, whole - weight, slack

    def _dora_factor(self, weight: Floats, whole: Floats, first: int) -> Floats:
        """m / |V|: (rows, 1), or of embeddings (1, columns)."""
        if self.column_factor is not None:
            return self.column_factor[None, :]
        before, after = (np.sqrt(np.square(rows).sum(axis=1, keepdims=True)) for rows in (weight, whole))
        if self.magnitude is None:
            return np.asarray(before / after)
        return np.asarray(read_floats(self.magnitude)[first : first + len(whole), None] / after)


def blocks(formula: Formula) -> list[tuple[int, int]]:
    """(first row, end row) of every block."""
    rows, step = formula.start.shape[0], max(1, CHECK_ELEMENTS // formula.columns)
    return [(first, min(rows, first + step)) for first in range(0, rows, step)]


def verify_peft_merge(
    adapter: Path, base: BaseModel, folder: Path, dtype: str, progress: Callable[[int], None] | None = None
) -> WeightsReport:
    """Read every tensor in `folder` back and compare it with what base and adapter give in `dtype` (F32, BF16, F16).

    `progress` gets the bytes of each tensor as it is done. Raises MergeFailed for a tensor of the adapter that no
    formula here has a place for.
    """
    written = {tensor.name: tensor for path in weight_files(folder) for tensor in read_header(path)}
    formulas = formulas_of(adapter, base, HEAD + ".weight" in written)
    report = WeightsReport()
    report.problems += [f"{name} is in only one of plan and export" for name in sorted(written.keys() ^ formulas)]
    pairs = [(formulas[name], written[name]) for name in sorted(written.keys() & formulas.keys())]
    for (_, stored), found in zip(pairs, in_threads(lambda pair: _verify(*pair, dtype), pairs), strict=True):
        report.add(found)
        if progress:
            progress(stored.size_bytes)
    return report


def _verify(formula: Formula, written: StoredTensor, dtype: str) -> WeightsReport:
    is_copy = formula.is_copy and formula.start.dtype == dtype
    check = None if is_copy else lambda: _check_changed(replace(formula), written, dtype)  # a copy: its factors go too
    return verified(formula.name, formula.start, written, dtype, check, "what base and adapter give")


def _check_changed(formula: Formula, written: StoredTensor, dtype: str) -> TensorCheck:
    check = TensorCheck(formula.name)
    for first, end in blocks(formula):
        span = (first * formula.columns, end * formula.columns)
        merged = read_floats(written, span).reshape(-1, formula.columns)
        weight, update, slack = formula.exact(first, end)
        compare(check, weight, merged, update, slack, dtype)
    return check


def formulas_of(adapter: Path, base: BaseModel, has_head: bool) -> dict[str, Formula]:
    """Name -> formula of every tensor of the merged model; `has_head` where its output layer is a tensor of its own.

    Raises MergeFailed for tensors of the adapter without a place.
    """
    held = Held(json.loads((adapter / ADAPTER_CONFIG).read_bytes()), read_header(adapter / ADAPTER_WEIGHTS))
    sources = {tensor.name: tensor for shard in read_checkpoint(base).values() for tensor in shard}
    sources = {name: tensor for name, tensor in sources.items() if not name.endswith("rotary_emb.inv_freq")}
    embedding, head = f"{EMBEDDINGS}.weight", f"{HEAD}.weight"
    if base.is_tied:
        sources.pop(head, None)
        if has_head:
            sources[head] = sources[embedding]
    formulas = {name: held.formula(name, tensor) for name, tensor in sources.items()}
    if base.is_tied and has_head and formulas[head].is_copy and formulas[embedding].trained is not None:
        tokens = formulas[embedding]  # PEFT ties trained tokens of an output layer that was tied
        formulas[head] = held.formula(head, sources[head], tokens)
    if held.left:
        raise MergeFailed(f"The adapter has tensors without a place in the read-back: {sorted(held.left)[:5]}.")
    return formulas


class Held:
    """An adapter's tensors by the name of what they change; `left` are those that no formula has taken yet."""

    def __init__(self, config: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> None:
        self.config = config
        names = {tensor: TRAINED_COPY.sub("", unwrapped(tensor.name)) for tensor in tensors}
        self.tensors = {name.replace(f"{MAGNITUDE}.weight", MAGNITUDE): tensor for tensor, name in names.items()}
        self.left = set(self.tensors)

    def _take(self, name: str) -> StoredTensor | None:
        self.left.discard(name)
        return self.tensors.get(name)

    def formula(self, name: str, source: StoredTensor, tokens: Formula | None = None) -> Formula:
        """What becomes of the base's tensor `source`; trained tokens are those of `tokens` where that is given."""
        module, _, part = name.rpartition(".")
        saved = self._take(name)
        start, scaling = saved or source, self._scaling(module)
        if part == "bias":
            return Formula(name, start, scaling, bias=self._take(f"{module}.lora_B.bias"), is_base=saved is None)
        a, b = self._take(f"{module}.lora_embedding_A"), self._take(f"{module}.lora_embedding_B")
        is_embedding = a is not None
        if not is_embedding:
            a, b = self._take(f"{module}.lora_A.weight"), self._take(f"{module}.lora_B.weight")
        trained = tokens.trained if tokens else self._take(f"{module}.token_adapter.trainable_tokens_delta")
        return Formula(
            name,
            start,
            scaling,
            a,
            b,
            is_embedding,
            a is not None and bool(self.config.get("use_dora")),
            self._take(f"{module}{MAGNITUDE}"),
            rows=(tokens.rows if tokens else self._rows(module)) if trained else {},
            trained=trained,
            is_base=saved is None,
        )

    def _scaling(self, module: str) -> float:
        """lora_alpha / rank, or / sqrt(rank) with rsLoRA, of this module."""
        rank = int(by_pattern(self.config.get("rank_pattern"), module, self.config["r"]))
        alpha = float(by_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"]))
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    def _rows(self, module: str) -> dict[int, int]:
        """Token -> its row in what was saved."""
        indices = self.config.get("trainable_token_indices") or []
        if isinstance(indices, Mapping):
            indices = next((ids for key, ids in indices.items() if module == key or module.endswith(f".{key}")), [])
        return {int(token): row for row, token in enumerate(indices)}
