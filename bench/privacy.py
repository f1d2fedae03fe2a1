"""How much of known private values the data check's rules find, and how much of what they find is one."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

from bench.private_texts import BOTH, Text, make
from bench.report import Report
from training.gate.privacy import MASKABLE, Match, matches
from training.statistics import interval

SEED = 11


def run(rounds: int) -> Iterator[Report]:
    """By rule and language precision and recall; by kind what was found, in sentences that name a value or none."""
    started = time.process_time()
    found = [(text, matches(text.text)) for text in make(SEED)]
    seconds = time.process_time() - started
    yield by_rule(found)
    yield by_kind(found)
    yield false_alarms(found)
    print(f"\n{len(found):,} texts in {seconds:.1f} CPU seconds")


def is_hit(text: Text, match: Match) -> bool:
    """The right rule at the right place."""
    start = text.text.index(text.value)
    return match.code == text.code and match.start < start + len(text.value) and start < match.end


def by_rule(found: list[tuple[Text, list[Match]]]) -> Report:
    report = Report("Privacy: precision and recall by rule, English and Vietnamese sentences")
    for code in MASKABLE:
        for language in BOTH:
            here = [(text, made) for text, made in found if text.language == language]
            planted = [any(is_hit(text, match) for match in made) for text, made in here if text.code == code]
            shown = [is_hit(text, match) for text, made in here for match in made if match.code == code]
            if not planted:
                continue
            recall = interval([float(hit) for hit in planted])
            report.rows.append(
                {
                    "rule": code,
                    "language": language,
                    "planted": len(planted),
                    "recall": sum(planted) / len(planted),
                    "recall, 95%": f"{recall.low:.2f} to {recall.high:.2f}",
                    "found": len(shown),
                    "precision": sum(shown) / len(shown) if shown else float("nan"),
                }
            )
    return report


def by_kind(found: list[tuple[Text, list[Match]]]) -> Report:
    planted = Counter(text.kind for text, _ in found if text.code)
    hits = Counter(text.kind for text, made in found if text.code and any(is_hit(text, match) for match in made))
    rows = [
        {"kind": kind, "planted": count, "found": hits[kind], "recall": hits[kind] / count}
        for kind, count in planted.items()
    ]
    return Report("Privacy: recall by kind", rows)


def false_alarms(found: list[tuple[Text, list[Match]]]) -> Report:
    report = Report("Privacy: alarms on texts without a private value")
    texts = Counter(text.kind for text, _ in found if not text.code)
    for kind, count in texts.items():
        alarms = Counter(match.code for text, made in found if text.kind == kind for match in made)
        listed = ", ".join(f"{code} {amount}" for code, amount in alarms.most_common()) or "none"
        report.rows.append({"kind": kind, "texts": count, "alarms": listed})
    return report
