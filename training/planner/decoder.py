"""One pass of our trainer through a Qwen2 or Qwen3 decoder, as a program on the tape: layers, packed attention, loss.

It follows transformers' decoder layer, PEFT's LoRA layer, `training.packed` and `training.loss` statement by statement,
because a buffer lives as long as the name that holds it. `python -m bench planner` compares it with torch's own
accounting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from training.planner.attention import attend, rotated
from training.planner.loss import cross_entropy, supervised
from training.planner.operators import (
    FLOAT32_BYTES,
    Frozen,
    activation,
    added,
    frozen_linear,
    lora_linear,
    norm,
    product,
    trained_linear,
)
from training.planner.sizes import Architecture
from training.planner.tape import GRADIENTS, Arena, Node, Storage, Value, constant, leaf, made, new_node, run_backward
from training.planner.work import Method, Pass

INDEX_BYTES = 8


@dataclass
class Layer:
    """The trained weights of one layer: LoRA's pair of each projection, or projections, biases and norms themselves."""

    pairs: dict[str, tuple[Value, Value]] = field(default_factory=dict)
    weights: dict[str, Value] = field(default_factory=dict)

    @property
    def leaves(self) -> list[Value]:
        return [value for pair in self.pairs.values() for value in pair] + list(self.weights.values())

    def silent(self) -> Layer:
        """The same weights, for a pass that saves nothing for a gradient."""
        pairs = {name: (replace(down, node=None), replace(up, node=None)) for name, (down, up) in self.pairs.items()}
        return Layer(pairs, {name: replace(value, node=None) for name, value in self.weights.items()})


class Decoder:
    """A decoder whose trained weights are leaves on one arena. Frozen weights are not on it."""

    def __init__(self, arena: Arena, architecture: Architecture, method: Method) -> None:
        self.arena, self.of, self.method = arena, architecture, method
        self.layers = [self._layer() for _ in range(architecture.layers)]
        self.embedding = self.output = self.norm = None
        if method.trains_all:
            table = architecture.vocabulary * architecture.hidden
            self.embedding = self._leaf(table)
            self.output = self.embedding if architecture.is_tied else self._leaf(table)
            self.norm = self._leaf(architecture.hidden)

    @property
    def leaves(self) -> Iterator[Value]:
        """Every trained weight once."""
        for layer in self.layers:
            yield from layer.leaves
        yield from dict.fromkeys(value for value in (self.embedding, self.output, self.norm) if value is not None)

    def train(self, work: Pass) -> None:
        """One forward and backward pass; gradients stay with their leaves."""
        loss = self.loss(work)
        run_backward(loss, self.arena.new(FLOAT32_BYTES))

    def give_gradients(self) -> None:
        """Every leaf has its gradient, as after the first of several passes of a step."""
        for value in self.leaves:
            if value.node is not None:
                value.node.gradient = self.arena.new(value.size, GRADIENTS)

    def loss(self, work: Pass) -> Value:
        """The summed loss of a pass at its supervised positions."""
        batch = self.arena.new(INDEX_BYTES * (2 * work.tokens + 3 * work.supervised + work.padded_rest + work.tokens))
        chosen = supervised(self._hidden(work), work, self.of.hidden)
        result = cross_entropy(chosen, work, self.of, self.output, self.method.itemsize)
        del batch
        return result

    def _hidden(self, work: Pass) -> Value:
        count, itemsize = work.tokens * self.of.hidden, self.method.itemsize
        hidden = constant(self.arena, count, itemsize)
        if self.embedding is not None:
            hidden = made(self.arena, count, itemsize, [self.embedding])
        turns = [self.arena.new(work.tokens * self.of.head_dim * itemsize) for _ in range(2)]  # cosine and sine
        for layer in self.layers:
            hidden = self._run(layer, hidden, work)
        del turns
        return norm(hidden, self.of.hidden, self.norm)

    def _run(self, layer: Layer, hidden: Value, work: Pass) -> Value:
        """One layer; where layers are checkpointed it saves its input alone and is run again in the backward pass."""
        if not self.method.checkpoints:
            return self._decode(layer, hidden, work)
        result = self._decode(layer.silent(), replace(hidden, node=None), work)
        entry, count, is_wanted = hidden.storage, hidden.count, hidden.node is not None

        def backward(gradient: Storage) -> Sequence[Storage | None]:
            start = Value(self.arena, count, self.method.itemsize, entry, Node(0, (), None) if is_wanted else None)
            again = self._decode(layer, start, work)
            again.storage = gradient  # the output itself is not made again
            run_backward(again, gradient)
            return [start.node.gradient if start.node is not None else None]

        result.node = new_node(self.arena, (hidden.node,), backward, (entry,))
        return result

    def _decode(self, layer: Layer, hidden: Value, work: Pass) -> Value:
        residual = hidden
        hidden = norm(hidden, self.of.hidden, layer.weights.get("first_norm"))
        hidden = self._attention(layer, hidden, work)
        hidden = added(residual, hidden)
        residual = hidden
        hidden = norm(hidden, self.of.hidden, layer.weights.get("second_norm"))
        hidden = self._feed_forward(layer, hidden, work)
        return added(residual, hidden)

    def _attention(self, layer: Layer, hidden: Value, work: Pass) -> Value:
        query = self._project(layer, "q_proj", hidden, work)
        if self.of.has_head_norms:
            query = norm(query, self.of.head_dim, layer.weights.get("query_norm"))
        key = self._project(layer, "k_proj", hidden, work)
        if self.of.has_head_norms:
            key = norm(key, self.of.head_dim, layer.weights.get("key_norm"))
        value = self._project(layer, "v_proj", hidden, work)
        query, key = rotated(query), rotated(key)
        return self._project(layer, "o_proj", attend(query, key, value, work, self.of), work)

    def _feed_forward(self, layer: Layer, hidden: Value, work: Pass) -> Value:
        gate = activation(self._project(layer, "gate_proj", hidden, work))
        inner = product(gate, self._project(layer, "up_proj", hidden, work))
        del gate
        return self._project(layer, "down_proj", inner, work)

    def _project(self, layer: Layer, name: str, value: Value, work: Pass) -> Value:
        out_width, in_width = self.of.projections[name]
        if name in layer.weights:
            return trained_linear(value, work.tokens, layer.weights[name], out_width, layer.weights.get(f"{name}.bias"))
        unpacked = out_width * in_width * self.method.itemsize if self.method.is_quantised else 0
        weight = Frozen(out_width, unpacked)
        if name in layer.pairs:
            return lora_linear(value, work.tokens, weight, layer.pairs[name], self.method.rank)
        return frozen_linear(value, work.tokens, weight)

    def _layer(self) -> Layer:
        if self.method.trains_all:
            return Layer(weights={name: self._leaf(count) for name, count in self.of.layer_tensors().items()})
        pairs = {}
        for name in self.method.targets:
            out_width, in_width = self.of.projections[name]
            pairs[name] = (self._leaf(self.method.rank * in_width), self._leaf(self.method.rank * out_width))
        return Layer(pairs)

    def _leaf(self, count: int) -> Value:
        return leaf(self.arena, count, FLOAT32_BYTES)
