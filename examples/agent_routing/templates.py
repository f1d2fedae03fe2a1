"""Home Assistant's sentence templates: PyPI's `home-assistant-intents`, parsed by `hassil`, sampled with a seed.

A template such as `[<turn>] [<the>] {area} <light> [to] on` is a tree of texts, choices, rules and lists. A sample
walks the tree once; every `{list}` that it passes gives a slot its name and value.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hassil.expression import Alternative, Group, ListReference, Permutation, RuleReference, TextChunk
from hassil.parse_expression import parse_sentence

from examples.agent_routing.vocabulary import values

Slots = dict[str, str | int]


@dataclass(frozen=True)
class Template:
    """One sentence template of one intent; `domains` are the kinds of device that its {name} may be."""

    intent: str
    text: str
    domains: tuple[str, ...]


@dataclass
class Language:
    """All templates of one language, and what is needed to sample them."""

    code: str
    templates: dict[str, list[Template]]  # by intent
    lists: Mapping[str, Any]
    rules: Mapping[str, str]
    _parsed: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, code: str) -> Language:
        from home_assistant_intents import get_intents

        data = get_intents(code)
        if data is None:
            raise ValueError(f"home-assistant-intents has no language {code!r}.")
        templates = {intent: _templates(intent, block["data"]) for intent, block in data["intents"].items()}
        return cls(code, templates, data["lists"], data["expansion_rules"])

    def labels(self, least: int) -> list[str]:
        """The intents with at least `least` different templates."""
        return [intent for intent, templates in self.templates.items() if len(templates) >= least]

    def sample(self, template: Template, rng: random.Random) -> tuple[str, Slots]:
        """One sentence of the template and the slots that it fills."""
        walk = _Walk(self, template, rng)
        walk.visit(self.parse(template.text))
        return " ".join("".join(walk.words).split()), walk.slots

    def slots(self, template: Template) -> frozenset[str]:
        """The names of all slots that some sentence of the template fills."""
        return frozenset(self._slots(self.parse(template.text)))

    def parse(self, text: str) -> Any:
        if text not in self._parsed:
            self._parsed[text] = parse_sentence(text).expression
        return self._parsed[text]

    def _slots(self, node: Any) -> Iterator[str]:
        if isinstance(node, ListReference):
            yield node.slot_name
        elif isinstance(node, RuleReference):
            yield from self._slots(self.parse(self.rules[node.rule_name]))
        elif isinstance(node, Group):
            for item in node.items:
                yield from self._slots(item)


def function_call(intent: str, slots: Slots) -> str:
    """The answer that is taught: one JSON object, the intent first and the slots in alphabetical order."""
    return json.dumps({"intent": intent, **dict(sorted(slots.items()))}, ensure_ascii=False)


@dataclass
class _Walk:
    language: Language
    template: Template
    rng: random.Random
    words: list[str] = field(default_factory=list)
    slots: Slots = field(default_factory=dict)

    def visit(self, node: Any) -> None:
        if isinstance(node, TextChunk):
            self.words.append(node.original_text)
        elif isinstance(node, ListReference):
            spoken, value = self._entry(node.list_name)
            self.words.append(f"{node.prefix or ''}{spoken}{node.suffix or ''}")
            self.slots[node.slot_name] = value
        elif isinstance(node, RuleReference):
            self.visit(self.language.parse(self.language.rules[node.rule_name]))
        elif isinstance(node, Alternative):
            self.visit(self.rng.choice(node.items))
        elif isinstance(node, Permutation):
            for item in self.rng.sample(node.items, len(node.items)):
                self.visit(item)
        elif isinstance(node, Group):
            for item in node.items:
                self.visit(item)
        else:
            raise TypeError(f"Template {self.template.text!r} holds a {type(node).__name__}, which no rule covers.")

    def _entry(self, list_name: str) -> tuple[str, str | int]:
        """What is said for a list, and what it means."""
        words = values(list_name, self.language.code, self.template.domains)
        if words is not None:
            word = self.rng.choice(words)
            return word, word
        definition = self.language.lists[list_name]
        if "range" in definition:
            limits = definition["range"]
            number = self.rng.randrange(limits["from"], limits["to"] + 1, limits.get("step", 1))
            return str(number), number * limits.get("multiplier", 1)
        entry = self.rng.choice(definition["values"])
        spoken = _Walk(self.language, self.template, self.rng)
        spoken.visit(self.language.parse(entry["in"]))
        return "".join(spoken.words), entry["out"]


def _templates(intent: str, blocks: list[dict[str, Any]]) -> list[Template]:
    found: dict[str, Template] = {}
    for block in blocks:
        domain = block.get("requires_context", {}).get("domain", ())
        domains = (domain,) if isinstance(domain, str) else tuple(domain)
        for text in block["sentences"]:
            found.setdefault(text, Template(intent, text, domains))
    return list(found.values())
