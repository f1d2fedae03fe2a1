"""The whole gate over one data set: every rule that is not off, in one order, into one report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from adapters.errors import ConfigInvalid
from training.config import TrainingConfig
from training.data.columns import Columns
from training.data.formats import read_rows
from training.data.template import ChatTemplate, load_template
from training.gate import amount, bias, form, labels, names, privacy, toxicity, twins
from training.gate.findings import RULES, Finding
from training.gate.report import Report
from training.gate.subject import Subject
from training.levels import levels_of

THINKING = ("reasoning_content", "<think>")


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


@dataclass
class Base:
    """The base that rows are rendered for."""

    template: ChatTemplate
    parameters: int
    longest: int
    facts: dict[str, Any] = field(default_factory=dict)


def check(asked: Asked) -> Report:
    """Look at the data; raises DataInvalid where there is no data at all, ConfigInvalid for settings that are none."""
    levels = levels_of(asked.rules, RULES, "docs/data.md")
    subject = read(asked.data, asked.columns)
    base = _open(asked)
    figures: dict[str, Any] = {"rows": len(subject.rows), "unreadable_rows": subject.bad_count}
    found = list(findings(subject, base, asked, figures))
    about = {"data": subject.file.path.name, "digest": subject.file.digest, "form": subject.file.description}
    about |= base.facts if base else {}
    return Report.made(about, figures, found, levels)


def findings(subject: Subject, base: Base | None, asked: Asked, figures: dict[str, Any]) -> Iterator[Finding]:
    """Everything that is found; what was measured meanwhile is put into `figures`."""
    compared = twins.texts_of(subject, twins.boilerplate_of(subject))
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
        _languages(subject, asked, figures),
        _labels(subject, asked, figures, compared),
        _twins(subject, asked, figures, compared),
        privacy.private(subject),
        _names(subject, asked, figures),
        _toxicity(subject, figures),
    )


def passed(config: TrainingConfig) -> Report | None:
    """The gate's report on a run's data, None where it is not asked for; raises DataInvalid where a finding blocks."""
    if not config.data_check:
        return None
    from adapters.embedded import EMBEDDED

    asked = Asked(
        config.data,
        config.base or EMBEDDED,
        validation=config.validation,
        columns=config.columns,
        rules=config.rules,
        supervise=config.supervise,
        thinking=config.thinking,
        max_length=config.max_length,
        over_long=config.over_long,
    )
    report = check(asked)
    if report.verdict == "block":
        raise report.error()
    return report


def read(path: Path, columns: tuple[str, ...]) -> Subject:
    """All rows of a file or folder that can be read, and what is wrong with the others."""
    reading = read_rows(path, Columns(columns))
    if not reading.file.rows and not reading.records:
        raise reading.error()
    return Subject(reading.file, reading.problems, reading.bad)


def _open(asked: Asked) -> Base | None:
    if asked.base is None:
        return None
    from adapters.embedded import open_base
    from training.material import parameter_count

    if asked.supervise not in ("all", "last"):
        raise ConfigInvalid(f"supervise is {asked.supervise!r}; it must be all or last.", param="supervise")
    base = open_base(asked.base)
    template = load_template(base.folder, asked.thinking)
    longest = min(asked.max_length or base.context_length_tokens, base.context_length_tokens)
    facts = {
        "base": base.id,
        "template": template.digest,
        "longest_tokens": longest,
        "renders_thought": any(word in template.text for word in THINKING),
    }
    return Base(template, parameter_count(base), longest, facts)


def _lengths(subject: Subject, base: Base | None, asked: Asked, figures: dict[str, Any]) -> Iterator[Finding]:
    if base is None:
        return
    lengths = amount.measure(subject, base.template, asked.supervise)
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


def _twins(subject: Subject, asked: Asked, figures: dict[str, Any], compared: twins.Texts) -> Iterator[Finding]:
    figures["twins"] = {}
    yield from twins.within(subject, compared, figures["twins"])
    for name, path in (("test", asked.test), ("validation", asked.validation)):
        if path is not None:
            yield from twins.across(subject, read(path, asked.columns), name)
