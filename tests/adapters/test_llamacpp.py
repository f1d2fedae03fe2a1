"""The real llama.cpp on our GGUF files: the answers of transformers and PEFT, in the form that most people will run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.bases import BaseModel, load_base
from adapters.errors import ParityFailed
from adapters.gguf_lora import plan_gguf_lora, write_gguf_lora
from adapters.gguf_plan import plan_base_gguf, plan_gguf
from adapters.gguf_write import write_gguf
from adapters.llamacpp import missing, run
from adapters.merge_plan import plan_merge
from adapters.parity_gguf import HARD_TEXTS, GgufFiles, ask_llamacpp
from adapters.parity_served import PROBES
from tests.adapters.exporting import compared
from tests.fixtures.adapters import write_adapter
from tests.fixtures.bases import tiny_qwen2, tiny_qwen3

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")
PROMPTS = [np.random.default_rng(0).integers(0, 256, length).tolist() for length in (3, 40, 150)]
# Every layer another scaling, and ranks that are no multiple of anything.
UNEVEN: dict[str, Any] = {
    "rank": 8,
    "alpha": 16,
    "use_rslora": True,
    "rank_pattern": {"v_proj": 3},
    "alpha_pattern": {"up_proj": 5.0, "model.layers.1.self_attn.q_proj": 40.0},
}
ROPE = {"rope_theta": 10_000.0, "factor": 4.0}
TINY: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "qwen2_untied": (tiny_qwen2, {"tie_word_embeddings": False}),
    "qwen3_wide_heads": (tiny_qwen3, {"tokenizer": "bytes", "head_dim": 32}),
    "qwen2_linear": (tiny_qwen2, {"rope_parameters": {"rope_type": "linear", **ROPE}}),
    "qwen3_yarn": (
        tiny_qwen3,
        {
            "tokenizer": "bytes",
            "rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 512, **ROPE},
        },
    ),
}


@pytest.mark.parametrize("name", TINY)
def test_every_log_probability_is_that_of_base_and_adapter(name: str, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    make, config = TINY[name]
    base = load_base(make(tmp_path / "base", **config))
    adapter = write_adapter(tmp_path / "adapter", base, scale=0.3, **UNEVEN)
    write_gguf(plan_gguf(plan_merge(adapter, base), quantisation="f32", name="x"), tmp_path / "merged.gguf")
    write_gguf(plan_base_gguf(base, quantisation="f32", name="x"), tmp_path / "base.gguf")
    write_gguf_lora(plan_gguf_lora(adapter, base), tmp_path / "lora.gguf")
    plain = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    reference = PeftModel.from_pretrained(plain, adapter).eval()
    for model, lora in (("merged.gguf", None), ("base.gguf", tmp_path / "lora.gguf")):
        answer = run(tmp_path / model, lora=lora, prompts=PROMPTS, new_tokens=6, top=320)
        found = compared(reference, PROMPTS, answer.continuations)
        assert found["same_continuations"] == 3 and found["max_abs"] < 1e-3, (model, found)
        assert found["log_probabilities"] == 3 * 6 * 320
    without = run(tmp_path / "base.gguf", prompts=PROMPTS, new_tokens=6)
    assert compared(reference, PROMPTS, without.continuations)["max_abs"] > 0.1  # so the adapter is what was compared


def test_a_continuation_ends_with_a_stop(tmp_path: Path) -> None:
    base = load_base(tiny_qwen2(tmp_path / "base"))
    write_gguf(plan_base_gguf(base, quantisation="f32", name="x"), tmp_path / "f.gguf")
    (whole,) = run(tmp_path / "f.gguf", prompts=PROMPTS[:1], new_tokens=8).continuations
    assert len(whole.tokens) == len(whole.top) == 8
    stop = whole.tokens[3]
    (ended,) = run(tmp_path / "f.gguf", prompts=PROMPTS[:1], new_tokens=8, stops={stop}).continuations
    assert ended.tokens == whole.tokens[: whole.tokens.index(stop) + 1]


def test_what_llama_cpp_does_not_take_is_an_error_with_its_words(tmp_path: Path) -> None:
    (tmp_path / "none.gguf").write_bytes(b"no such thing at all")
    with pytest.raises(ParityFailed, match=r"does not run none\.gguf: .*invalid magic"):
        run(tmp_path / "none.gguf", texts=["x"])


def test_the_report_of_a_file_compares_the_tokenizer_too(tmp_path: Path) -> None:
    base = load_base(tiny_qwen2(tmp_path / "base"))
    adapter = write_adapter(tmp_path / "adapter", base, **UNEVEN)
    write_gguf(plan_gguf(plan_merge(adapter, base), quantisation="f32", name="x"), tmp_path / "f.gguf")
    rows = [{"messages": [{"role": "user", "content": "turn on the lamp"}, {"role": "assistant", "content": "ok"}]}]
    found = ask_llamacpp(GgufFiles(tmp_path / "f.gguf", "F32"), base.folder, adapter, evaluation=rows)
    probe, evaluation = (form["against_peft"] for form in found["forms"])
    assert probe["identical"] == probe["prompts"] == len(PROBES) and probe["max_abs"] < 1e-3
    assert evaluation["identical"] == evaluation["prompts"] == 1
    assert (
        found["tokenizer"] == {"texts": len(HARD_TEXTS), "different": [], "goes_on_after": []}
        and found["problems"] == []
    )


@pytest.fixture(scope="module")
def adapter(embedded_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "router", embedded_base, **UNEVEN)


@pytest.fixture(scope="module")
def ask(embedded_base: BaseModel, adapter: Path) -> Callable[..., Any]:
    """Compares llama.cpp's answers with base + adapter in PEFT, over four of the probes."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_base.folder)
    plain = AutoModelForCausalLM.from_pretrained(embedded_base.folder, dtype=torch.float32)
    reference = PeftModel.from_pretrained(plain, adapter).eval()
    prompts = [tokenizer(text)["input_ids"] for text in PROBES[:4]]

    def compare(model: Path, lora: Path | None = None) -> Any:
        answer = run(model, lora=lora, prompts=prompts, new_tokens=8, top=20)
        return compared(reference, prompts, answer.continuations)

    return compare


