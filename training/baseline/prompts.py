"""Prompts for a base that was taught nothing: told what labels and fields there are, shown examples, or neither.

An example stands as an earlier turn of the conversation, between the system prompt and the question. Examples are
training rows, the same ones for every question (of different labels, drawn by seed) or those most like the question.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from training.baseline.nearest import Nearest
from training.baseline.sets import Part
from training.data.rows import Row
from training.evaluate import Example, Messages, Prompt
from training.metrics import Task
from training.metrics.labels import label_in
from training.sample import label_by_label
from training.scores import TOOL_CALL, parse_answer, spoken

MOST_LISTED = 200
MOST_FIELDS = 40
PICKS = ("seed", "similar")

Measured = Callable[[Prompt], int]  # a prompt's tokens


@dataclass(frozen=True)
class Recipe:
    """How a question becomes a prompt. `system` replaces the row's own; `pick` is how examples are chosen."""

    lists_labels: bool = False
    examples: int = 0
    pick: str = "seed"
    system: str | None = None

    @property
    def name(self) -> str:
        """What the report calls it."""
        parts = ["own prompt"] if self.system is not None else []
        parts += ["labels listed"] if self.lists_labels else []
        if self.examples:
            parts.append(f"{self.examples} examples {'by seed' if self.pick == 'seed' else 'most like the question'}")
        return ", ".join(parts) or "as the rows are"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Recipe:
        return cls(**value)


@dataclass(frozen=True)
class Written:
    """The prompts of a recipe for some rows; `left_out` counts rows whose prompt had no room for every example."""

    prompts: list[Prompt]
    tokens: list[int]
    left_out: int


class Kitchen:
    """Writes prompts from the training rows."""

    def __init__(self, training: Part, task: Task, seed: int = 0) -> None:
        self.training = training
        self.listing = listing(training.expected, task)
        self._seeded = _spread(training, task, seed)
        self._nearest: Nearest | None = None

    def recipes(self, counts: Sequence[int] = (8,), own: Sequence[str] = ()) -> list[Recipe]:
        """All that is tried: with and without the labels, without examples and with so many, and a person's own."""
        lists = (False, True) if self.listing else (False,)
        shown = [count for count in counts if count]
        made = [Recipe(listed) for listed in lists]
        made += [Recipe(listed, count, pick) for count in shown for pick in PICKS for listed in lists]
        for text in own:
            made += [Recipe(system=text), *(Recipe(False, count, pick, text) for count in shown for pick in PICKS)]
        return made

    def write(self, recipe: Recipe, part: Part, tokens: Measured, most_tokens: int) -> Written:
        """The prompt for each row; examples are left out, the least alike first, until it has at most `most_tokens`."""
        prompts, sizes, left_out = [], [], 0
        for example, shown in zip(part.examples, self._shown(recipe, part), strict=True):
            prompt = self.prompt(recipe, example, shown)
            size = tokens(prompt)
            wanted = len(shown)
            while size > most_tokens and shown:
                shown = shown[1:]
                prompt = self.prompt(recipe, example, shown)
                size = tokens(prompt)
            left_out += len(shown) < wanted
            prompts.append(prompt)
            sizes.append(size)
        return Written(prompts, sizes, left_out)

    def prompt(self, recipe: Recipe, example: Example, shown: Sequence[int]) -> Prompt:
        """The row's conversation with the recipe's system prompt and these training rows before it."""
        messages = example.messages
        own = [message["content"] for message in messages if message["role"] == "system"]
        system = own if recipe.system is None else [recipe.system]
        if recipe.lists_labels:
            system = [*system, self.listing]
        turns = [turn for at in shown for turn in as_turns(self.training.examples[at].row)]
        first: Messages = [{"role": "system", "content": "\n\n".join(filter(None, system))}] if any(system) else []
        rest = [message for message in messages if message["role"] != "system"]
        return Prompt([*first, *turns, *rest], example.prompt.tools, example.prompt.thinking)

    def _shown(self, recipe: Recipe, part: Part) -> list[list[int]]:
        if not recipe.examples:
            return [[] for _ in part.examples]
        if recipe.pick == "seed":
            return [self._seeded[: recipe.examples] for _ in part.examples]
        if self._nearest is None:
            self._nearest = Nearest(self.training.questions)
        return self._nearest.of(part.questions, recipe.examples)


def as_turns(row: Row) -> Messages:
    """A training row as turns of a conversation that went before: its reasoning and system prompt left out."""
    last = row.learned_turns()[-1]
    turns: Messages = []
    for message in row.messages[: last + 1]:
        if message["role"] == "system":
            continue
        made = {key: value for key, value in message.items() if key != "reasoning_content"}
        if message["role"] == "assistant":
            made["content"] = spoken(message["content"])
        turns.append(made)
    return turns


def listing(expected: Sequence[str], task: Task) -> str:
    """A sentence for the system prompt with the labels and fields that the training rows have; "" for free text."""
    if task.kind == "text":
        return ""
    labels = Counter(label for text in expected if (label := label_in(text, task.label or "")) is not None)
    names = [name for name, _ in labels.most_common(MOST_LISTED)] if task.label is not None else []
    if task.kind == "labels":
        return f"Answer with exactly one of these labels and nothing else: {'; '.join(names)}."
    fields = Counter(key for text in expected for key in parse_answer(text) or {} if key != task.label)
    others = [name for name, _ in fields.most_common(MOST_FIELDS)]
    if any(TOOL_CALL.search(text) for text in expected):
        return _listed_calls(names, [name.rpartition("arguments.")[2] for name in others])
    said = ["Answer with one JSON object and nothing else."]
    if task.label:
        said.append(f'Its "{task.label}" is one of: {", ".join(names)}.')
    if others:
        said.append(f"Its {'other ' if task.label else ''}fields, where they apply, are: {', '.join(others)}.")
    return " ".join(said)


def _listed_calls(names: Sequence[str], arguments: Sequence[str]) -> str:
    said = ["Answer with a tool call."]
    if names:
        said.append(f"The tools are: {', '.join(names)}.")
    if arguments:
        said.append(f"Their arguments, where they apply, are: {', '.join(dict.fromkeys(arguments))}.")
    return " ".join(said)


def _spread(training: Part, task: Task, seed: int) -> list[int]:
    """All training rows in an order that shows a row of each label before it shows a second one of any."""
    order = list(range(len(training.examples)))
    random.Random(seed).shuffle(order)  # noqa: S311 - a reproducible choice, no secret
    if task.label is None:
        return order
    return label_by_label(order, [label_in(text, task.label) for text in training.expected])
