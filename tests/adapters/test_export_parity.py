"""The proof of an export: one wrong element fails it, and what was served is held against peft and merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.bases import BaseModel
from adapters.errors import (
    ParityFailed,
)
from adapters.export import ExportRequest, export
from adapters.merge import plan_merge
from adapters.parity import compare_logits
from adapters.parity_logits import probe
from adapters.parity_served import read_answer
from adapters.parity_verdict import logits_problems
from adapters.staging import SUFFIX
from tests.adapters.exporting import MERGED, left_in
from tests.fixtures.adapters import (
    write_adapter,
)


def tampered(request: ExportRequest, change: Callable[[bytearray], None]) -> Callable[[dict[str, Any]], None]:
    """Changes the merged weights after they were written, before they are checked."""

    def report(message: dict[str, Any]) -> None:
        if message == MERGED:
            (folder,) = request.out.parent.glob(f".*{SUFFIX}")
            content = bytearray((folder / "model.safetensors").read_bytes())
            change(content)
            (folder / "model.safetensors").write_bytes(content)

    return report


def test_one_wrong_element_fails_parity_and_nothing_is_exported(request_for: Callable[..., ExportRequest]) -> None:
    request = request_for()
    plan = plan_merge(request.adapter, request.base)
    for tensor in (tensor for file in plan.files for tensor in file.tensors):
        if tensor.source.name.endswith(("layers.1.mlp.down_proj.weight", "norm.weight")):

            def flip(content: bytearray, at: int = tensor.begin + tensor.size_bytes - 2) -> None:
                content[at] ^= 1 << 3  # a low bit of the last element's upper half: 2e-5 of it or so

            with pytest.raises(ParityFailed) as failed:
                export(request, tampered(request, flip))
            (problem,) = failed.value.problems
            assert tensor.source.name in problem.message
            assert left_in(request.out.parent) == []


def test_a_dropped_scaling_fails_parity(
    request_for: Callable[..., ExportRequest], base: BaseModel, tmp_path: Path
) -> None:
    """The classic silent bug: everything is finite, everything loads, and the adapter is half as strong."""
    request = request_for()
    half = write_adapter(tmp_path / "half", base, rank=4, alpha=4)  # the same A and B, alpha 4 in place of 8
    wrong = export(replace(request, adapter=half, out=tmp_path / "wrong")).folder / "model.safetensors"
    with pytest.raises(ParityFailed) as failed:
        export(request, tampered(request, lambda content: content.__setitem__(slice(None), wrong.read_bytes())))
    assert len(failed.value.problems) == len(plan_merge(half, base).updates)


def test_compare_logits_knows_a_shift_from_a_change() -> None:
    random = np.random.default_rng(0)
    logits = [random.normal(size=(5, 11)), random.normal(size=(1, 11))]
    same = compare_logits(logits, logits)
    assert (same.positions, same.max_abs, same.max_kl, same.top1_agreement) == (6, 0.0, 0.0, 1.0)
    shifted = compare_logits(logits, [row + 3 for row in logits])
    assert shifted.max_abs == pytest.approx(3) and shifted.max_kl < 1e-12 and shifted.top1_agreement == 1.0
    swapped = compare_logits(logits, [-row for row in logits])
    assert swapped.top1_agreement < 0.5 and swapped.mean_kl > 0.1
    assert swapped.top1_disagreements_beyond_margin >= 3
    with pytest.raises(ValueError, match="shapes"):
        compare_logits(logits, [row[:, :3] for row in logits])


def test_what_a_server_says_is_held_against_peft_and_merged(request_for: Callable[..., ExportRequest]) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    request = request_for()
    merged = export(request).folder
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(request.base.folder), request.adapter)
    ids = list(b"served by an engine")
    with torch.no_grad():
        log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    rows = [None] + [
        {str(token): {"logprob": float(row[token]), "rank": 1} for token in row.topk(5).indices.tolist()}
        for row in log_probabilities[:-1]
    ]
    answer = read_answer({"choices": [{"prompt_token_ids": ids, "prompt_logprobs": rows}]})
    assert answer is not None and read_answer({"choices": [{"text": "no log-probabilities"}]}) is None
    spec = {"base": request.base.folder, "adapter": request.adapter, "merged": merged, "dtype": "float32"}
    found = probe({**spec, "served": [answer]})
    assert found["served_against_peft"]["positions"] == len(ids) - 1
    assert found["served_against_peft"]["max_abs"] < 1e-5 > found["served_against_merged"]["max_abs"] / 10
    bare = probe({**spec, "served": [answer], "merged": request.base.folder})  # the adapter forgotten
    assert bare["served_against_merged"]["max_abs"] > 1e-3
    assert logits_problems(bare) and not logits_problems(found)
