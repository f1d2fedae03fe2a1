"""`hotshoe review`: a config file against every rule, with the data and base where they are given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from training.config import SERVED_RANK
from training.levels import LEVELS, levels_of
from training.review import optimisation, precision, rendering, running, shape
from training.review.dialects import DIALECTS
from training.review.facts import Base, Data, Known, base_beside, base_named, data_of, data_of_facts
from training.review.findings import Finding, shown
from training.review.ours import chosen
from training.review.reading import read, translate
from training.review.rules import RULES
from training.review.view import View
from training.review.words import Given, Reading

FORMAT = 1
CHECKS = (optimisation.findings, shape.findings, precision.findings, rendering.findings, running.findings)


@dataclass(frozen=True)
class Asked:
    """What to review, and what is known beside the file. `rules` sets levels: `code=off`."""

    config: Path
    dialect: str | None = None
    data: Path | None = None
    base: str | None = None
    gpu: str | None = None
    max_rank: int = SERVED_RANK
    columns: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Review:
    """The findings as dictionaries, heaviest first, and what the file says in the neutral vocabulary."""

    config: str
    reading: Reading
    findings: list[dict[str, Any]]
    facts: Mapping[str, Any]

    @property
    def verdict(self) -> str:
        """`block`, `warn` or `pass`."""
        found = {row["severity"] for row in self.findings}
        return next((level for level in ("block", "warn") if level in found), "pass")

    def as_dict(self) -> dict[str, Any]:
        values = self.reading.values
        return {
            "format": FORMAT,
            "config": self.config,
            "dialect": self.reading.dialect,
            "verdict": self.verdict,
            "findings": self.findings,
            "facts": dict(self.facts),
            "settings": {name: _told(values[name]) for name in sorted(values)},
            "without_a_rule": sorted(self.reading.aside),
        }


def review(asked: Asked) -> Review:
    """Raises ConfigInvalid for a file that is no config, DataInvalid for data that is none."""
    levels = levels_of(asked.rules, RULES, "docs/review.md")
    reading = read(asked.config, asked.dialect)
    own = reading.value("base")
    known = Known(
        base=base_beside(own, asked.base),
        data=data_of(asked.data, asked.columns, asked.base or own) if asked.data is not None else None,
        gpu=asked.gpu,
        is_cpu=asked.gpu == "cpu",
        max_rank=asked.max_rank,
    )
    if reading.config is not None:
        chosen(reading, reading.config, known)
    view = View(reading, known)
    return Review(asked.config.name, reading, found(view, levels), _facts(view))


def review_of_settings(settings: Mapping[str, Any], facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The findings on a run of ours; `settings` are its own, so nothing in them is a default."""
    top = {key: Given(value, key, 1) for key, value in settings.items()}
    reading = translate(DIALECTS["hotshoe"], top)
    reading.values["validation"] = Given("validation rows" if facts.get("has_validation") else 0, "validation", 1)
    name = str(facts.get("base") or "")
    told = base_named(name)
    parameters, context = facts.get("parameters"), facts.get("context_length_tokens")
    known = Known(
        base=Base(name, parameters or told.parameters, context or told.context_length_tokens, told.architecture),
        data=data_of_facts(facts),
        gpu=facts.get("gpu"),
        is_cpu=facts.get("device") == "cpu",
        max_rank=int(facts.get("max_rank") or SERVED_RANK),
    )
    return found(View(reading, known), {})


def found(view: View, levels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every finding whose rule is not off, heaviest first."""
    rows = [finding.as_dict(levels) for finding in chain(of_the_file(view), *(check(view) for check in CHECKS))]
    kept = [row for row in rows if row["severity"] != "off"]
    return sorted(kept, key=lambda row: LEVELS.index(row["severity"]))


def of_the_file(view: View) -> Iterator[Finding]:
    """Unknown keys, keys of old, values of the wrong kind, and what our own trainer refuses."""
    reading = view.reading
    for key in reading.unknown:
        near = f"{key.nearest}?" if key.nearest else ""
        yield Finding(RULES["key_unknown"], key.key, key.value, key.line, reading.title, near)
    for key in reading.renamed:
        yield Finding(RULES["key_renamed"], key.key, key.value, key.line, reading.title, key.nearest or "")
    for given, wanted in reading.unread:
        yield Finding(RULES["value_unreadable"], given.key, given.value, given.line, f"it must be {wanted}")
    if reading.refused is not None and not (reading.unknown or reading.unread):
        yield Finding(RULES["config_refused"], "config", None, 1, reading.refused)


def _facts(view: View) -> dict[str, Any]:
    data: Data | None = view.known.data
    facts: dict[str, Any] = {
        "base": view.base.id or None,
        "parameters": view.base.parameters,
        "rows_a_step": view.batch,
        "steps": view.steps,
    }
    if data is not None:
        lengths = {"p50": data.share(50), "p99": data.share(99), "max": data.longest}
        facts |= {"rows": data.rows, "training_rows": view.rows, "sequences_an_epoch": view.sequences}
        facts |= {"tokens": lengths, "counted_with": data.counted_with, "has_reasoning": data.has_reasoning}
    return facts


def _told(given: Given) -> dict[str, Any]:
    return {"value": shown(given.value), "key": given.key, "line": given.line or None}
