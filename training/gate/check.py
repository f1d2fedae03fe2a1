"""The whole gate over one data set: every rule that is not off, in one order, into one report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from adapters.errors import ConfigInvalid
from training.config import OVER_LONG, SUPERVISE, TrainingConfig
from training.data.columns import Columns
from training.data.formats import read_rows
from training.gate import amount, bias, form, labels, names, privacy, toxicity, twins
from training.gate.findings import PAGE, RULES, Finding
from training.gate.looks import Rendered, facts_of, looking
from training.gate.report import Report
from training.gate.subject import Subject
from training.levels import levels_of

if TYPE_CHECKING:
    from adapters.bases import BaseModel
    from training.material import Material


@dataclass(frozen=True)
class Asked:
    """What is checked and how. `rules` are `code=level`; without a base no row is rendered and no length is known."""

    data: Path
    base: str | None = None
    test: Path | None = None
    validation: Path | None = None
    columns: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    supervise: str = "all"
    thinking: bool | None = None
    max_length: int | None = None
    over_long: str = "error"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigInvalid for a setting that is none."""
        for name, known in (("supervise", SUPERVISE), ("over_long", OVER_LONG)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigInvalid(f"{name} is {value[:80]!r}; it must be one of {', '.join(known)}.", param=name)
        levels_of(self.rules, RULES, PAGE)


@dataclass(frozen=True)
class Rendering:
    """The rows as a base's template renders them, and what is known of the base."""

    lengths: amount.Lengths
    parameters: int
    longest: int
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, lengths: amount.Lengths, base: BaseModel, template: Mapping[str, Any], max_length: int | None) -> Self:
        from training.material import parameter_count

        longest = min(max_length or base.context_length_tokens, base.context_length_tokens)
        facts = {"base": base.id, **template, "longest_tokens": longest}
        return cls(lengths, parameter_count(base), longest, facts)


@dataclass(frozen=True)
class Looked:
    """What each row was asked by itself: how it renders, where that was asked, and what is private in it."""

    rendering: Rendering | None
    private: privacy.ByRule


Others = Mapping[str, Subject]  # test and validation data, by these names


def check(asked: Asked) -> Report:
    """Look at the data; raises DataInvalid where there is no data at all."""
    subject = read(asked.data, asked.columns)
    named = {"test": asked.test, "validation": asked.validation}
    others = {name: read(path, asked.columns) for name, path in named.items() if path is not None}
    with looking_at(subject, asked) as looked:
        return _report(subject, others, looked, asked)


@contextmanager
def looking_at(subject: Subject, asked: Asked) -> Iterator[Callable[[], Looked]]:
    """The rows are looked at one by one, beside the block where they are many."""
    from adapters.embedded import open_base

    base = open_base(asked.base) if asked.base is not None else None
    rendered = Rendered(base.folder, asked.thinking, asked.supervise) if base is not None else None
    with looking(subject.rows, rendered) as seen:

        def looked() -> Looked:
            found = seen()
            if base is None:
                return Looked(None, found.private)
            return Looked(Rendering.of(found.lengths, base, found.template, asked.max_length), found.private)

        yield looked


def _report(subject: Subject, others: Others, looked: Callable[[], Looked], asked: Asked) -> Report:
    figures: dict[str, Any] = {"rows": len(subject.rows), "unreadable_rows": subject.bad_count}
    found = list(findings(subject, others, looked, asked, figures))
    about = {"data": subject.file.path.name, "digest": subject.file.digest, "form": subject.file.description}
    rendering = looked().rendering
    about |= rendering.facts if rendering else {}
    return Report.made(about, figures, found, levels_of(asked.rules, RULES, PAGE))


