"""`hotshoe size`: bytes by formula, what fits, what is recommended, and what to change where nothing does."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from adapters.errors import BaseInvalid, ConfigInvalid
from server.cli.devices import bytes_of, find_device, known_cards
from server.cli.main import build_app
from server.cli.size import base_config, form_of
from server.memory import plan_memory
from server.sizing.overheads import Batch, activations, default_batch, graph_count
from server.sizing.parts import GPU, MAIN, Basis, Device, Form, Traffic
from server.sizing.placed import Chosen, Placed
from server.sizing.report import command, lines, settings_of
from server.sizing.size import Sizing, share_of, size, splits
from server.sizing.weights import bits_of_a_weight, parameters, served_weights_bytes
from tests.fixtures.adapters import QWEN25_7B, shape_only_base
from training.planner.sizes import SIZES

GB, GIB = 10**9, 2**30
BF16 = Form("bfloat16", 2, 2)
CARD = Device("a card", 24 * GB)
PUBLISHED = {  # parameters: of the model cards' checkpoints, a tied output layer once
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264,
}
SIZING_PAGE = Path(__file__).parents[2] / "docs" / "sizing.md"
runner = CliRunner()


def config(name: str) -> dict[str, Any]:
    return base_config(name)[1]


def sized(name: str = "Qwen2.5-7B", form: Form = BF16, device: Device = CARD, **traffic: int) -> Sizing:
    return size(name, config(name), form, device, Traffic(**traffic))


def part(found: Sizing, name: str) -> int:
    return sum(one.bytes for one in found.placed.parts() if one.name == name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_that_are_published(name: str) -> None:
    assert parameters(config(name)) == PUBLISHED[name]


@pytest.mark.parametrize("known", SIZES, ids=lambda known: known.name)
def test_the_planner_of_training_counts_the_same_parameters(known: Any) -> None:
    assert parameters(config(known.name)) == known.parameters


@pytest.mark.parametrize(
    ("method", "bits"), [(None, 16), ("awq", 4.15625), ("gptq", 4.15625), ("fp8", 8), ("nf4", 4 + 0.125 + 0.001953125)]
)
def test_a_quantised_weight_takes_its_bits_and_its_share_of_the_scales(method: str | None, bits: float) -> None:
    assert bits_of_a_weight(replace(BF16, quantization=method)) == bits


def test_the_shapes_give_the_bytes_that_the_headers_of_weight_files_give(embedded_base: Any) -> None:
    chosen = Chosen(3, 64, 2048, 4, 64, 1)
    placed = Placed(embedded_base.config, Form("float32", 4, 4), Device("cpu", 64 * GB, is_cpu=True), chosen)
    read = plan_memory(placed.plan.layout, embedded_base)
    assert placed.plan == read, "weights, slot, rank and token: the arithmetic of the start, without files"


LLAMA3_8B = {
    "architectures": ["Qwen2ForCausalLM"],  # but for its biases the same layer
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
}


@pytest.mark.parametrize(("split", "gib"), [(1, 14.96), (2, 7.48)])
def test_weights_and_peak_are_those_that_vllm_logged_of_llama_3_8b_on_an_a100(split: int, gib: float) -> None:
    """vllm#10511: weights of each GPU, and a peak of 1.26 GiB on one and on two, by the sampler that sorts."""
    assert served_weights_bytes(LLAMA3_8B, BF16, is_cpu=False, split=split) / GIB == pytest.approx(gib, rel=0.002)
    device = Device("A100", int(79.22 * GIB), count=split)
    peak = activations(LLAMA3_8B, BF16, device, Batch(2048, 256), 16)
    assert peak.high_bytes / 1.2 / GIB == pytest.approx(1.26, rel=0.05)
    assert peak.low_bytes < peak.bytes < 1.26 * GIB < peak.high_bytes


def test_weights_of_four_bits_are_those_that_vllm_logged() -> None:
    """vllm#13882: 5.20 GiB for a Qwen2.5-7B of 4 bits."""
    found = served_weights_bytes(config("Qwen2.5-7B"), replace(BF16, quantization="awq"), is_cpu=False)
    assert found / GIB == pytest.approx(5.20, rel=0.005)


