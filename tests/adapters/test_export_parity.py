"""The proof of an export: one wrong element fails it, and what was served is held against peft and merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.bases import BaseModel, load_base
from adapters.errors import (
    ParityFailed,
)
from adapters.export import ExportRequest, ExportResult, export
from adapters.merge import plan_merge
from adapters.parity import compare_logits
from adapters.parity_answers import MAX_NEW_TOKENS, greedy_answers, stop_tokens
from adapters.parity_forms import compare_form
from adapters.parity_logits import load, probe
from adapters.parity_page import page
from adapters.parity_served import read_answer
from adapters.parity_verdict import logits_problems
from adapters.readback import verify_weights
from adapters.staging import SUFFIX
from tests.adapters.exporting import MERGED, left_in
from tests.fixtures.adapters import (
    write_adapter,
)
from tests.fixtures.bases import tiny_qwen2


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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportRequest, ExportResult]:
    """An export in bfloat16 with an adapter that moves the answers, measured on two rows more than the probe."""
    folder = tmp_path_factory.mktemp("finished")
    base = load_base(tiny_qwen2(folder / "base", tie_word_embeddings=False))
    adapter = write_adapter(folder / "adapter", base, rank=4, scale=0.3)
    rows = ("Where is my parcel?", {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant"}]}, {"no": 1})
    request = ExportRequest(adapter, base, folder / "out", source="router@1", dtype="bfloat16", evaluation=rows)
    return request, export(request)


def test_a_report_has_answers_floors_and_the_users_rows_each_by_itself(
    finished: tuple[ExportRequest, ExportResult],
) -> None:
    request, result = finished
    parity = json.loads((result.folder / "parity.json").read_bytes())
    assert parity == result.parity and parity["verdict"] == "passed"
    logits = parity["logits"]
    assert logits["probe"]["rows"] == logits["probe"]["sequences"] == 8
    counts = logits["evaluation"]["counts"]
    assert (counts["rows"], counts["sequences"], sum(counts["left_out"].values())) == (3, 2, 1)
    for prompts, figures in ((8, logits), (2, logits["evaluation"])):
        assert 0 < figures["merged_against_peft"]["max_abs"] <= 2 * figures["rounding_floor"]["max_abs"] + 1e-3
        assert figures["dtype_floor"]["positions"] == figures["rounding_floor"]["positions"]
        assert 0 < figures["dtype_floor"]["mean_abs"] < 0.1
        answers = figures["answers"]
        assert answers["merged_against_peft"]["prompts"] == prompts == len(answers["shown"])
        assert answers["merged_against_peft"]["beyond_rounding"] == 0
    rows = {row["name"]: row for row in parity["weights"]["tensors"]}
    plan = plan_merge(request.adapter, request.base, dtype="bfloat16")
    assert rows.keys() == {tensor.source.name for file in plan.files for tensor in file.tensors}
    assert sum(row["elements"] for row in rows.values()) == parity["weights"]["changed_elements"]
    assert result.manifest["files"].keys() >= {"parity.json", "parity.html"}


def test_answers_are_those_that_transformers_generates(finished: tuple[ExportRequest, ExportResult]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(finished[1].folder, dtype=torch.float32)
    prompts = [list(b"one prompt"), list(b"another one, which is longer"), [7]]
    stops = stop_tokens(model)
    for prompt, answer in zip(prompts, greedy_answers(model, prompts, stops), strict=True):
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        assert answer["greedy"] == made[0, len(prompt) :].tolist()
        assert [max(top, key=top.__getitem__) for top in answer["top"]] == answer["greedy"]
    stop = answer["greedy"][2]
    (cut,) = greedy_answers(model, prompts[-1:], [stop])
    assert cut["greedy"] == answer["greedy"][: answer["greedy"].index(stop) + 1], "it ends with the stop token"


def swap(tensors: dict[str, Any], one: str, two: str) -> None:
    tensors[one], tensors[two] = tensors[two], tensors[one]


def half_as_strong(tensors: dict[str, Any], base: dict[str, Any]) -> None:
    for name, merged in tensors.items():
        if name.endswith("_proj.weight"):
            tensors[name] = ((merged.float() + base[name].float()) / 2).to(merged.dtype)


DOWN, OTHER_DOWN = (f"model.layers.{number}.mlp.down_proj.weight" for number in (0, 1))
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
BUGS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], list[str]]] = {
    "one_element": (lambda tensors, _: tensors[DOWN].__setitem__((3, 4), 50.0), [DOWN]),
    "half_the_scaling": (half_as_strong, [DOWN, OTHER_DOWN]),
    "swapped_layers": (lambda tensors, _: swap(tensors, DOWN, OTHER_DOWN), [DOWN, OTHER_DOWN]),
    "a_tied_head": (lambda tensors, _: tensors.__setitem__(HEAD, tensors[EMBEDDINGS].clone()), [HEAD]),
    "a_lost_update": (lambda tensors, base: tensors.__setitem__(DOWN, base[DOWN].to(tensors[DOWN].dtype)), [DOWN]),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_named_by_its_tensor_and_seen_in_logits_and_answers(
    finished: tuple[ExportRequest, ExportResult], bug: str, tmp_path: Path
) -> None:
    """Each level sees it by itself: the read-back names the tensors, and the forward is too far from PEFT's."""
    from safetensors.torch import load_file, save_file

    request, result = finished
    wrong = tmp_path / "wrong"
    shutil.copytree(result.folder, wrong)
    tensors = load_file(wrong / "model.safetensors")
    make, names = BUGS[bug]
    make(tensors, load_file(request.base.folder / "model.safetensors"))
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    plan = plan_merge(request.adapter, request.base, dtype="bfloat16")
    weights = verify_weights(plan, wrong)
    for name in names:
        assert any(problem.startswith(name) for problem in weights.problems), name
        assert next(check for check in weights.changed if check.name == name).outside > 0
    assert not (bug != "half_the_scaling" and len(weights.problems) > len(names)), "and no other"
    spec = {"base": request.base.folder, "adapter": request.adapter, "merged": wrong, "dtype": "bfloat16"}
    found = probe(spec)
    problems = logits_problems(found)
    assert any(problem.startswith("logits of the probe: max_abs") for problem in problems)
    assert any(problem.startswith("logits of the probe: mean_abs") for problem in problems)
    assert any(problem.startswith("answers of the probe") for problem in problems), "an answer parts beyond rounding"


