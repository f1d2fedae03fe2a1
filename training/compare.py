"""Base against adapter on the validation rows: the loss of both, and where answers are short their greedy answers.

The rows are the sequences that validation uses, so the prompts are those of training and serving, id for id, and the
loss is of the same tokens; only is it computed without the autocast that a run's own validations may have. The base is
measured before training and the adapter after it, with the best weights loaded. Nothing here draws a random number or
leaves the model in another state: a test holds that the weights of a run are the same bits with and without it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adapters.durable import replace_file
from training.config import Settings
from training.data.dataset import Prepared
from training.data.template import IGNORED, ChatTemplate, Rendered
from training.greedy import Decoding, greedy_answers
from training.material import Material
from training.model import base_alone
from training.sample import evenly
from training.scores import parse_answer, telling_scores
from training.verdict.measure import measure, sample_size

MOST_ROWS = 32  # are answered
ROWS_AT_A_TIME = 8
MOST_SECONDS = 30.0  # for the answers of one model
MOST_SECONDS_SEEN = 10.0  # for the sample of rows trained on
SHORT_TOKENS, SHORT_OBJECT_TOKENS = 64, 192  # longer expected answers are not asked for
WORSE_NATS = 0.001  # a loss that is higher by less is called equal
BASELINE_FILE = "baseline.json"


@dataclass(frozen=True)
class Measured:
    """One model on the validation rows: its mean loss, and its answers to the first of the asked rows, as text.

    `rows` are nats of each validation row, `seen` of each sampled row that is trained on, with the model's `doubts`.
    """

    loss: float
    answers: list[str]
    seconds: float
    rows: list[float] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)
    doubts: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """The base, the model before the first step where that is another, and the trained one."""

    base: Measured
    start: Measured
    adapter: Measured


class Comparison:
    """The validation rows of one run and a sample of its own rows, and how a model is measured on them."""

    def __init__(
        self, validation: Prepared, template: ChatTemplate, pass_size: int, seen: Sequence[Rendered] = ()
    ) -> None:
        self.sequences = validation.sequences
        self.seen = seen
        self.template = template
        self.pass_size = pass_size
        self.asked = evenly(range(len(self.sequences)), MOST_ROWS)  # places of the sequences that are answered
        asked = [last_turn(self.sequences[place]) for place in self.asked]
        self.prompts = [prompt for prompt, _ in asked]
        self.expected = [self._text(answer) for _, answer in asked]
        self.longest = max(len(answer) for _, answer in asked)
        self.most_seconds: float | None = MOST_SECONDS

    @property
    def asks(self) -> bool:
        """Whether the expected answers are short enough, or objects, so that equality means something."""
        are_objects = all(parse_answer(text) is not None for text in self.expected)
        return self.longest <= (SHORT_OBJECT_TOKENS if are_objects else SHORT_TOKENS)

    def measure(self, model: Any, times: float = 1, *, asks: bool = True) -> Measured:
        """The model as it is now, which comes back as it was; its answers may take so many times their seconds."""
        started = time.monotonic()
        with evaluating(model):
            rows = measure(model, self.sequences, self.pass_size).losses
            seen = measure(model, self.seen, self.pass_size, MOST_SECONDS_SEEN)
            deadline = None if self.most_seconds is None else times * self.most_seconds
            answers = self._answers(model, deadline) if asks and self.asks else []
        loss = sum(rows) / sum(sequence.supervised_tokens for sequence in self.sequences)
        return Measured(loss, answers, time.monotonic() - started, rows, seen.losses, seen.doubts)

    def score(self, model: Any) -> float:
        """The label accuracy, or else the exact match, of greedy answers to the asked rows, whatever time they take."""
        with evaluating(model):
            scores = telling_scores(self.expected, self._answers(model, None))
        return float(scores.get("label_accuracy", scores["exact_match"]))

    def _answers(self, model: Any, most_seconds: float | None) -> list[str]:
        deadline = time.monotonic() + most_seconds if most_seconds is not None else None
        found: list[str] = []
        for start in range(0, len(self.prompts), ROWS_AT_A_TIME):
            left = max(0.0, deadline - time.monotonic()) if deadline is not None else None
            decoding = Decoding(self.template.pad, self.template.stops, self.longest + 8, ROWS_AT_A_TIME, left)
            new = greedy_answers(model, self.prompts[start : start + ROWS_AT_A_TIME], decoding)
            if deadline is not None and time.monotonic() > deadline:  # what was cut short is no answer
                break
            found += map(self._text, new)
        return found

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.template.tokenizer.decode(tokens, skip_special_tokens=True))


class Baseline(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Measures the base before the first step. A resumed run takes what its first start left in `folder`.

    A run that goes on from an adapter starts elsewhere than at the base: then its start is measured, too.
    """

    def __init__(
        self, comparison: Comparison, folder: Path, say: Callable[[str], None], *, goes_on: bool = False
    ) -> None:
        self.comparison = comparison
        self.goes_on = goes_on
        self.kept = folder / BASELINE_FILE
        self.say = say

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self.kept.is_file():
            return
        self.say(f"measuring the base on {len(self.comparison.sequences):,} validation sequences")
        with base_alone(model):
            base = self.comparison.measure(model)
        found = {"base": asdict(base)}
        if self.goes_on:
            found["start"] = asdict(self.comparison.measure(model, asks=False))
        self.kept.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.kept, json.dumps(found).encode())

    def outcome(self, model: Any) -> Outcome:
        """What was measured before, with the trained model measured now."""
        found = json.loads(self.kept.read_bytes())
        base = Measured(**found["base"])
        start = Measured(**found["start"]) if "start" in found else base
        return Outcome(base, start, self.comparison.measure(model, times=2))


