"""Step 7 of the demo: the merged model answers in plain transformers, without peft, as the served adapter does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.agent_routing.console import StepFailed
from examples.agent_routing.learn import ANSWER_TOKENS, Results, in_words
from examples.agent_routing.prompts import prompt
from examples.agent_routing.serving import evaluate
from examples.agent_routing.workshop import Workshop
from training.scores import score

NEAR_TIE = 1e-3  # of the best two logits: below it, the order of additions may decide


@dataclass(frozen=True)
class Difference:
    """A row that two models answered differently, and how far apart the best two logits were where they parted."""

    sentence: str
    served: str
    merged: str
    margin: float

    @property
    def is_near_tie(self) -> bool:
        return self.margin <= NEAR_TIE


def export_and_compare(shop: Workshop, results: Results) -> None:
    """Export `router-en@2`, answer the test set with it in a process without peft, compare with the served answers."""
    merged = shop.folder / "router-en-2-merged"
    exported = shop.hotshoe_json("export", "router-en@2", "--out", merged)
    results.facts["export"] = exported
    shop.console.lines(parity_in_words(exported["parity"]))
    rows = results.data("more").splits["test"]
    evaluate(shop, "router-en@2", rows, results, "router-en@2, its test")
    served = results.facts["answers: router-en@2, its test"]
    asked, answered = shop.folder / "prompts.json", shop.folder / "plain.json"
    asked.write_text(json.dumps([prompt(row.sentence) for row in rows], ensure_ascii=False), "utf-8")
    shop.console.lines("plain transformers, peft not importable: " + merged.name)
    shop.python(Path(__file__).with_name("plain.py"), merged, asked, answered, str(ANSWER_TOKENS))
    plain = json.loads(answered.read_text("utf-8"))
    found = score([row.answer for row in rows], [answer["text"] for answer in plain])
    results.scores["router-en@2 merged, its test"] = found
    shop.console.lines(f"merged: {in_words(found)}")
    differences = compare([row.sentence for row in rows], served, plain, merged)
    for difference in differences:
        shop.console.lines(
            f"differs, best two logits {difference.margin:.2e} apart: {difference.sentence!r}: "
            f"served {difference.served!r}, merged {difference.merged!r}"
        )
    results.facts["near_ties"] = sum(difference.is_near_tie for difference in differences)
    wrong = [difference for difference in differences if not difference.is_near_tie]
    same = len(rows) - len(differences)
    shop.console.lines(f"{same} of {len(rows)} answers are equal; {results.facts['near_ties']} differ at a near tie")
    if wrong:
        raise StepFailed(f"{len(wrong)} answers of the merged model differ from the served ones without a near tie.")


def parity_in_words(parity: dict[str, Any]) -> str:
    """The export's own report, in two lines."""
    weights = parity["weights"]
    text = (
        f"parity {parity['verdict']}: {weights['changed_tensors']} tensors changed, relative error of the weights "
        f"{weights['relative_error']:.2e}, of which rounding {weights['rounding_floor']:.2e}"
    )
    if parity["level"] == "logits":
        logits = parity["logits"]["merged_against_peft"]
        text += (
            f"\nmerged against peft: logits at most {logits['max_abs']:.2e} apart at {logits['positions']} places, "
            f"same best token at {logits['top1_agreement']:.1%}"
        )
    return text


def compare(
    sentences: Sequence[str], served: Sequence[str], plain: Sequence[dict[str, Any]], folder: Path
) -> list[Difference]:
    """The rows whose texts differ; the margin is the merged model's at the first token where they part."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for sentence, text, answer in zip(sentences, served, plain, strict=True):
        if text != answer["text"]:
            theirs = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            place = first_difference(theirs, answer["ids"])
            found.append(Difference(sentence, text, answer["text"], answer["margins"][place]))
    return found


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """The first place where two sequences of token ids differ, within the second."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other) - 1)