def test_gpus_divide_projections_and_vocabulary_and_share_key_value_heads() -> None:
    whole = served_weights_bytes(config("Qwen2.5-7B"), BF16, is_cpu=False)
    half = served_weights_bytes(config("Qwen2.5-7B"), BF16, is_cpu=False, split=2)
    assert whole / 2 < half < whole / 2 * 1.001, "norms are whole on both"
    four, eight = (sized("Qwen2.5-72B", device=replace(CARD, count=count)).placed for count in (4, 8))
    assert four.block_bytes == 2 * eight.block_bytes, "8 key-value heads: two, then one, on each"
    assert splits(config("Qwen2.5-7B"), 4) and not splits(config("Qwen2.5-7B"), 8), "28 heads"
    with pytest.raises(ConfigInvalid, match=r"gpus is 8 .*28 heads, 4 of keys and values.*it can over 1, 2, 4\."):
        sized(device=replace(CARD, count=8))


def test_a_slot_and_a_token_of_qwen2_5_7b_are_those_known() -> None:
    found = sized(rank=16, concurrency=8, context_tokens=4096)
    assert found.placed.slot_bytes == 2 * 40_370_176, "the adapter of rank 16 has 40.4M parameters"
    assert found.placed.block_bytes == 16 * 57_344
    assert part(found, "slots") == 9 * found.placed.slot_bytes


def test_parts_add_up_to_the_share_of_the_gpu() -> None:
    found = sized(rank=16, adapters=50, concurrency=8, context_tokens=4096)
    on_gpu = [one for one in found.placed.parts() if one.place == GPU]
    assert 0 <= found.placed.share_bytes - sum(one.bytes for one in on_gpu) < found.placed.block_bytes
    assert all(one.low_bytes <= one.bytes <= one.high_bytes for one in on_gpu)
    assert {one.basis for one in on_gpu if one.name in ("weights", "slots")} == {Basis.FORMULA}
    assert all(one.source for one in found.placed.parts())
    assert [one.name for one in found.placed.parts() if one.place == MAIN] == ["stage"]
    assert part(found, "stage") == 50 * found.placed.staged_adapter_bytes


def test_slots_are_no_more_than_sequences_or_adapters_and_give_way_to_the_cache() -> None:
    assert sized(rank=16, adapters=50, concurrency=8, context_tokens=2048).placed.chosen.slots == 8
    assert sized(rank=16, adapters=3, concurrency=8, context_tokens=2048).placed.chosen.slots == 3
    full = sized(rank=64, adapters=50, concurrency=24, context_tokens=2048)
    chosen = full.placed.chosen
    assert full.fits and 1 <= chosen.slots < 24 and chosen.slots == full.most_slots
    assert not replace(full.placed, chosen=replace(chosen, slots=chosen.slots + 1)).fits
    assert full.placed.sequences >= 24, "the cache comes first"
    assert any(f"{chosen.slots} slots and 24 would be of use" in note for note in full.notes)
    assert settings_of(full)["max_loras"] == chosen.slots + 1


