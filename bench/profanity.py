"""How often the swear word lists are wrong: on sentences for home assistants, in which nobody swears, by language."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

from bench.report import Report
from examples.agent_routing.templates import Language
from training.gate.toxicity import LISTED, OWN, Profanity

SENTENCES = 2_500
NAMES = {"zh": "zh-CN", "no": "nb"}  # home-assistant-intents' names of the languages, where they differ
NONE_THERE = ("eo",)


def run(rounds: int) -> Iterator[Report]:
    """Of each language's sentences those with a word of its list, and which words they are."""
    report = Report("Swear words: alarms on sentences without any")
    for code in (*LISTED, OWN):
        if code in NONE_THERE:
            continue
        said = sentences(NAMES.get(code, code))
        known = Profanity([code])
        found = [swearing for text in said if (swearing := known.of(text))]
        words = ", ".join(word for word, _ in Counter(word for listed in found for word in listed).most_common(3))
        report.rows.append({"language": code, "sentences": len(said), "alarms": len(found), "words": words or "none"})
    yield report


def sentences(code: str) -> list[str]:
    """Different sentences of a language; templates with slots that have no list of values are left out."""
    language, rng = Language.load(code), random.Random(0)
    templates = [template for listed in language.templates.values() for template in listed]
    said: dict[str, None] = {}
    for number in range(SENTENCES):
        try:
            said[language.sample(templates[number % len(templates)], rng)[0]] = None
        except (KeyError, IndexError, ValueError):
            continue
    return list(said)
