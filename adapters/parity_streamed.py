"""Logits of a model that does not fit into memory: `python -m adapters.parity_streamed SPEC.json`, as parity_logits.

One decoder layer is in memory at a time, and every run passes through it before the next is read:

    peft        W x + scaling * B (A x)             the reference
    rounded     round(W + scaling * B A)            the rounding floor
    merged      what the merged folder holds
    base, narrow                                    W in float32, and computed in the output dtype

The layer is transformers' own: a model of one layer whose weights are taken from the files. Greedy answers are left
out, as each token of one would read the whole model again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapters.bases import load_base
from adapters.checkpoint import FLOATS, StoredTensor, read_header
from adapters.merge_plan import MergePlan, Update, plan_merge
from adapters.parity_logits import THREADS, Ground, Logits, Run, compared, dtype_floors, kept_positions
from adapters.parity_prompts import KEPT_LOGITS_BYTES, MAX_TOKENS, PROBE, Prompts, open_tokenizer, prompt_sets

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor
    Hidden = dict[str, list[Tensor]]  # of one run, by set: (1, length, hidden) of each sequence

RUNS = ("peft", "rounded", "merged", "base", "narrow")
LAYER_BYTES = 10  # per weight: two layers in float32, the base's rounded and the merged one, and one as it is read
HEAD_BYTES = 64 << 20  # of the output layer's rows in float32, held at once
NO_ANSWERS = "the model does not fit into memory and is read a layer at a time, once"


def main(spec_path: str) -> None:
    import torch

    torch.set_num_threads(THREADS)
    print(json.dumps(streamed(json.loads(Path(spec_path).read_text()))))


def memory_bytes(plan: MergePlan, num_sets: int) -> int:
    """What this needs at most: a layer as read, in float32 and in the output dtype, hidden states, and kept logits."""
    layers: dict[str, int] = {}
    for tensor in (tensor.source for file in plan.files for tensor in file.tensors):
        prefix = ".".join(tensor.name.split(".")[:3]) if tensor.name.startswith("model.layers.") else ""
        layers[prefix] = layers.get(prefix, 0) + (tensor.elements if prefix else 0)
    states = 4 * len(RUNS) * MAX_TOKENS * int(plan.base.config["hidden_size"])
    within = 3 * 4 * MAX_TOKENS * int(plan.base.config["intermediate_size"])  # of the longest prompt there can be
    kept = num_sets * (states + len(RUNS) * KEPT_LOGITS_BYTES)
    return LAYER_BYTES * max(layers.values()) + within + kept + 3 * HEAD_BYTES


def streamed(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The comparisons as parity_logits.probe gives them, without answers."""
    import torch

    plan = plan_merge(Path(spec["adapter"]), load_base(spec["base"]), dtype=spec["plan_dtype"])
    tokenizer = open_tokenizer(spec.get("tokenizer") or spec["base"], spec.get("chat_template"))
    vocab_size = int(plan.base.config["vocab_size"])
    sets = prompt_sets(tokenizer, spec.get("evaluation") or (), vocab_size)
    ground = Ground(sets, {one.name: one.ids for one in sets}, vocab_size, (), ())
    files = sorted(Path(spec["merged"]).glob("*.safetensors"))  # the layout may be another than the base's
    merged = {tensor.name: tensor for path in files for tensor in read_header(path)}
    with torch.no_grad():
        runs = Streamed(plan, merged, spec["dtype"]).runs(ground)
    figures = _figures(sets, ground, runs)
    return {**figures, "served_left_out": NO_ANSWERS} if spec.get("served") else figures


def _figures(sets: Sequence[Prompts], ground: Ground, runs: Mapping[str, Run]) -> dict[str, Any]:
    floors = dtype_floors(runs["base"].logits, runs["narrow"].logits) if "narrow" in runs else {}
    figures: dict[str, Any] = {"forward": "layer_by_layer", "answers_left_out": NO_ANSWERS}
    for one in sets:
        three = (runs["peft"], runs["rounded"], runs["merged"])
        shown = compared(one, ground.sequences[one.name], *three, floors.get(one.name))
        figures.update(shown if one.name == PROBE else {one.name: shown})
    return {**figures, "served_against_peft": None, "served_against_merged": None}