def comparison_of(material: Material, settings: Settings) -> Comparison | None:
    """How a model of this run is measured; None without validation rows."""
    if material.validation is None:
        return None
    seen = [material.training.sequences[index] for index in seen_indices(material, settings.epochs)]
    return Comparison(material.validation, material.template, settings.evaluation_pass_size, seen)


def seen_indices(material: Material, epochs: float) -> list[int]:
    """Which of the training sequences are measured: a sample of the run's own rows, evenly spread."""
    own = own_sequences(material)
    return evenly(own, sample_size(len(own), epochs))


def own_sequences(material: Material) -> list[int]:
    """The training sequences that are of the data, and neither replayed nor canaries."""
    replayed = {id(row) for row in material.replay.rows} if material.replay is not None else set()
    owners = material.training.owners[: len(material.training.owners) - len(material.canaries)]
    return [index for index, row in enumerate(owners) if id(row) not in replayed]


def report(comparison: Comparison, outcome: Outcome, label: str | None = None) -> dict[str, Any]:
    """What the card says of the two. Answers are scored on the rows that both have answered, by this field's labels."""
    base, adapter = outcome.base, outcome.adapter
    rows = min(len(base.answers), len(adapter.answers))
    expected = comparison.expected[:rows]
    scores = {
        name: telling_scores(expected, measured.answers[:rows], label)
        for name, measured in (("base", base), ("adapter", adapter))
        if rows
    }
    return {
        "sequences": len(comparison.sequences),
        "loss": {"base": round(base.loss, 5), "adapter": round(adapter.loss, 5)},
        "answers": {"rows": rows, "of_sequences": len(comparison.sequences), **scores} if rows else None,
        "answers_left_out": None if rows else why_no_answers(comparison),
        "seconds": round(base.seconds + adapter.seconds, 1),
        "verdict": verdict(base.loss, adapter.loss),
    }


def verdict(base: float, adapter: float) -> str:
    """One plain sentence."""
    figures = f"validation loss {adapter:.3f}, the base's {base:.3f}"
    if adapter > base + WORSE_NATS:
        return f"The adapter is worse than the base on the validation rows ({figures}): do not publish it."
    if adapter > base - WORSE_NATS:
        return f"The adapter is no better than the base on the validation rows ({figures})."
    return f"The adapter is better than the base on the validation rows ({figures})."


def why_no_answers(comparison: Comparison) -> str:
    if comparison.asks:
        return f"no {ROWS_AT_A_TIME} rows were answered within {MOST_SECONDS:g} s"
    return f"expected answers have up to {comparison.longest} tokens: too long for equality to mean something"


def last_turn(sequence: Rendered) -> tuple[list[int], list[int]]:
    """(the prompt of the last supervised turn, the tokens that answer it)."""
    end = max(place for place, label in enumerate(sequence.labels) if label != IGNORED) + 1
    start = end
    while start and sequence.labels[start - 1] != IGNORED:
        start -= 1
    return list(sequence.input_ids[:start]), list(sequence.input_ids[start:end])


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """In evaluation mode; the mode and torch's generators are put back."""
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        model.train(was_training)
