"""Labels that go with one group's words: what a model would learn of people that it should learn of the task.

For each label and group a 2 x 2 table over questions (has the label or not, names the group or not), Fisher's exact
test, one-sided, and Holm's correction over all tables. Rows of one template count once: they are no independent proof.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from training.gate.findings import Finding
from training.gate.labels import Labels
from training.gate.subject import Subject, normal
from training.statistics import holm

GROUP_WORDS = "group_words.json"
ALPHA = 0.01
LEAST_RATIO = 2.0  # of the odds; smaller ones are real and harmless
LEAST_ROWS = 5  # templates with label and group


@dataclass(frozen=True)
class Association:
    """A label and a group that meet more often than chance lets them."""

    label: str
    group: str
    together: int
    of_group: int
    of_label: int
    log_odds: float
    p: float

    def __str__(self) -> str:
        odds = math.exp(self.log_odds)
        return (
            f"{self.label} with {self.group}: {self.together:,} of {self.of_group:,} templates, odds times {odds:.1f}, "
            f"p {self.p:.1g}"
        )


def groups_in(text: str) -> set[str]:
    """The groups of people that a normalised text names, in English, Vietnamese, German, French or Spanish."""
    pattern, group_of = _words()
    return {group_of[word] for word in pattern.findall(text)}


@cache
def _words() -> tuple[re.Pattern[str], dict[str, str]]:
    listed = json.loads((Path(__file__).parent / GROUP_WORDS).read_text("utf-8"))
    group_of = {
        normal(word): group for group, languages in listed.items() for words in languages.values() for word in words
    }
    longest_first = sorted(group_of, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)"), group_of


def associations(questions: Sequence[str], labels: Sequence[str | None]) -> list[Association]:
    """Those that stand after Holm's correction, the strongest first; equal questions (templates) count once."""
    units = {(text, label) for text, label in zip(questions, labels, strict=True) if label is not None}
    of_label = Counter(label for _, label in units)
    of_group: Counter[str] = Counter()
    together: Counter[tuple[str, str]] = Counter()
    for text, label in units:
        groups = groups_in(text)
        of_group.update(groups)
        together.update((label, group) for group in groups)
    made = [
        _association(label, group, count, of_group[group], of_label[label], len(units))
        for (label, group), count in sorted(together.items())
        if count >= LEAST_ROWS
    ]
    corrected = [replace(one, p=p) for one, p in zip(made, holm([one.p for one in made]), strict=True)]
    strong = [one for one in corrected if one.p < ALPHA and one.log_odds >= math.log(LEAST_RATIO)]
    return sorted(strong, key=lambda one: (-one.log_odds, one.label, one.group))


def _association(label: str, group: str, together: int, of_group: int, of_label: int, units: int) -> Association:
    """Log odds ratio with half a row added to each cell (Haldane), and the chance of so many or more together."""
    from scipy.stats import hypergeom

    only_group, only_label = of_group - together, of_label - together
    neither = units - together - only_group - only_label
    log_odds = math.log((together + 0.5) * (neither + 0.5) / ((only_group + 0.5) * (only_label + 0.5)))
    p = float(hypergeom.sf(together - 1, units, of_group, of_label))
    return Association(label, group, together, of_group, of_label, log_odds, p)


def of_groups(subject: Subject, labels: Labels, masked: Sequence[str]) -> Iterator[Finding]:
    """Labels that go with one group's words; `masked` are the questions without the answers' own values."""
    found = associations(masked, labels.values)
    if not found:
        return
    wanted: dict[str, set[str]] = defaultdict(set)
    for one in found:
        wanted[one.label].add(one.group)
    shown = {
        index: f"{labels.values[index]}: {', '.join(sorted(groups))}"
        for index, text in enumerate(masked)
        if (groups := groups_in(text) & wanted.get(str(labels.values[index]), set()))
    }
    yield subject.finding("labels_of_groups", list(shown), "; ".join(map(str, found[:5])), list(shown.values()))
