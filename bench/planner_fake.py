"""Peaks of our trainer's passes by torch's own accounting, on fake tensors: real code, real shapes, no numbers.

`MemTracker` also takes snapshots by module and hooks every parameter's gradient, which frozen ones refuse; that is left
out, and the total is the same. Layers are few and the widths are real.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from adapters.bases import PROJECTIONS
from training.planner.peak import peak
from training.planner.sizes import Architecture, find
from training.planner.weights import ADAMW
from training.planner.work import Method, Pass

Case = tuple[Architecture, Method, Pass]
LORA = (16, PROJECTIONS)


class Tracker(MemTracker):  # type: ignore[no-untyped-call]
    """MemTracker's count of every buffer, without its snapshots by module, which take most of its time."""

    def _pre_fw_hook(self, *args: Any) -> None:
        pass

    def _post_fw_hook(self, *args: Any) -> None:
        pass

    def _pre_bw_hook(self, *args: Any) -> None:
        pass

    def _post_bw_hook(self, *args: Any) -> None:
        pass


def cases() -> Iterator[Case]:
    """At least thirty: sizes x method x precision x tokens x checkpointing."""
    for name in ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B", "Qwen3-0.6B", "Qwen3-8B"):
        for checkpoints in (False, True):
            for itemsize in (2, 4):
                yield _case(name, Method(*LORA, itemsize, checkpoints=checkpoints), Pass(4, 64, 448, 1856, 600))
            yield _case(name, Method(0, (), 4, checkpoints=checkpoints), Pass(2, 0, 512, 1000, 300))
    for name in ("Qwen2.5-3B", "Qwen3-4B"):
        yield _case(name, Method(*LORA, 2), Pass(1, 0, 2048, 2048, 1024))
        yield _case(name, Method(*LORA, 2, checkpoints=True), Pass(8, 120, 40, 440, 96))
        yield _case(name, Method(8, ("q_proj", "v_proj"), 4), Pass(16, 30, 20, 300, 96))


def _case(name: str, method: Method, work: Pass, layers: int = 2) -> Case:
    return dataclasses.replace(find(name), layers=layers), method, work


def predicted_bytes(case: Case, accumulation: int = 1) -> int:
    """What the planner says."""
    of, method, work = case
    return peak(of, method, work, ADAMW, accumulation).total


def tracked_bytes(case: Case, accumulation: int = 1) -> int:
    """The peak of one optimizer step with the optimizer's state there from the start, as from the second step on."""
    of, method, work = case
    model = fake_model(of, method)
    with FakeTensorMode():
        _materialise(model)
        trained = [value for value in model.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        for value in trained:
            optimizer.state[value] = {
                "step": torch.tensor(0.0),  # a constant, which fake tensors can read
                "exp_avg": torch.zeros_like(value),
                "exp_avg_sq": torch.zeros_like(value),
            }
        batch = _batch(work)
        tracker = Tracker()
        tracker.track_external(model, optimizer)
        with tracker:
            _step(model, optimizer, trained, batch, accumulation, tracker)
        snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return int(snapshot["Total"])


def fake_model(of: Architecture, method: Method) -> Any:
    """transformers' model of that shape on the meta device, with PEFT's adapter on it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from training.packed import ATTENTION, register_attention

    register_attention()
    dtype = torch.float32 if method.itemsize == 4 else torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(of), attn_implementation=ATTENTION, dtype=dtype)
        if not method.trains_all:
            lora = LoraConfig(r=method.rank, target_modules=list(method.targets), task_type="CAUSAL_LM")
            model = get_peft_model(model, lora)
    if method.checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def config_of(of: Architecture) -> Any:
    """transformers' config of the architecture."""
    from transformers import Qwen2Config, Qwen3Config

    kind = Qwen3Config if of.has_head_norms else Qwen2Config
    return kind(
        vocab_size=of.vocabulary,
        hidden_size=of.hidden,
        intermediate_size=of.intermediate,
        num_hidden_layers=of.layers,
        num_attention_heads=of.heads,
        num_key_value_heads=of.key_value_heads,
        head_dim=of.head_dim,
        tie_word_embeddings=of.is_tied,
        max_position_embeddings=of.context_tokens,
        use_cache=False,
    )


def _step(model: Any, optimizer: Any, trained: list[Any], batch: dict[str, Any], passes: int, tracker: Tracker) -> None:
    from training.loss import supervised_loss_sum

    for _ in range(passes):
        tracker.reset_mod_stats()
        loss = supervised_loss_sum(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()


def _batch(work: Pass) -> dict[str, Any]:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.long)

    return {
        "input_ids": zeros(1, work.tokens),
        "position_ids": zeros(1, work.tokens),
        "predicting": zeros(work.supervised),
        "shift_labels": zeros(work.supervised),
        "gather": zeros(work.rows, work.longest_rest),
        "scatter": zeros(work.tokens - work.prefix),
        "prefix": work.prefix,
    }


def _materialise(model: torch.nn.Module) -> None:
    """Fake tensors for the meta ones, tied weights once."""
    made: dict[int, torch.nn.Parameter] = {}
    kept = []
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                kept.append(value)
                if id(value) not in made:
                    empty = torch.empty(value.shape, dtype=value.dtype)
                    made[id(value)] = torch.nn.Parameter(empty, requires_grad=value.requires_grad)
                module._parameters[name] = made[id(value)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    del kept
