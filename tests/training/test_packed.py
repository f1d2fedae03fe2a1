"""The packed batch and its loss against the plain way: padded rows, an attention mask, all logits, cross entropy."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import training.loss
from adapters.bases import BaseModel, load_base
from training.config import Facts, TrainingConfig, choose
from training.data.template import IGNORED, Rendered
from training.loss import supervised_loss_sum
from training.model import load_model
from training.packed import collate, shared_prefix

VOCABULARY = 278  # of the byte tokenizer
RELATIVE_TOLERANCE = 1e-5


def settings(method: Any = "lora", **asked: Any) -> Any:
    config = TrainingConfig(data=Path("x"), name="x", method=method, **asked)
    return choose(config, Facts(100, 50, False, 10**6, 2048, "float32", "cpu", 2**33, False))


def rows(shared: int, lengths: list[tuple[int, int]], seed: int = 0) -> list[Rendered]:
    """Random rows: `shared` tokens in common, then (context, learned) tokens of their own.

    More than four learned tokens have a gap in them, as a row of two turns has.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()

    common = draw(shared)
    made = []
    for context, learned in lengths:
        ids = common + draw(context + learned)
        labels = [IGNORED] * (shared + context) + ids[shared + context :]
        if learned > 4:
            labels[-3] = IGNORED
        made.append(Rendered(tuple(ids), tuple(labels), (0,)))
    return made


def plain_loss_sum(model: Any, sequences: list[Rendered]) -> torch.Tensor:
    """Reference: padded rows with an attention mask through the whole model, all logits, torch's cross entropy."""
    longest = max(len(row.input_ids) for row in sequences)
    ids = torch.tensor([[*row.input_ids, *[0] * (longest - len(row.input_ids))] for row in sequences])
    labels = torch.tensor([[*row.labels, *[IGNORED] * (longest - len(row.labels))] for row in sequences])
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (longest - len(row.input_ids)) for row in sequences])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}


def assert_same_loss_and_gradients(model: Any, sequences: list[Rendered]) -> None:
    plain, packed = plain_loss_sum(model, sequences), supervised_loss_sum(model, collate(sequences))
    assert packed.item() == pytest.approx(plain.item(), rel=RELATIVE_TOLERANCE)
    expected, got = gradients(model, plain), gradients(model, packed)
    largest = max(value.norm().item() for value in expected.values())
    for name, value in expected.items():
        assert (got[name] - value).norm().item() <= RELATIVE_TOLERANCE * largest, name
    assert sum(value.abs().sum().item() for value in got.values()) > 0


def awake(model: Any) -> Any:
    """An adapter whose B is not zero, so that A has gradients, too."""
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data = torch.randn(value.shape, generator=generator) * 0.05
    return model.train()


@pytest.fixture(scope="module", params=["qwen2_base", "qwen3_bytes_base"])
def lora_model(request: pytest.FixtureRequest) -> Any:
    return awake(load_model(load_base(request.getfixturevalue(request.param)), settings(), "cpu"))