def test_the_rank_is_one_that_vllm_takes_and_falls_where_none_was_asked_for() -> None:
    assert settings_of(sized(rank=20, context_tokens=4096))["max_rank"] == 32
    assert settings_of(sized(context_tokens=4096))["max_rank"] == 64
    tight = Device("tight", 20 * GB)
    found = sized(device=tight, concurrency=8, context_tokens=1024)
    rank = settings_of(found)["max_rank"]
    assert found.fits and 8 <= rank < 64
    lower, higher = (sized(device=tight, rank=one, concurrency=8, context_tokens=1024) for one in (rank // 2, 2 * rank))
    slots = found.placed.chosen.slots
    assert lower.placed.chosen.slots == slots > higher.placed.chosen.slots, "the highest with the most slots"
    assert any("and not the server's 64" in note for note in found.notes)


def test_the_share_leaves_what_others_and_cuda_take_and_is_never_more_than_there_is() -> None:
    assert share_of(CARD) == 0.95
    assert share_of(replace(CARD, reserved_bytes=6 * GB)) == 0.71, "24 GB less 6 and 0.8 for a context"
    assert share_of(replace(CARD, count=2)) == 0.88, "and 1.9 for NCCL"
    with pytest.raises(ConfigInvalid, match="reserved are 24000000000 bytes and a card has 24000000000"):
        sized(device=replace(CARD, reserved_bytes=24 * GB))


@pytest.mark.parametrize("device", [CARD, replace(CARD, main_bytes=GB), Device("cpu", 20 * GB, is_cpu=True)])
def test_what_does_not_fit_says_what_would_and_each_of_it_does(device: Device) -> None:
    form = Form("float32", 4, 4) if device.is_cpu else BF16
    found = sized(form=form, device=device, rank=16, adapters=50, concurrency=64, context_tokens=8192)
    assert not found.fits and found.changes
    text = "\n".join(lines(found))
    assert "does not fit" in text and "hotshoe serve" not in text
    for change in found.changes:
        words = change.split()
        if not words[0].startswith("--"):
            assert change.startswith("no single change")
            continue
        more: dict[str, Any] = {"rank": 16, "adapters": 1, "concurrency": 64, "context_tokens": 8192}
        changed, on = form, device
        match words:
            case ["--concurrency", count]:
                more["concurrency"] = int(count)
            case ["--context", count]:
                more["context_tokens"] = int(count)
            case ["--max-num-seqs", count]:
                more["max_num_seqs"] = int(count)
            case ["--kv-dtype", "fp8"]:
                changed = replace(form, kv_bytes=1)
            case ["--quantization", method]:
                changed = replace(form, quantization=method)
            case ["--gpus", count]:
                on = replace(device, count=int(count))
            case ["--dtype", "bfloat16"]:
                changed = BF16
            case _:
                raise AssertionError(change)
        assert sized(form=changed, device=on, **more).fits, change


def test_where_no_single_change_helps_that_is_said() -> None:
    found = sized("Qwen2.5-72B", device=Device("tiny", 8 * GB), concurrency=4)
    assert found.changes == (
        "no single change makes it fit: combine a smaller or quantised base, more GPUs and a shorter context",
    )
    assert any("too large" in line for line in lines(found))


def test_main_memory_bounds_how_many_adapters_are_kept_loaded() -> None:
    found = sized(device=replace(CARD, main_bytes=GB), rank=16, adapters=50, concurrency=4, context_tokens=4096)
    each = found.placed.staged_adapter_bytes
    assert found.fits and found.placed.chosen.staged == found.most_staged == GB // each == 12
    assert any("12 of 50 adapters are kept loaded" in note for note in found.notes)
    assert sized(rank=16, adapters=50, context_tokens=4096).most_staged is None, "not known"


def test_a_cpu_has_the_cache_that_the_traffic_needs_as_a_setting() -> None:
    cpu = Device("cpu", 16 * GB, is_cpu=True)
    found = sized("embedded", Form("float32", 4, 4), cpu, rank=16, adapters=20, concurrency=4, context_tokens=1000)
    said = settings_of(found)
    assert said["kv_cache_bytes"] == (4 * 8 + 1) * 128 * 46_080 and said["gpu_memory_utilization"] is None
    assert found.placed.sequences == 4 and (said["slots"], said["max_cpu_loras"]) == (4, 20)
    assert {one.place for one in found.placed.parts()} == {MAIN}
    assert f"HOTSHOE_KV_CACHE_BYTES={said['kv_cache_bytes']}" in command(found)
    unasked = sized("embedded", Form("float32", 4, 4), cpu)
    assert unasked.placed.sequences == 8 and settings_of(unasked)["context_length_tokens"] == 4096


NAMES = st.sampled_from([one.name for one in SIZES])
RANKS = st.sampled_from([1, 8, 16, 32, 64, 128])


@given(NAMES, RANKS, st.integers(1, 64), st.integers(16, 4096), st.integers(1, 64), st.integers(8, 200))
@settings(max_examples=60, deadline=None)
def test_more_of_anything_never_takes_less(
    name: str, rank: int, adapters: int, context: int, concurrency: int, gigabytes: int
) -> None:
    device = Device("a card", gigabytes * GB)
    asked: dict[str, Any] = {
        "rank": rank,
        "adapters": adapters,
        "context_tokens": context,
        "concurrency": concurrency,
    }
    found = sized(name, device=device, **asked)
    placed = found.placed
    assert placed.slot_bytes * (placed.chosen.slots + 1) == part(found, "slots")
    on_gpu = sum(one.bytes for one in placed.parts() if one.place == GPU)
    assert on_gpu <= max(placed.share_bytes, on_gpu - placed.left_bytes), "sums never exceed the share where it fits"
    assert placed.chosen.slots <= max(1, min(adapters, concurrency))
    if found.fits:
        assert placed.sequences >= concurrency
        assert found.most_slots >= placed.chosen.slots
    for more in ({"rank": 2 * rank}, {"context_tokens": 2 * context}, {"concurrency": 2 * concurrency}):
        larger = sized(name, device=device, **(asked | more))
        assert larger.most_slots <= found.most_slots, more
        assert found.fits or not larger.fits, more
    same = replace(placed.chosen, max_rank=2 * placed.chosen.max_rank)
    assert replace(placed, chosen=same).slot_bytes == 2 * placed.slot_bytes
    longer = replace(placed, chosen=replace(placed.chosen, context_tokens=2 * context))
    assert longer.sequences <= placed.sequences
    wider = sized(name, device=replace(device, memory_bytes=2 * device.memory_bytes), **asked)
    assert wider.placed.chosen.slots >= placed.chosen.slots or not found.fits


def test_graphs_and_batches_are_vllms_own_numbers() -> None:
    assert default_batch(CARD, None) == Batch(2048, 256)
    assert default_batch(Device("NVIDIA H100", 80 * GIB), None) == Batch(8192, 1024)
    assert default_batch(Device("NVIDIA A100 80 GB", 80 * GIB), None) == Batch(2048, 256)
    assert default_batch(CARD, 16) == Batch(2048, 16)
    assert graph_count(Batch(2048, 256)) == 2 * (51 + 35), "51 mixed and 35 decoding, as vllm#39559 logs"


@pytest.mark.parametrize(
    ("text", "name", "memory"),
    [
        ("h100", "NVIDIA H100 SXM 80 GB", int(79.1 * GIB)),
        ("A100-80GB", "NVIDIA A100 80 GB", int(79.1 * GIB)),
        ("NVIDIA L40S", "NVIDIA L40S", int(44.4 * GIB)),
        ("rtx4090", "NVIDIA RTX 4090", int(23.5 * GIB)),
        ("RTX 4090", "NVIDIA RTX 4090", int(23.5 * GIB)),
        ("t4", "NVIDIA T4 (Colab, g4dn)", int(14.56 * GIB)),
        ("24GB", "a GPU of 24GB", 24 * GB),
        ("22.5GiB", "a GPU of 22.5GiB", int(22.5 * GIB)),
    ],
)
def test_gpus_are_known_by_name_and_by_size(text: str, name: str, memory: int) -> None:
    found = find_device(text, 1, 0, None)
    assert (found.name, found.memory_bytes, found.is_cpu) == (name, memory, False)


def test_every_card_has_somewhat_less_than_its_label_says() -> None:
    for name, memory in known_cards().values():
        label = next((int(word) for word in name.split() if word.isdigit() and int(word) < 200), None)
        if label is not None:
            assert 0.95 * label * GIB < memory < label * GIB, name


@pytest.mark.parametrize("text", ["voodoo2", "24", "-5GB", "24 bananas", "", "1e9GB", "NaNGB"])
def test_a_gpu_that_is_not_known_is_refused_with_those_that_are(text: str) -> None:
    with pytest.raises(ConfigInvalid, match=r"which is not known.*Give its memory as 24GB") as refused:
        find_device(text, 1, 0, None)
    assert refused.value.param == "gpu" and "l40s" in refused.value.message
    with pytest.raises(ConfigInvalid, match="write a size as 24GB"):
        bytes_of("memory", "much")
    with pytest.raises(ConfigInvalid, match="leave --gpus out"):
        find_device("cpu", 2, 0, None)


def test_a_folder_says_its_own_quantisation_and_context(tmp_path: Path) -> None:
    awq = {"quant_method": "awq", "bits": 4, "group_size": 64}
    short: dict[str, Any] = {"quantization_config": awq, "max_position_embeddings": 8192}
    base = shape_only_base(tmp_path / "awq", **{**QWEN25_7B, **short})
    found = said("--base", str(base.folder), "--gpu", "24GB")
    assert found["base"]["quantization"] == "awq" and found["settings"]["context_length_tokens"] == 8192
    plain = said("--base", "Qwen2.5-7B", "--gpu", "24GB", "--quantization", "awq")
    weights = [one["bytes"] for form in (found, plain) for one in form["parts"] if one["name"] == "weights"]
    assert weights[0] > weights[1], "groups of 64 have twice the scales"


@pytest.mark.parametrize(
    ("quantised", "expected"),
    [
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, ("gptq", 128, 8)),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, ("gptq", 3584, 4)),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ("fp8", 128, 4)),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("nf4", 128, 4)),
    ],
)
def test_a_checkpoints_own_quantisation_is_read(quantised: dict[str, Any], expected: tuple[str, int, int]) -> None:
    form = form_of(config("Qwen2.5-7B") | {"quantization_config": quantised}, CARD, "auto", None, "auto")
    assert (form.quantization, form.group_size, form.bits) == expected


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "known are awq, gptq, fp8, nf4"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "bits 3"),
        ({"quantization_config": {"quant_method": "awq", "group_size": "x"}}, "group_size 'x'"),
        ({"quantization_config": "awq"}, "has to be an object"),
        ({"use_sliding_window": True}, "sliding window"),
        ({"num_attention_heads": 0}, "does not describe a base"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"max_position_embeddings": "long"}, "does not describe a base"),
        ({"architectures": ["LlamaForCausalLM"]}, "supported are"),
    ],
)
def test_a_config_that_cannot_be_sized_is_refused_by_what_is_wrong(
    given: dict[str, Any], error: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config("Qwen2.5-7B") | given))
    with pytest.raises((BaseInvalid, ConfigInvalid)) as refused:
        runner.invoke(build_app("size"), ["size", "--base", str(file), "--gpu", "24GB"], catch_exceptions=False)
    assert error in refused.value.message