@dataclass(frozen=True)
class Streamed:
    """A base, its adapter and their merged files, as one forward that reads a layer at a time.

    `dtype` is the one that rounding and the narrow run are of; `merged` are the tensors of the merged folder by name.
    """

    plan: MergePlan
    merged: Mapping[str, StoredTensor]
    dtype: str

    @cached_property
    def base(self) -> dict[str, StoredTensor]:
        return {tensor.source.name: tensor.source for file in self.plan.files for tensor in file.tensors}

    @cached_property
    def updates(self) -> dict[str, Update]:
        return {update.module: update for update in self.plan.updates}

    @property
    def names(self) -> tuple[str, ...]:
        return RUNS if self.dtype != "float32" else RUNS[:3]

    def runs(self, ground: Ground) -> dict[str, Run]:
        """Every run's logits at the kept positions, as parity_logits.run gives them."""
        hidden = {name: self._embedded(name, ground) for name in self.names}
        for number in range(int(self.plan.base.config["num_hidden_layers"])):
            self._through_layer(number, hidden)
        return self._logits(hidden, ground)

    def _embedded(self, name: str, ground: Ground) -> Hidden:
        """Only the rows of the tokens that occur are read."""
        source = (self.merged if name == "merged" else self.base)["model.embed_tokens.weight"]
        rows: dict[int, Tensor] = {}
        for token in {token for sequences in ground.sequences.values() for one in sequences for token in one}:
            rows[token] = self._as(name, read_rows(source, token, token + 1))
        return {
            key: [stacked([rows[token] for token in one]) for one in sequences]
            for key, sequences in ground.sequences.items()
        }

    def _through_layer(self, number: int, hidden: dict[str, Hidden]) -> None:
        layer = _OneLayer(self.plan.base.config, number)
        weights = self._layer_weights(self.base, number)
        factors = {
            short: (read_float32(found.a), read_float32(found.b), found.scaling)
            for short, found in ((name.removesuffix(".weight"), self._update(number, name)) for name in weights)
            if found
        }
        hidden["peft"] = layer.run(weights, hidden["peft"], factors)
        if "narrow" in hidden:
            hidden["base"] = layer.run(weights, hidden["base"])
            narrow = {name: self._as("narrow", value) for name, value in weights.items()}
            hidden["narrow"] = layer.run(narrow, hidden["narrow"])
            del narrow
        for name in list(weights):  # in place of W, as PEFT merges: what is rounded is W + scaling * B @ A
            value, factor = weights.pop(name), factors.get(name.removesuffix(".weight"))
            merged = value if factor is None else value + (factor[1] @ factor[0]) * factor[2]
            weights[name] = self._as("rounded", merged)
        hidden["rounded"] = layer.run(weights, hidden["rounded"])
        del weights
        hidden["merged"] = layer.run(self._layer_weights(self.merged, number), hidden["merged"])

    def _layer_weights(self, source: Mapping[str, StoredTensor], number: int) -> dict[str, Tensor]:
        prefix = f"model.layers.{number}."
        return {
            name.removeprefix(prefix): read_float32(tensor)
            for name, tensor in source.items()
            if name.startswith(prefix) and not name.endswith("rotary_emb.inv_freq")
        }

    def _update(self, number: int, name: str) -> Update | None:
        return self.updates.get(f"model.layers.{number}.{name.removesuffix('.weight')}")

    def _as(self, name: str, values: Tensor) -> Tensor:
        """Weights as this run has them: `rounded` rounds them to the output dtype, `narrow` keeps them in it."""
        import torch

        dtype = getattr(torch, self.dtype)
        if name == "rounded":
            return values.to(dtype).float()
        return values.to(dtype) if name == "narrow" else values

    def _logits(self, hidden: Mapping[str, Hidden], ground: Ground) -> dict[str, Run]:
        kept = {key: kept_positions(rows, ground.vocab_size) for key, rows in ground.sequences.items()}
        return {
            name: Run({key: self._of_set(name, rows, kept[key]) for key, rows in states.items()})
            for name, states in hidden.items()
        }

    def _of_set(self, name: str, states: list[Tensor], kept: list[list[int]]) -> Logits:
        """The logits of one run over one set; the output layer is read in blocks of rows."""
        import torch

        counts = [len(places) for places in kept if places]
        if not counts:
            return []
        source, config = self.merged if name == "merged" else self.base, self.plan.base.config
        ends = torch.cat([state[0, places] for state, places in zip(states, kept, strict=True) if places])
        norm = self._as(name, read_float32(source["model.norm.weight"]))
        ends = normed(ends, norm, float(config.get("rms_norm_eps", 1e-6)))
        logits = np.empty((len(ends), int(config["vocab_size"])), np.float32)
        for first, block in self._head_blocks(source):
            part = torch.nn.functional.linear(ends, self._as(name, block))
            logits[:, first : first + len(block)] = part.float().numpy()
        return np.split(logits, np.cumsum(counts)[:-1])

    def _head_blocks(self, source: Mapping[str, StoredTensor]) -> Iterator[tuple[int, Tensor]]:
        tied = self.plan.base.is_tied or "lm_head.weight" not in source
        head = source["model.embed_tokens.weight" if tied else "lm_head.weight"]
        step = max(1, HEAD_BYTES // (4 * head.shape[1]))
        for first in range(0, head.shape[0], step):
            yield first, read_rows(head, first, min(head.shape[0], first + step))


class _OneLayer:
    """transformers' model of this architecture with one decoder layer, the weights of which come with each run."""

    def __init__(self, config: Mapping[str, Any], number: int) -> None:
        import torch
        from transformers import AutoConfig, AutoModel

        settings = {**config, "num_hidden_layers": 1, "vocab_size": 1, "pad_token_id": None}
        whole = AutoConfig.for_model(**config)
        settings["layer_types"] = [whole.layer_types[number]]
        one = AutoConfig.for_model(**settings)
        with torch.device("meta"):
            self.model = AutoModel.from_config(one, dtype=torch.float32)
        self.model.norm = torch.nn.Identity()  # the last norm belongs to the whole model
        self.model.rotary_emb = type(self.model.rotary_emb)(config=one)
        self.model.eval()
        self.factors: Mapping[str, tuple[Tensor, Tensor, float]] = {}
        for name, module in self.model.layers[0].named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(self._adds(name))

    def run(
        self,
        weights: Mapping[str, Tensor],
        states: Hidden,
        factors: Mapping[str, tuple[Tensor, Tensor, float]] | None = None,
    ) -> Hidden:
        """The hidden states after the layer; `factors` are (A, B, scaling) by projection. Every weight is needed."""
        self.model.layers[0].load_state_dict(weights, assign=True, strict=True)
        self.factors = factors or {}
        return {
            key: [self.model(inputs_embeds=state, use_cache=False).last_hidden_state for state in rows]
            for key, rows in states.items()
        }

    def _adds(self, name: str) -> Any:
        def hook(_module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if name not in self.factors:
                return None
            a, b, scaling = self.factors[name]
            return output + (inputs[0] @ a.T) @ b.T * scaling

        return hook


def normed(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of (length, hidden), in float32 as the model has it (https://arxiv.org/abs/1910.07467)."""
    wide = states.float()
    scaled = wide * (wide.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
    return weight * scaled.to(states.dtype)


def stacked(rows: list[Tensor]) -> Tensor:
    """(1, length, hidden) of rows that are (1, hidden) each."""
    import torch

    return torch.cat(rows)[None]


def read_float32(stored: StoredTensor) -> Tensor:
    """A whole tensor, in float32."""
    return read_rows(stored, 0, stored.shape[0])


def read_rows(stored: StoredTensor, first: int, end: int) -> Tensor:
    """Rows first..end of a tensor, in float32. Raises ValueError where the file has ended before."""
    import torch

    width = stored.size_bytes // stored.shape[0]
    raw = bytearray((end - first) * width)
    with stored.path.open("rb") as file:
        file.seek(stored.begin + first * width)
        if file.readinto(raw) != len(raw):
            raise ValueError(f"{stored.path} ended early: it changed during the export")
    values = torch.frombuffer(raw, dtype=getattr(torch, FLOATS[stored.dtype]))
    return values.reshape(end - first, *stored.shape[1:]).float()


if __name__ == "__main__":
    main(sys.argv[1])
