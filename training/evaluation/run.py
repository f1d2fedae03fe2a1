"""`hotshoe eval` without its terminal: from what was asked for to the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import ConfigInvalid, EngineUnavailable
from training.data.columns import Columns
from training.data.formats import read_data
from training.data.rows import Row
from training.evaluate import Example, example_of, load_examples
from training.evaluation.answering import Answers, Local, Place, Source, open_source
from training.evaluation.figures import Grouping
from training.evaluation.gptscore import check_aspect, gptscore
from training.evaluation.judge import MOST_ROWS, Endpoint, Pair, judged
from training.evaluation.report import Answered, Asked, Choice, Report, made
from training.evaluation.semantic import MISSING, embedding_folder, semantic
from training.evaluation.similarity import nearness
from training.metrics.measure import Measure
from training.metrics.task import METRICS, task_of
from training.sample import evenly

MODEL_METRICS = ("semantic", "gptscore")
Step = Callable[[str], Callable[[int, int], None]]


@dataclass(frozen=True)
class Request:
    """What is to be evaluated, and how."""

    data: Path
    model: str
    place: Place
    columns: Columns | None = None
    rows: int | None = None
    label: str | None = None
    metrics: Sequence[str] | None = None
    against_base: bool = False
    against: Sequence[str] = ()
    train: Path | None = None
    by: str = "template"
    max_tokens: int = 128
    noise_rows: int = 64
    judge: Endpoint | None = None
    judge_base: str | None = None
    aspect: str = "correct"


@dataclass(frozen=True)
class Outcome:
    """The report, with the rows and the answers that it was made from."""

    report: Report
    examples: Sequence[Example]
    answered: Answered
    rivals: Sequence[Answered]
    base: str | None = None  # which rival is the model's base


@dataclass
class _Work:
    """What is known so far."""

    request: Request
    examples: list[Example]
    step: Step
    notes: list[str] = field(default_factory=list)
    sections: dict[str, Any] = field(default_factory=dict)


def evaluate(request: Request, step: Step) -> Outcome:
    """Ask the model and its rivals every row, score, and report; `step(name)` gives what takes the progress of a step.

    Raises DataInvalid, ConfigInvalid, BaseInvalid, BaseMismatch, AdapterRefused, EngineUnavailable, InvalidRequest.
    """
    examples = load_examples(request.data, request.columns)
    if request.rows:
        examples = evenly(examples, request.rows)
    rows, expected = [example.row for example in examples], [example.expected for example in examples]
    wanted = _wanted(request, expected)
    asked = Asked.of(rows, expected, request.by)
    trained = read_data(request.train, request.columns).rows if request.train else None
    work = _Work(request, examples, step)
    source = open_source(request.model, request.place)
    base = source.base() if request.against_base else None
    _refuse_twice([request.model, *([base.name] if base is not None else []), *request.against])
    own, *rivals = _measured(work, _answers(work, source, base), wanted, source)
    _forgetting(work, source)
    if request.judge is not None:
        work.sections["judge"] = _judged(work, request.judge, asked, [own, *rivals])
    choice = Choice(request.label, wanted, _known(request, examples, trained))
    about = {
        "model": request.model,
        "data": str(request.data),
        "grouped_by": request.by,
        **own.said,
        "notes": work.notes,
    }
    near = nearness(rows, trained) if trained else None
    report = made(about, asked, own, rivals, choice, near, work.sections)
    return Outcome(report, examples, own, rivals, base.name if base is not None else None)


def _refuse_twice(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigInvalid(f"{name} is named twice: --against is for other models.", param="against")


def _answers(work: _Work, source: Source, base: Source | None) -> dict[str, Answers]:
    """The answers of the model, of its base where that is wanted, and of every rival; some rows the model has twice."""
    request, examples = work.request, work.examples
    twice = evenly(range(len(examples)), request.noise_rows) if request.noise_rows else ()
    found = {request.model: source.answers(examples, request.max_tokens, twice, work.step("rows"))}
    if base is not None:
        found[base.name] = base.answers(examples, request.max_tokens, (), work.step("rows of the base"))
    for name in request.against:
        rival = open_source(name, request.place)
        found[name] = rival.answers(examples, request.max_tokens, (), work.step(f"rows of {name}"))
    return found


def _wanted(request: Request, expected: Sequence[str]) -> list[str]:
    """The metrics to compute: those that were asked for, else the task's and for texts those of models."""
    check_aspect(request.aspect)
    if request.metrics:
        unknown = [name for name in request.metrics if name not in (*METRICS, *MODEL_METRICS)]
        if unknown:
            listed = ", ".join((*METRICS, *MODEL_METRICS))
            raise ConfigInvalid(f"There is no metric {unknown[0][:80]!r}; there are {listed}.", param="metrics")
        if "semantic" in request.metrics and embedding_folder() is None:
            raise ConfigInvalid(f"semantic cannot be computed: {MISSING}.", param="metrics")
        return list(request.metrics)
    task = task_of(expected, request.label)
    if task.kind != "text":
        return [*task.metrics, *(["gptscore"] if request.judge_base else [])]
    return [*task.metrics, *MODEL_METRICS]


