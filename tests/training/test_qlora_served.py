"""QLoRA trains on a 4-bit base and serves on the unquantised one: what that costs is measured, and said."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.bases import load_base
from adapters.export import ExportRequest, canonical_copy, export
from tests.training.conftest import chat, write_jsonl
from training.config import TrainingConfig
from training.evaluate import load_examples
from training.reference import open_reference
from training.trainer import train


def test_evaluation_and_merge_of_a_qlora_adapter_are_of_the_unquantised_base_and_the_export_says_so(
    qwen2_base: Path, tmp_path: Path
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat(f"Number {i}?", "yes" if i % 2 else "no") for i in range(8)])
    asked = {"validation": rows, "base": str(qwen2_base), "out": tmp_path / "out", "method": "qlora", "rank": 4}
    card = train(
        TrainingConfig(data=rows, name="n", epochs=8.0, learning_rate=1e-2, dtype="float32", **asked),  # type: ignore[arg-type]
        lambda line: None,
    ).card
    in_four_bits = card["evaluation"]["loss"]["adapter"]
    base = load_base(qwen2_base)
    served = open_reference(tmp_path / "out", qwen2_base)
    sequences = served.sequences([example.row for example in load_examples(rows)])
    as_served = served.loss(sequences)
    assert abs(as_served - in_four_bits) > 1e-3  # rounding the base to 4 bits is not nothing
    adapter = canonical_copy(tmp_path / "out", base, tmp_path / "canonical", base_is_named=True)
    result = export(ExportRequest(adapter, base, tmp_path / "merged", source="n", card=card, with_logits=False))
    assert open_reference(tmp_path / "merged").loss(sequences) == pytest.approx(as_served, abs=1e-4)
    assert any("NF4-quantised base" in note for note in result.parity["notes"])