@pytest.fixture(scope="module")
def nf4_model(qwen2_base: Path) -> Any:
    """Loaded as on a CPU with AVX512-BF16, where bitsandbytes would choose the inference layout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
        return awake(load_model(load_base(qwen2_base), settings("qlora"), "cpu"))


@pytest.mark.parametrize(
    ("shared", "lengths"),
    [
        (12, [(5, 4), (9, 2), (1, 7)]),
        (0, [(5, 4), (9, 2)]),
        (12, [(0, 3), (4, 4)]),  # one row's answer begins right after what both share
        (7, [(5, 4)]),
        (1, [(0, 1), (0, 1)]),
    ],
)
def test_loss_and_gradients_equal_the_padded_computation(
    lora_model: Any, shared: int, lengths: list[tuple[int, int]]
) -> None:
    assert_same_loss_and_gradients(lora_model, rows(shared, lengths))


def relative_error(model: Any, sequences: list[Rendered]) -> float:
    """How far the whole gradient of a packed batch is from that of the padded one, by its norm."""
    expected = gradients(model, plain_loss_sum(model, sequences))
    got = gradients(model, supervised_loss_sum(model, collate(sequences)))
    apart = sum((got[name] - value).double().square().sum().item() for name, value in expected.items())
    return (apart / sum(value.double().square().sum().item() for value in expected.values())) ** 0.5


def drawn_lengths(seed: int, rows_a_batch: int) -> list[tuple[int, int]]:
    draw = random.Random(seed)
    return [(draw.randrange(1, 40), draw.randrange(1, 12)) for _ in range(rows_a_batch)]


def test_gradients_of_twenty_batches_are_within_a_hundred_thousandth(lora_model: Any) -> None:
    errors = [relative_error(lora_model, rows(seed, drawn_lengths(seed, 8), seed)) for seed in range(20)]
    assert max(errors) <= RELATIVE_TOLERANCE, errors


@pytest.mark.long
@pytest.mark.model
def test_gradients_of_twenty_batches_are_within_a_hundred_thousandth_on_the_embedded_base(
    embedded_base: BaseModel,
) -> None:
    model = awake(load_model(embedded_base, settings(), "cpu"))
    errors = [relative_error(model, rows(seed, drawn_lengths(seed, 4), seed)) for seed in range(20)]
    assert max(errors) <= RELATIVE_TOLERANCE, errors


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gradients_on_a_gpu_are_those_of_the_cpu(qwen2_base: Path) -> None:
    base = load_base(qwen2_base)
    here, there = (awake(load_model(base, settings(), device)).to(device) for device in ("cpu", "cuda"))
    batch = collate(rows(12, [(5, 4), (9, 2), (1, 7)]))
    moved = {key: value.cuda() if torch.is_tensor(value) else value for key, value in batch.items()}
    expected = gradients(here, supervised_loss_sum(here, batch))
    got = gradients(there, supervised_loss_sum(there, moved))
    for name, value in expected.items():
        assert torch.allclose(got[name].cpu(), value, rtol=1e-3, atol=1e-5), name


def test_loss_and_gradients_equal_the_padded_computation_in_nf4(nf4_model: Any) -> None:
    assert_same_loss_and_gradients(nf4_model, rows(12, [(5, 4), (9, 2), (1, 7)]))


def test_a_loss_in_many_blocks_equals_one_block(lora_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.loss, "BLOCK_BYTES", 4 * lora_model.config.vocab_size * 2)  # two positions a block
    assert_same_loss_and_gradients(lora_model, rows(12, [(5, 4), (9, 2), (1, 7)]))


def test_equal_rows_cost_one_prefix_and_rows_without_a_common_start_share_nothing() -> None:
    one = rows(10, [(0, 3)])[0]
    assert shared_prefix([one, one]) == 9  # the state before the first learned token stays with each row
    assert shared_prefix([one]) == 0
    assert shared_prefix(rows(0, [(5, 4), (9, 2)])) == 0


def test_a_packed_batch_has_no_padding_the_prefix_once_and_no_row_goes_on_behind_its_last_prediction() -> None:
    batch = collate(rows(12, [(5, 4), (9, 2), (1, 7)]))
    assert batch["prefix"] >= 12
    assert batch["input_ids"].numel() == batch["prefix"] + sum(
        12 + context + learned - 1 - batch["prefix"] for context, learned in [(5, 4), (9, 2), (1, 7)]
    )


def with_an_end(row: Rendered, count: int) -> Rendered:
    """The row with tokens behind its last learned one, as a template's line break behind the end of a turn."""
    return Rendered((*row.input_ids, *range(count)), (*row.labels, *[IGNORED] * count), row.turns)


def test_what_follows_the_last_learned_token_is_not_computed_and_has_no_say(lora_model: Any) -> None:
    bare = rows(12, [(5, 4), (9, 2), (1, 7)])
    ended = [with_an_end(row, count) for row, count in zip(bare, (3, 0, 1), strict=True)]
    assert collate(ended)["input_ids"].tolist() == collate(bare)["input_ids"].tolist()
    assert collate(ended)["row_tokens"] == collate(bare)["row_tokens"] + 4
    assert_same_loss_and_gradients(lora_model, ended)


def test_rows_do_not_see_each_other(lora_model: Any) -> None:
    """A row's loss is the same beside any other row that begins alike."""
    first, second, third = rows(12, [(5, 4), (9, 2), (1, 7)])
    with torch.no_grad():
        alone = [supervised_loss_sum(lora_model, collate([row])).item() for row in (first, second, third)]
        together = supervised_loss_sum(lora_model, collate([first, second, third])).item()
    assert together == pytest.approx(sum(alone), rel=RELATIVE_TOLERANCE)


def test_every_nf4_layer_refuses_the_inference_layout_and_gradients_are_equal_before_and_after_a_validation(
    nf4_model: Any,
) -> None:
    layers = [module for module in nf4_model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert len(layers) == 2 * 7
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    batch = collate(rows(12, [(5, 4), (9, 2), (1, 7)]))
    before = gradients(nf4_model, supervised_loss_sum(nf4_model, batch))
    nf4_model.eval()
    with torch.no_grad():
        supervised_loss_sum(nf4_model, batch)
    nf4_model.train()
    after = gradients(nf4_model, supervised_loss_sum(nf4_model, batch))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)


def test_without_the_refusal_a_validation_would_repack_the_weights(qwen2_base: Path) -> None:
    """What the refusal is for: with it lifted, as on a CPU with AVX512-BF16, one forward without gradients repacks."""
    model = load_model(load_base(qwen2_base), settings("qlora"), "cpu").eval()
    layer = model.get_base_model().model.layers[0].mlp.gate_proj.base_layer
    x = torch.randn(3, 64)
    with torch.no_grad():
        layer(x)
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
        layer.support_avx512bf16_for_cpu = True
        layer(x)
    assert layer.weight.quant_state.packing_format_for_cpu
