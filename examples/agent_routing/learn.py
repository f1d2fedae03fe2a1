"""Steps 1 to 4 of the demo: the base, the data, what the base can do by itself, and two trained adapters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.agent_routing.console import StepFailed
from examples.agent_routing.data import (
    ENGLISH,
    ENGLISH_MORE,
    VIETNAMESE,
    Dataset,
    Row,
    make,
    table,
)
from examples.agent_routing.prompts import base_prompt
from examples.agent_routing.workshop import Workshop
from training.evaluate import generate_local
from training.scores import Scores, score

BASELINE_ROWS = 16
ANSWER_TOKENS = 64  # the longest right answer of any split has 45
# The demo compares base and adapters itself, over HTTP and on more rows than a training run would.
COMMON = ("--epochs", "1", "--evaluations", "2", "--no-compare")


@dataclass(frozen=True)
class Schedule:
    """How each adapter is trained; what was measured stands in docs/demo.md."""

    english: tuple[str, ...] = ("--method", "qlora", "--batch-size", "8", "--learning-rate", "2e-3", *COMMON)
    vietnamese: tuple[str, ...] = ("--method", "lora", "--batch-size", "4", "--learning-rate", "1e-3", *COMMON)
    more: tuple[str, ...] = ("--method", "qlora", "--batch-size", "8", "--learning-rate", "1e-3", *COMMON)


@dataclass
class Results:
    """What the steps found, for the steps after them and for the table."""

    base_folder: Path = Path()
    base_id: str = ""
    english: Dataset | None = None
    vietnamese: Dataset | None = None
    more: Dataset | None = None
    linear_accuracy: float = 0.0
    examples: list[tuple[str, str]] = field(default_factory=list)
    scores: dict[str, Scores] = field(default_factory=dict)  # by "what on which rows"
    latencies: dict[str, Any] = field(default_factory=dict)  # by model id
    adapters: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # load seconds, memory, near ties, logit differences

    def data(self, name: str) -> Dataset:
        found: Dataset | None = getattr(self, name)
        if found is None:
            raise RuntimeError(f"the step that makes {name} has not run")
        return found


def prepare_base(shop: Workshop, results: Results) -> None:
    """Step 1: the embedded base in the user's cache, and its digest."""
    made = shop.hotshoe_json("base", "prepare")
    results.base_folder, results.base_id = Path(made["path"]), made["id"]
    shop.console.lines(f"{made['id']}\n{made['path']}\n{made['digest']}")


def make_data(shop: Workshop, results: Results, seed: int) -> None:
    """Step 2: rows from different templates for each split; fails when a template or sentence leaks."""
    results.english = make(ENGLISH, seed)
    results.vietnamese = make(VIETNAMESE, seed)
    results.more = make(ENGLISH_MORE, seed, row_seed=1)
    named = {"en": results.english, "vi": results.vietnamese, "en-more": results.more}
    for name, data in named.items():
        data.write(shop.folder / "data" / name)
        shop.console.lines(f"{name}:\n{table(data)}")
        if data.leaks():
            raise StepFailed(f"The {name} data leaks: {data.leaks()[0]}.")
    results.linear_accuracy = linear_intent_accuracy(results.english)
    shop.console.lines(
        f"intent accuracy of TF-IDF and a linear model: {results.linear_accuracy:.3f} (intent only, no slots)"
    )


def baseline(shop: Workshop, results: Results) -> None:
    """Step 3: the base with its best prompt on validation rows, before any training."""
    data = results.data("english")
    results.examples = five_examples(data.splits["train"])
    rows = data.splits["validation"][:BASELINE_ROWS]
    prompts = [base_prompt(row.sentence, data.labels, results.examples) for row in rows]
    answers = generate_local(
        results.base_folder,
        None,
        prompts,
        max_new_tokens=48,
        batch_size=12,
        progress=lambda done, total: shop.console.progress("validation rows", done, total),
    )
    found = score([row.answer for row in rows], answers)
    results.scores["base, validation"] = found
    shop.console.lines(f"base with intents listed and five examples: {in_words(found)}")


def train_adapters(shop: Workshop, schedule: Schedule) -> None:
    """Step 4: `router-en` by QLoRA and `router-vi` by LoRA, each with its card and TensorBoard log."""
    train(shop, "router-en", "en", schedule.english)
    train(shop, "router-vi", "vi", schedule.vietnamese)


def train(shop: Workshop, name: str, data: str, options: Sequence[str], out: str = "") -> Path:
    """One `hotshoe train`; shows the card's figures and fails without a card or a TensorBoard log."""
    folder = shop.folder / (out or name)
    files = shop.folder / "data" / data
    shop.hotshoe(
        "train",
        files / "train.jsonl",
        "--name",
        name,
        "--validation",
        files / "validation.jsonl",
        "--out",
        folder,
        *options,
    )
    if not (folder / "card.json").is_file():
        raise StepFailed(f"Training {name} left no card.json in {folder}.")
    if not list(folder.rglob("events.out.tfevents.*")):
        raise StepFailed(f"Training {name} left no TensorBoard log under {folder}.")
    card = json.loads((folder / "card.json").read_text("utf-8"))
    shop.console.lines(f"card of {name}: {', '.join(sorted(card))}")
    return folder


def five_examples(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Five training rows of different labels, those with most slots of the first labels that come."""
    chosen: dict[str, Row] = {}
    for row in rows:
        if row.intent not in chosen and row.answer.count('": ') > 2:
            chosen[row.intent] = row
    return [(row.sentence, row.answer) for row in list(chosen.values())[:5]]


def linear_intent_accuracy(data: Dataset) -> float:
    """What TF-IDF and a linear classifier reach on the test rows' intents: the yardstick for labels alone."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train_rows, test_rows = data.splits["train"], data.splits["test"]
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=30.0, max_iter=1000))
    model.fit([row.sentence for row in train_rows], [row.intent for row in train_rows])
    return float(model.score([row.sentence for row in test_rows], [row.intent for row in test_rows]))


def in_words(scores: Scores) -> str:
    return (
        f"intent {scores.label_accuracy:.3f}, exact match {scores.exact_match:.3f}, slot F1 {scores.field_f1:.3f}, "
        f"valid JSON {scores.json_valid:.3f} ({scores.n} rows)"
    )