def test_a_quantised_base_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match="the device is a CPU"):
        sized(form=replace(BF16, quantization="awq"), device=Device("cpu", 64 * GB, is_cpu=True))


def said(*words: str, code: int = 0) -> dict[str, Any]:
    result = runner.invoke(build_app("size"), ["size", *words, "--json"])
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_command_prints_one_document_and_leaves_with_3_where_it_does_not_fit() -> None:
    asked = ["--base", "Qwen2.5-7B", "--gpu", "24GB", "--adapters", "50", "--rank", "16", "--context", "4096"]
    found = said(*asked, "--concurrency", "8")
    assert found["fits"] and found["settings"]["slots"] == 8 and found["each"]["token_bytes"] == 57_344
    assert found["asked"] == {
        "adapters": 50,
        "rank": 16,
        "context_tokens": 4096,
        "concurrency": 8,
        "max_num_seqs": None,
    }
    refused = said(*asked, "--concurrency", "200", code=3)
    assert not refused["fits"] and refused["missing_bytes"] > 0 and refused["changes"]
    result = runner.invoke(build_app("size"), ["size", *asked, "--concurrency", "8"])
    assert result.exit_code == 0 and "start it with" in result.stdout
    assert "HOTSHOE_STAGED_LIMIT=50" in result.stdout and "--slots 8 --max-rank 16" in result.stdout