@pytest.mark.model
def test_the_merged_file_answers_as_base_and_adapter_do(
    embedded_base: BaseModel, adapter: Path, ask: Callable[..., Any], tmp_path: Path
) -> None:
    plan = plan_gguf(plan_merge(adapter, embedded_base), quantisation="f32", name="router")
    write_gguf(plan, tmp_path / "merged.gguf")
    found = ask(tmp_path / "merged.gguf")
    assert found["same_continuations"] == found["prompts"] == 4 and found["max_abs"] < 2e-3, found


@pytest.mark.model
def test_the_adapter_alone_answers_on_its_base_as_in_peft(
    embedded_base: BaseModel, adapter: Path, ask: Callable[..., Any], tmp_path: Path
) -> None:
    write_gguf(plan_base_gguf(embedded_base, quantisation="f32", name="base"), tmp_path / "base.gguf")
    plan = plan_gguf_lora(adapter, embedded_base, dtype="f16")
    write_gguf_lora(plan, tmp_path / "lora.gguf")
    found = ask(tmp_path / "base.gguf", tmp_path / "lora.gguf")
    assert len(plan.folded) > 30 and found["same_continuations"] == 4 and found["max_abs"] < 2e-2, found
    assert ask(tmp_path / "base.gguf")["max_abs"] > 0.1


# How often the likeliest of 64 tokens was that of float32, over all probes with a rank-8 adapter on the embedded base,
# of 135M weights: bf16 63, f16 64, q8_0 61, q5_1 54, q5_0 54, q4_1 51, q4_0 50. A larger model loses less.
FLOORS = {"bf16": 0.9, "f16": 0.95, "q8_0": 0.85, "q5_1": 0.65, "q5_0": 0.65, "q4_1": 0.6, "q4_0": 0.6}


@pytest.mark.model
@pytest.mark.parametrize(
    "quantisation", [pytest.param(name, marks=() if name == "q8_0" else pytest.mark.long) for name in FLOORS]
)
def test_a_smaller_type_still_agrees_as_often_as_it_should(
    embedded_base: BaseModel, adapter: Path, ask: Callable[..., Any], tmp_path: Path, quantisation: str
) -> None:
    plan = plan_gguf(plan_merge(adapter, embedded_base), quantisation=quantisation, name="router")
    write_gguf(plan, tmp_path / "f.gguf")
    found = ask(tmp_path / "f.gguf")
    print(quantisation, found)
    assert found["top1_agreement"] >= FLOORS[quantisation], found
