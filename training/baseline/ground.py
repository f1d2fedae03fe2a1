"""What both halves of a baseline stand on: the settings, the three sets, the task, and the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.bases import BaseModel
from adapters.errors import BaseInvalid, ConfigInvalid, DataInvalid, Problem
from training.baseline.prompts import Kitchen
from training.baseline.rivals import labels_of
from training.baseline.sets import Part, Sets, read_sets
from training.data.columns import Columns
from training.data.jsontext import RowInvalid
from training.data.template import ChatTemplate, load_template
from training.evaluate import Prompt
from training.evaluation.figures import Grouping, figure
from training.groups import clusters_of
from training.metrics import METRICS, Items, Task, items, task_of
from training.metrics.task import chosen
from training.reference import claimed_base
from training.scores import parse_answer, spoken

NO_DECIDER = ("invalid",)  # less of it is better
REPORTED = ("exact_match", "accuracy", "macro_f1", "field_f1", "json_valid", "chrf")
SHORT_ANSWER = 64  # letters
ROOM_TOKENS = 8  # beyond the longest answer of a training row


@dataclass(frozen=True)
class Asked:
    """What is measured and how. `rows` bounds the validation and the test rows, evenly spread."""

    training: Path
    validation: Path
    test: Path | None = None
    base: str | None = None
    adapter: Path | None = None
    columns: tuple[str, ...] = ()
    label: str | None = None
    metric: str | None = None
    margin: float = 0.02
    examples: tuple[int, ...] = (8,)
    prompts: tuple[str, ...] = ()  # own system prompts
    rows: int | None = None
    by: str = "template"
    probe: bool = True
    seed: int = 0
    max_tokens: int = 256
    max_prompt_tokens: int = 2048
    url: str | None = None
    served: str | None = None  # NAME or NAME@N of the server at `url`
    api_key: str = field(default="", repr=False)
    thinking: bool | None = None  # what the served adapter's card says

    def __post_init__(self) -> None:
        checks = (
            ("margin", 0 <= self.margin < 1, "from 0 to below 1 (0.02 is two points)"),
            ("examples", all(0 <= count <= 64 for count in self.examples), "between 0 and 64 each"),
            ("rows", self.rows is None or self.rows >= 1, "1 or more"),
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("max_prompt_tokens", self.max_prompt_tokens >= 16, "16 or more"),
        )
        for key, is_fine, wanted in checks:
            if not is_fine:
                raise ConfigInvalid(f"{key} is {getattr(self, key)!r}; it must be {wanted}.", param=key)
        if self.metric is not None and self.metric not in decisive():
            raise ConfigInvalid(
                f"metric is {self.metric!r}; it must be one of {', '.join(decisive())}.", param="metric"
            )


def decisive() -> list[str]:
    """The metrics that may decide."""
    return [name for name in METRICS if name not in NO_DECIDER]


@dataclass(frozen=True)
class Ground:
    """Opened and checked, without a model in memory."""

    asked: Asked
    sets: Sets
    task: Task
    metric: str
    base: BaseModel
    template: ChatTemplate
    known: tuple[str, ...]  # labels of the training rows
    longest_answer: int  # of a training row, in tokens
    groups: Mapping[str, Sequence[str]]  # of each row of a set its cluster, by the set's name

    def tokens(self, prompt: Prompt) -> int:
        """How many the prompt has; raises BaseInvalid where the template cannot render it."""
        try:
            return len(self.template.prompt_ids(prompt.messages, prompt.tools, prompt.thinking))
        except RowInvalid as error:
            raise BaseInvalid(f"The base's chat template cannot render a prompt: {error.message}") from error

    def max_tokens(self) -> int:
        """As long as the longest answer of a training row, and a little more."""
        return min(self.asked.max_tokens, self.longest_answer + ROOM_TOKENS)

    def most_prompt_tokens(self) -> int:
        return min(self.asked.max_prompt_tokens, self.base.context_length_tokens - self.max_tokens())

    @property
    def wants_probe(self) -> bool:
        """Whether a probe of the frozen base is asked for, and there is a label for it to tell."""
        return self.asked.probe and self.task.label is not None

    def kitchen(self, seed: int | None = None) -> Kitchen:
        return Kitchen(self.sets.training, self.task, self.asked.seed if seed is None else seed)

    def scored(self, part: Part, answers: Sequence[str], metrics: Sequence[str] = ()) -> Items:
        """Answers to the rows of a part; the deciding metric first."""
        names = metrics or tuple(dict.fromkeys((self.metric, *(n for n in REPORTED if n in self.task.metrics))))
        return items(part.expected, answers, self.task.label, names, self.known)

    def grouping(self, part: Part, scored: Items) -> Grouping:
        return Grouping(self.groups[part.name], scored.strata)

    def figures(self, part: Part, scored: Items) -> dict[str, Any]:
        """Every figure with its interval over clusters of rows."""
        grouping = self.grouping(part, scored)
        return {name: figure(measure, grouping) for name, measure in scored.measures.items()}

    def facts(self) -> dict[str, Any]:
        """What a report is about: two that agree in this can go on from one another."""
        return {
            "base": {"id": self.base.id, "digest": self.base.digest, "template": self.template.digest},
            "data": {"training": self.sets.training.as_dict(), "validation": self.sets.validation.as_dict()},
            "task": {"kind": self.task.kind, "label": self.task.label, "metric": self.metric},
        }


def open_ground(asked: Asked) -> Ground:
    """Read and check everything that needs no model; raises DataInvalid, ConfigInvalid, BaseInvalid."""
    from adapters.embedded import EMBEDDED, open_base

    sets = read_sets(asked.training, asked.validation, asked.test, Columns(asked.columns))
    test = sets.test.first(asked.rows) if sets.test is not None else None
    sets = Sets(sets.training, sets.validation.first(asked.rows), test)
    task = task_for(sets, asked.label)
    metric = chosen(task, (asked.metric,) if asked.metric else None)[0]
    for part in (sets.validation, sets.test):
        if part is not None:
            _check_kind(part, task)
    claimed = claimed_base(asked.adapter) if asked.adapter is not None else None
    base = open_base(asked.base or claimed or EMBEDDED)
    template = load_template(base.folder)
    known = tuple(dict.fromkeys(labels_of(sets.training, task))) if task.label is not None else ()
    longest = max(len(template.tokenizer(text)["input_ids"]) for text in set(sets.training.expected))
    groups = {part.name: clusters_of(part.rows, asked.by) for part in (sets.validation, test) if part is not None}
    return Ground(asked, sets, task, metric, base, template, known, longest, groups)


def task_for(sets: Sets, label: str | None) -> Task:
    """What the answers of the training and validation rows are; one short answer to everything is a label, too."""
    expected = [*sets.training.expected, *sets.validation.expected]
    task = task_of(expected, label)
    different = {spoken(text) for text in expected}
    if task.kind == "text" and label is None and len(different) == 1 and len(different.pop()) <= SHORT_ANSWER:
        return task_of(expected, "")
    return task


def _check_kind(part: Part, task: Task) -> None:
    """A part of objects has objects only."""
    if task.kind != "objects":
        return
    message, advice = "the answer is no JSON object and no tool call.", "put such rows into sets of their own"
    problems = tuple(
        Problem("answer_other", str(example.row.place), message, advice)
        for example in part.examples
        if parse_answer(example.expected) is None
    )
    if problems:
        raise DataInvalid(
            f"{len(problems):,} of {len(part.examples):,} rows of {part.path} expect no object, and the training rows "
            "do.",
            param=part.name,
            problems=problems,
        )