EXAMPLES = re.findall(r"^```\n\$ hotshoe (size [^\n]*)\n(.*?)^```", SIZING_PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("words", "output"), EXAMPLES, ids=[words for words, _ in EXAMPLES])
def test_the_page_shows_what_the_command_prints(words: str, output: str) -> None:
    assert runner.invoke(build_app("size"), shlex.split(words)).stdout == output


def test_the_page_has_one_that_fits_one_that_does_not_and_a_cpu() -> None:
    assert ["does not fit" in output for _, output in EXAMPLES] == [False, True, False]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--base", "Qwen3-30B-A3B"], "mixture of experts"),
        (["--base", "Qwen2.5-8B"], "Nearest: Qwen2.5-"),
        (["--rank", "513"], "rank is 513; vLLM serves 1 to 512"),
        (["--rank", "0"], "rank is 0"),
        (["--adapters", "0"], "adapters is 0; the least is 1"),
        (["--context", "32769"], "context is 32769 tokens and the base has 32768"),
        (["--concurrency", "-1"], "concurrency is -1"),
        (["--gpus", "3"], "gpus is 3"),
        (["--gpus", "0"], "gpus is 0; the least is 1"),
        (["--quantization", "q4_k_m"], "known are awq, gptq, fp8, nf4"),
        (["--dtype", "int8"], "dtype is 'int8'"),
        (["--kv-dtype", "int4"], "kv-dtype is 'int4'"),
        (["--reserved", "all"], "reserved is 'all'"),
    ],
)
def test_what_cannot_be_sized_is_refused_with_the_value_and_the_limit(words: list[str], error: str) -> None:
    given = {"--base": "Qwen2.5-7B", "--gpu": "80GB"} | dict(zip(words[::2], words[1::2], strict=True))
    with pytest.raises((BaseInvalid, ConfigInvalid)) as refused:
        runner.invoke(
            build_app("size"), ["size", *(word for pair in given.items() for word in pair)], catch_exceptions=False
        )
    assert error in refused.value.message


def test_where_a_slot_takes_nothing_there_is_one_for_each_adapter() -> None:
    cpu = Device("cpu", 64 * GB, is_cpu=True)
    pointers = replace(cpu, slots_are_pointers=True)
    found, stacked = (sized(device=device, adapters=40, rank=16, context_tokens=2048) for device in (pointers, cpu))
    assert part(found, "slots") == 0 and found.placed.chosen.slots == 40
    assert part(stacked, "slots") > 0 and stacked.placed.chosen.slots == 8