def findings(
    subject: Subject, others: Others, looked: Callable[[], Looked], asked: Asked, figures: dict[str, Any]
) -> Iterator[Finding]:
    """Everything that is found; what was measured meanwhile is put into `figures`.

    What is asked of all rows together comes first, while they are looked at one by one.
    """
    compared = twins.texts_of(subject)
    of_all = list(
        chain(
            _languages(subject, asked, figures),
            _labels(subject, asked, figures, compared),
            _twins(subject, others, figures, compared),
        )
    )
    of_people = list(chain(_names(subject, asked, figures), _toxicity(subject, figures)))
    seen = looked()
    base = seen.rendering
    return chain(
        form.unreadable(subject),
        form.forms(subject),
        form.systems(subject),
        form.order(subject),
        form.thoughts(subject, base.facts["renders_thought"] if base else None),
        form.calls(subject),
        form.encoding(subject),
        amount.rows(subject, base.parameters if base else None),
        _lengths(subject, base, asked, figures),
        of_all,
        privacy.private(subject, seen.private),
        of_people,
    )


def passed(config: TrainingConfig, material: Material) -> Report | None:
    """The gate's report on a run's data, None where it is not asked for; raises DataInvalid where a finding blocks.

    It is the report that `check` makes of the same files; what was gathered of them is not read or rendered again.
    """
    if not config.data_check:
        return None
    asked = Asked(config.data, rules=config.rules, over_long=config.over_long)
    validation = material.validation_file
    others = {"validation": Subject(validation)} if validation is not None else {}
    lengths = amount.Lengths.of_rendered(material.lengths)
    rendering = Rendering.of(lengths, material.base, facts_of(material.template), config.max_length)
    with looking(material.file.rows, None) as seen:
        report = _report(Subject(material.file), others, lambda: Looked(rendering, seen().private), asked)
    if report.verdict == "block":
        raise report.error()
    return report


def read(path: Path, columns: tuple[str, ...]) -> Subject:
    """All rows of a file or folder that can be read, and what is wrong with the others."""
    reading = read_rows(path, Columns(columns))
    if not reading.file.rows and not reading.records:
        raise reading.error()
    return Subject(reading.file, reading.problems, reading.bad)


def _lengths(subject: Subject, base: Rendering | None, asked: Asked, figures: dict[str, Any]) -> Iterator[Finding]:
    if base is None:
        return
    lengths = base.lengths
    figures |= amount.figures(lengths)
    yield from amount.unrendered(subject, lengths)
    yield from amount.too_long(subject, lengths, base.longest, asked.over_long)
    yield from amount.share(lengths)


def _languages(subject: Subject, asked: Asked, figures: dict[str, Any]) -> Iterator[Finding]:
    figures["languages"], findings = amount.languages(subject, asked.seed)
    yield from findings


def _labels(subject: Subject, asked: Asked, figures: dict[str, Any], compared: twins.Texts) -> Iterator[Finding]:
    found = labels.detect(subject)
    yield from labels.conflicts(subject, found)
    if found is None:
        return
    figures["labels"] = {"read_from": found.field or "the answer", "counts": dict(found.counts.most_common())}
    yield from labels.spelling(subject, found)
    yield from labels.balance(subject, found)
    figures["labels"]["judged"], findings = labels.doubtful(subject, found, asked.seed)
    yield from findings
    yield from bias.of_groups(subject, found, compared.masked)


def _names(subject: Subject, asked: Asked, figures: dict[str, Any]) -> Iterator[Finding]:
    figures["names"], findings = names.named(subject, names.installed(), asked.seed)
    yield from findings


def _toxicity(subject: Subject, figures: dict[str, Any]) -> Iterator[Finding]:
    figures["profanity"], findings = toxicity.profane(subject, figures["languages"]["shares"])
    yield from findings


def _twins(subject: Subject, others: Others, figures: dict[str, Any], compared: twins.Texts) -> Iterator[Finding]:
    figures["twins"] = {}
    yield from twins.within(subject, compared, figures["twins"])
    for name, other in others.items():
        yield from twins.across(subject, other, name, compared)
