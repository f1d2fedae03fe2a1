"""Base against adapter on the validation rows: the loss of both, and where answers are short their greedy answers.

The rows are the sequences that validation uses, so the prompts are those of training and serving, id for id, and the
loss is the trainer's own. The base is measured before training and the adapter after it, with the best weights loaded.
Nothing here draws a random number or leaves the model in another state: a test holds that the weights of a run are the
same bits with and without it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.config import Settings
from training.data.dataset import Prepared
from training.data.template import IGNORED, ChatTemplate, Rendered
from training.greedy import Decoding, greedy_answers
from training.loss import supervised_loss_sum
from training.material import Material
from training.model import base_alone
from training.packed import collate
from training.scores import parse_answer, telling_scores

MOST_ROWS = 32  # are answered
ROWS_AT_A_TIME = 8
MOST_SECONDS = 30.0  # for the answers of one model
SHORT_TOKENS, SHORT_OBJECT_TOKENS = 64, 192  # longer expected answers are not asked for
WORSE_NATS = 0.001  # a loss that is higher by less is called equal
BASELINE_FILE = "baseline.json"


@dataclass(frozen=True)
class Measured:
    """One model on the validation rows: its mean loss, and its answers to the first of the asked rows, as text."""

    loss: float
    answers: list[str]
    seconds: float


class Comparison:
    """The validation rows of one run, and how a model is measured on them."""

    def __init__(self, validation: Prepared, template: ChatTemplate, pass_size: int) -> None:
        self.sequences = validation.sequences
        self.template = template
        self.pass_size = pass_size
        asked = [last_turn(sequence) for sequence in evenly(self.sequences, MOST_ROWS)]
        self.prompts = [prompt for prompt, _ in asked]
        self.expected = [self._text(answer) for _, answer in asked]
        self.longest = max(len(answer) for _, answer in asked)

    @property
    def asks(self) -> bool:
        """Whether the expected answers are short enough, or objects, so that equality means something."""
        are_objects = all(parse_answer(text) is not None for text in self.expected)
        return self.longest <= (SHORT_OBJECT_TOKENS if are_objects else SHORT_TOKENS)

    def measure(self, model: Any, most_seconds: float = MOST_SECONDS) -> Measured:
        """The model as it is now, which comes back as it was."""
        started = time.monotonic()
        with evaluating(model):
            loss = mean_loss(model, self.sequences, self.pass_size)
            answers = self._answers(model, most_seconds) if self.asks else []
        return Measured(loss, answers, time.monotonic() - started)

    def _answers(self, model: Any, most_seconds: float) -> list[str]:
        deadline = time.monotonic() + most_seconds
        found: list[str] = []
        for start in range(0, len(self.prompts), ROWS_AT_A_TIME):
            left = deadline - time.monotonic()
            decoding = Decoding(
                self.template.pad, self.template.stops, self.longest + 8, ROWS_AT_A_TIME, max(0.0, left)
            )
            new = greedy_answers(model, self.prompts[start : start + ROWS_AT_A_TIME], decoding)
            if time.monotonic() > deadline:  # what was cut short is no answer
                break
            found += map(self._text, new)
        return found

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.template.tokenizer.decode(tokens, skip_special_tokens=True))


class Baseline(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Measures the base before the first step. A resumed run takes what its first start left in `folder`."""

    def __init__(self, comparison: Comparison, folder: Path, say: Callable[[str], None]) -> None:
        self.comparison = comparison
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
        self.kept.parent.mkdir(parents=True, exist_ok=True)
        staged = self.kept.with_suffix(".partial")
        staged.write_text(json.dumps(asdict(base)), encoding="utf-8")
        staged.replace(self.kept)

    def compared(self, model: Any) -> dict[str, Any]:
        """The card's entry, with the trained model measured now."""
        base = Measured(**json.loads(self.kept.read_bytes()))
        return report(self.comparison, base, self.comparison.measure(model, 2 * MOST_SECONDS))


def baseline_of(material: Material, settings: Settings, folder: Path, say: Callable[[str], None]) -> Baseline | None:
    """What measures the base of a run, which keeps its working files in `folder`; None without validation rows."""
    if material.validation is None:
        return None
    comparison = Comparison(material.validation, material.template, settings.evaluation_pass_size)
    return Baseline(comparison, folder, say)


def report(comparison: Comparison, base: Measured, adapter: Measured) -> dict[str, Any]:
    """What the card says of the two. Answers are scored on the rows that both have answered."""
    rows = min(len(base.answers), len(adapter.answers))
    expected = comparison.expected[:rows]
    scores = {
        name: telling_scores(expected, measured.answers[:rows])
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


def mean_loss(model: Any, sequences: Sequence[Rendered], pass_size: int) -> float:
    """The mean cross entropy over all supervised tokens, as the trainer's validation computes it."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(sequences), pass_size):
            batch = collate(sequences[start : start + pass_size])
            batch = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in batch.items()}
            total += float(supervised_loss_sum(model, batch))
            tokens += batch["shift_labels"].numel()
    return total / tokens


def last_turn(sequence: Rendered) -> tuple[list[int], list[int]]:
    """(the prompt of the last supervised turn, the tokens that answer it)."""
    end = max(place for place, label in enumerate(sequence.labels) if label != IGNORED) + 1
    start = end
    while start and sequence.labels[start - 1] != IGNORED:
        start -= 1
    return list(sequence.input_ids[:start]), list(sequence.input_ids[start:end])


def evenly(sequences: Sequence[Rendered], most: int) -> list[Rendered]:
    """At most so many of them, evenly spread."""
    stride = max(1.0, len(sequences) / most)
    return [sequences[int(index * stride)] for index in range(min(most, len(sequences)))]


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