def answers_of(model: Any, prompts: list[list[int]]) -> list[dict[str, Any]]:
    return greedy_answers(model, prompts, stop_tokens(model))


def test_other_forms_of_a_merge_are_held_against_peft_and_the_merged_folder(
    finished: tuple[ExportRequest, ExportResult],
) -> None:
    from peft import PeftModel

    request, result = finished
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, 12).tolist() for _ in range(8)]
    merged, forgotten = (answers_of(load(str(folder)), prompts) for folder in (result.folder, request.base.folder))
    peft = answers_of(PeftModel.from_pretrained(load(str(request.base.folder)), request.adapter).eval(), prompts)
    again = compare_form("the merge again", "BF16", peft, merged, merged)
    assert again["problems"] == [] and again["against_merged"]["identical"] == 8
    assert again["against_merged"]["max_abs"] < 1e-4 < again["against_peft"]["max_abs"]
    lost = compare_form("adapter forgotten", "F16", peft, merged, forgotten)
    assert lost["is_judged"] and len(lost["problems"]) >= 1
    quantised = compare_form("adapter forgotten, quantised", "Q8_0", peft, merged, forgotten)
    assert quantised["problems"] == [], "a small adapter's loss is within what quantising may cost: reported, no more"
    assert quantised["against_peft"]["mean_kl"] > 10 * again["against_peft"]["mean_kl"]
    shown = page({**result.parity, "forms": [again, lost]}, result.manifest)
    assert b"the merge again" in shown and b"adapter forgotten" in shown


def test_a_failed_parity_of_logits_alone_fails_the_export(
    finished: tuple[ExportRequest, ExportResult], tmp_path: Path
) -> None:
    """What the weights cannot show: a config that computes something else from the right tensors."""
    request, _ = finished
    said: list[dict[str, Any]] = []

    def report(message: dict[str, Any]) -> None:
        said.append(message)
        if message == {"stage": "comparing logits"}:
            (folder,) = tmp_path.glob(f".*{SUFFIX}")
            config = json.loads((folder / "config.json").read_bytes())
            config["rope_parameters"] = {**(config.get("rope_parameters") or {}), "rope_theta": 3.0}
            (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(ParityFailed) as failed:
        export(replace(request, out=tmp_path / "out"), report)
    assert all("of the probe" in one.message or "of the evaluation" in one.message for one in failed.value.problems)
    assert said[-1]["stage"] == "failed" and said[-1]["parity"]["verdict"] == "failed"
    assert b"Failed: this merge is not what base and adapter give" in page(said[-1]["parity"], finished[1].manifest)
    assert left_in(tmp_path) == []


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