def _measured(work: _Work, found: dict[str, Answers], wanted: Sequence[str], source: Source) -> list[Answered]:
    """Every model's answers with the scores that other models give them."""
    measures: dict[str, dict[str, Measure]] = {name: {} for name in found}
    expected = [example.expected for example in work.examples]
    folder = embedding_folder()
    if "semantic" in wanted and folder is None:
        work.notes.append(MISSING)
    elif "semantic" in wanted and folder is not None:
        likeness = semantic(expected, {name: answers.texts for name, answers in found.items()}, folder)
        measures = {name: {"semantic": measure} for name, measure in likeness.items()}
    if "gptscore" in wanted:
        _gptscores(work, found, measures, source)
    return [
        Answered(name, answers.texts, answers.again, answers.said, measures[name]) for name, answers in found.items()
    ]


def _gptscores(work: _Work, found: dict[str, Answers], measures: dict[str, dict[str, Measure]], source: Source) -> None:
    """GPTScore of every model's answers, and of the expected ones, by the evaluator that there is."""
    request = work.request
    context: AbstractContextManager[Any] = nullcontext()
    prompts = [example.prompt for example in work.examples]
    own = source.reference if isinstance(source, Local) else None
    if request.judge_base is not None:
        from training.reference import open_reference

        reference, evaluator = open_reference(request.judge_base), request.judge_base
    elif own is not None:
        reference, evaluator, context = own, "the model's own base", own.without_adapter()
    else:
        work.notes.append("gptscore needs an evaluator here: name a folder with --judge-base")
        return
    is_partial = own is not None and reference.base.digest == own.base.digest
    with context:
        for name, answers in found.items():
            measures[name]["gptscore"] = gptscore(
                reference.model, reference.template, prompts, answers.texts, request.aspect
            )
        expected = [example.expected for example in work.examples]
        right = gptscore(reference.model, reference.template, prompts, expected, request.aspect)
    warning = (
        "the evaluator is the judged model or its base: a weak judge, partial to what that would have said"
        if is_partial
        else "an evaluator favours answers like its own"
    )
    work.sections["gptscore"] = {
        "evaluator": evaluator,
        "is_partial": is_partial,
        "aspect": request.aspect,
        "of_expected": _mean(right),
        "warning": warning,
    }


def _mean(measure: Measure) -> float | None:
    import numpy as np

    known = measure.scores[np.isfinite(measure.scores)]
    return round(float(known.mean()), 6) if len(known) else None


def _forgetting(work: _Work, source: Source) -> None:
    """What the adapter made its base forget, or a whole model the base that --base names; asked in this process."""
    if not isinstance(source, Local):
        work.notes.append("forgetting was not measured: it needs the adapter's folder, not a server")
        return
    from training.evaluation.forgetting import forgetting
    from training.reference import open_reference, read_card

    own, base = source.reference, work.request.place.base
    work.step("general texts")
    if own.has_adapter:
        work.sections["forgetting"] = forgetting(own.model, own.template).as_dict()
    elif base is not None:
        before = open_reference(base)
        if before.base.config.get("vocab_size") != own.base.config.get("vocab_size"):
            raise ConfigInvalid(f"{base} has another vocabulary than {source.name}: it is not its base.", param="base")
        work.sections["forgetting"] = forgetting(before.model, own.template, own.model).as_dict()
    elif read_card(own.base.folder).get("settings", {}).get("method") == "full":
        work.notes.append("forgetting was not measured: name the base that this model was trained from with --base")


def _judged(work: _Work, endpoint: Endpoint, asked: Asked, answered: Sequence[Answered]) -> dict[str, Any]:
    """The judge's comparisons of the model with each rival; with the expected answers where there is none."""
    own, *rivals = answered
    rows = evenly(range(len(asked)), MOST_ROWS)
    others = {rival.name: rival.answers for rival in rivals} or {"the expected answers": asked.expected}
    grouping = Grouping([asked.clusters[row] for row in rows])
    found = {}
    for name, answers in others.items():
        pairs = [
            Pair(asked.questions[row], asked.expected[row] if rivals else "", own.answers[row], answers[row])
            for row in rows
        ]
        try:
            found[name] = judged(endpoint, pairs, work.step(f"verdicts on {name}")).report(grouping)
        except EngineUnavailable as error:  # the answers are there: what could be computed is reported
            work.notes.append(error.message)
    return {"model": endpoint.model, "rows": len(rows), "of_rows": len(asked), "against": found}


def _known(request: Request, examples: Sequence[Example], trained: Sequence[Row] | None) -> list[str]:
    """Labels of the training rows, which count as labels although the test data may lack them."""
    if trained is None:
        return []
    from training.metrics.labels import label_in

    task = task_of([example.expected for example in examples], request.label)
    if task.label is None:
        return []
    found = (label_in(example_of(row).expected, task.label) for row in trained)
    return sorted({label for label in found if label is not None})
