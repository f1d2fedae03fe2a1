"""What the gate can find: every rule once, with its level, what it says and what to do; and one finding of it.

A rule's level is `block` (training refuses), `warn`, `note` or `off`; `code=level` sets another. `docs/data.md` prints
the table; a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

KEPT_EXAMPLES = 10  # of the places of one finding; all are counted


@dataclass(frozen=True)
class Rule:
    """One thing that can be wrong. `advice` is what to do, as the reader of the report needs it."""

    code: str
    level: str
    title: str
    advice: str


@dataclass(frozen=True)
class Example:
    """One row of a finding: its `file:line`, and what is there where that may be shown."""

    place: str
    text: str = ""


@dataclass(frozen=True)
class Finding:
    """A rule that fired: how many rows of how many, some of their places, and the figures behind it."""

    code: str
    count: int
    of: int
    detail: str = ""
    examples: tuple[Example, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    level: str | None = None  # where this case is less or more than the rule's own
    rows: Sequence[int] = ()  # indices of all rows that could be read and have it

    @property
    def rule(self) -> Rule:
        return RULES[self.code]

    def as_dict(self, level: str) -> dict[str, Any]:
        return {
            "code": self.code,
            "level": level,
            "title": self.rule.title,
            "count": self.count,
            "of": self.of,
            "detail": self.detail,
            "examples": [asdict(example) for example in self.examples],
            "figures": dict(self.figures),
            "advice": self.rule.advice,
        }


_FORM = (
    Rule("row_unreadable", "block", "rows that cannot be read", "mend the rows; docs/data.md lists each reason"),
    Rule(
        "row_unrendered", "block", "rows that the base's chat template refuses", "mend the rows, or take another base"
    ),
    Rule(
        "nothing_learned",
        "block",
        "rows without an answer to learn",
        "end each row with an assistant's turn that has content",
    ),
    Rule("forms_mixed", "warn", "rows of different forms", "check that the files belong together"),
    Rule(
        "systems_differ", "warn", "system prompts that differ", "train with the one that will be served, or without any"
    ),
    Rule(
        "turns_disordered",
        "warn",
        "turns out of their order",
        "let user and assistant alternate, after at most one system turn",
    ),
    Rule("user_turn_empty", "warn", "user turns without text", "remove the rows, or write what was asked"),
    Rule(
        "thought_unclosed",
        "warn",
        "think blocks that do not open and close once, at the beginning",
        "write <think>…</think> before the answer, or use reasoning_content",
    ),
    Rule(
        "thoughts_mixed",
        "warn",
        "some answers think and some do not",
        "train both only where serving sets enable_thinking for each request",
    ),
    Rule(
        "thought_unrendered",
        "warn",
        "answers that think on a base whose template has no thinking",
        "take a Qwen3 base, or remove the reasoning",
    ),
    Rule(
        "tool_unknown",
        "warn",
        "calls of a tool that the row does not declare",
        "declare every tool in `tools`, as serving will",
    ),
    Rule(
        "tool_arguments", "warn", "tool calls that do not match the tool's schema", "mend the arguments or the schema"
    ),
    Rule(
        "tool_answer_unasked", "warn", "tool answers without the call they answer", "keep each call before its answer"
    ),
    Rule(
        "text_mojibake",
        "warn",
        "text that was decoded with the wrong encoding",
        "read the source as UTF-8 and export it again",
    ),
    Rule("text_replaced", "warn", "characters that were lost (U+FFFD)", "export the source again, in UTF-8"),
    Rule(
        "text_control",
        "warn",
        "control, direction or invisible characters",
        "remove them: nobody sees them, the model learns them",
    ),
    Rule(
        "text_decomposed",
        "warn",
        "letters that are written in parts (not Unicode NFC)",
        "normalise to NFC: users type the whole letters",
    ),
)
_AMOUNT = (
    Rule("rows_few", "warn", "few rows", "collect more, or see first whether a prompt is enough"),
    Rule(
        "rows_many", "note", "more rows than helped others", "try a tenth first: a curve over sizes shows when it ends"
    ),
    Rule(
        "row_too_long",
        "block",
        "rows longer than the longest length",
        "raise --max-length, or choose --over-long cut or drop",
    ),
    Rule(
        "learned_share",
        "note",
        "few of the tokens are learned",
        "shorten what stands before the answers: it costs time and teaches nothing",
    ),
    Rule("languages_differ", "warn", "answers in another language than their question", "check that this is the task"),
)
_LABELS = (
    Rule(
        "labels_conflict",
        "block",
        "the same question with different labels",
        "decide on one label each, or tell the model what makes the difference",
    ),
    Rule(
        "answers_conflict",
        "warn",
        "the same question with different answers",
        "keep the best answer of each, unless variety is wanted",
    ),
    Rule("labels_near", "warn", "labels that differ in spelling only", "write each label in one way"),
    Rule(
        "labels_unbalanced",
        "warn",
        "labels of very different frequency",
        "collect more of the rare ones; judge by macro-F1",
    ),
    Rule(
        "labels_rare",
        "warn",
        "labels with too few rows to learn or to test",
        "collect at least ten rows of each, or join them with another",
    ),
    Rule(
        "labels_doubtful", "warn", "labels that are probably wrong", "look at each; the likelier label stands behind it"
    ),
    Rule(
        "labels_of_groups",
        "warn",
        "labels that go with words for a group of people",
        "collect rows of the group with other labels, unless the label is about the group",
    ),
)
_TWINS = (
    Rule("twins_exact", "warn", "rows that repeat another row", "keep one of each"),
    Rule(
        "twins_template",
        "warn",
        "rows that differ in names and numbers only",
        "count templates, not rows, when you judge the amount; split by template",
    ),
    Rule(
        "twins_near", "warn", "rows that are nearly the same", "keep the ones that add something; split them together"
    ),
    Rule("leak_exact", "block", "test rows that stand in the training data", "take them out of the training data"),
    Rule(
        "leak_template",
        "warn",
        "test rows that differ from a training row in names and numbers only",
        "split by template, or report both scores",
    ),
    Rule(
        "leak_near",
        "warn",
        "test rows that are nearly a training row",
        "split by group, or report the score of the far rows too",
    ),
    Rule(
        "validation_leak",
        "warn",
        "validation rows that are, or nearly are, in the training data",
        "early stopping will come too late: split again",
    ),
)
_PRIVACY = (
    Rule(
        "secret",
        "block",
        "keys, tokens and other secrets",
        "revoke them, then remove the rows: a model can be made to say them",
    ),
    Rule("card_number", "block", "payment card numbers", "remove or mask them"),
    Rule("bank_account", "warn", "bank accounts (IBAN)", "remove or mask them"),
    Rule("national_id", "warn", "national identity numbers", "remove or mask them"),
    Rule("email_address", "warn", "e-mail addresses", "remove or mask them, unless they are the task"),
    Rule("phone_number", "warn", "telephone numbers", "remove or mask them, unless they are the task"),
    Rule("ip_address", "warn", "public IP addresses", "remove or mask them, unless they are the task"),
    Rule(
        "person_name",
        "warn",
        "names of people",
        "mask them with `hotshoe data clean --mask person_name`, unless they are the task",
    ),
    Rule("place_name", "note", "names of places, of which some are addresses", "look at those with a number"),
    Rule(
        "names_unchecked",
        "note",
        "names and postal addresses were looked for in part of the rows, or not at all",
        "install a recogniser (docs/data.md), or look for them by other means",
    ),
)
_TOXICITY = (
    Rule("profanity", "warn", "swear words", "remove the rows, unless they are the task: what is learned is said"),
    Rule(
        "toxicity_unchecked",
        "note",
        "insults without swear words, hate and threats were not looked for",
        "no model for these in several languages is part of this tool: read a sample",
    ),
)
PAGE = "docs/data.md"  # which lists the rules
RULES: dict[str, Rule] = {rule.code: rule for rule in (*_FORM, *_AMOUNT, *_LABELS, *_TWINS, *_PRIVACY, *_TOXICITY)}
