"""The dialects that are read: for each the keys with a rule, those without, its defaults, and names of old.

`words` is key -> (neutral name, how its value is read). `defaults` are what holds where a key is missing, as of the
versions that `known_keys` names. `finish` draws what follows from several keys at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from training.review import axolotl, llama_factory, ours, peers
from training.review.values import Convert
from training.review.words import Given, Reading


@dataclass(frozen=True)
class Dialect:
    """One trainer's way to write a config. `marks` are keys that only it has, by which it is told."""

    name: str
    title: str
    words: Mapping[str, tuple[str, Convert]]
    known: frozenset[str]
    marks: frozenset[str]
    finish: Callable[[Reading, Mapping[str, Given]], None]
    defaults: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    sections: frozenset[str] = frozenset()  # keys whose mappings hold settings


DIALECTS: Mapping[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect("hotshoe", "hotshoe train", ours.WORDS, ours.KNOWN, ours.MARKS, ours.finish, ours.DEFAULTS),
        Dialect(
            "llama-factory",
            "LLaMA-Factory",
            llama_factory.WORDS,
            llama_factory.KNOWN,
            llama_factory.MARKS,
            llama_factory.finish,
            llama_factory.DEFAULTS,
            llama_factory.RENAMED,
        ),
        Dialect(
            "axolotl",
            "Axolotl",
            axolotl.WORDS,
            axolotl.KNOWN,
            axolotl.MARKS,
            axolotl.finish,
            axolotl.DEFAULTS,
            axolotl.RENAMED,
            sections=frozenset({"special_tokens"}),
        ),
        Dialect(
            "trl",
            "TRL and PEFT",
            peers.WORDS,
            peers.KNOWN,
            peers.MARKS,
            peers.finish,
            peers.DEFAULTS,
            peers.RENAMED,
            sections=peers.SECTIONS,
        ),
        Dialect(
            "peft", "PEFT's adapter_config.json", peers.PEFT_WORDS, peers.PEFT_KNOWN, peers.PEFT_MARKS, peers.alone
        ),
    )
}
