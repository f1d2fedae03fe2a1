"""Form: can the rows be read, are turns, think blocks and tool calls what serving will see, is the text whole."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from training.data.forms import TITLES
from training.data.rows import Row, is_thought
from training.gate.findings import KEPT_EXAMPLES, Example, Finding
from training.gate.subject import Subject, shown, system, texts

NOTHING_LEARNED = ("no_answer", "nothing_supervised", "empty_turn")
# Two or three letters that UTF-8 makes of one when it is read as Windows-1252.
MOJIBAKE = re.compile(r"[ÃÂÄÅÆÐ][\u0080-\u00bf\u0152-\u0178\u2013-\u2022\u20ac\u2122‚ƒ„…†‡ˆ‰Š‹Œ‘’“”]|â€|á[º»]")
LEGACY = "cp1252"


def unreadable(subject: Subject) -> Iterator[Finding]:
    """The rows that reading refused, those without anything to learn apart."""
    groups: dict[str, list[Any]] = {"nothing_learned": [], "row_unreadable": []}
    for problem in subject.bad:
        groups["nothing_learned" if problem.code in NOTHING_LEARNED else "row_unreadable"].append(problem)
    missing = subject.bad_count - len(subject.bad)
    for code, problems in groups.items():
        count = len(problems) + (missing if code == "row_unreadable" else 0)
        if count:
            kinds = Counter(problem.code for problem in problems)
            first = problems[:KEPT_EXAMPLES]
            examples = tuple(Example(problem.path, f"{problem.code}: {problem.message}") for problem in first)
            detail = ", ".join(f"{amount:,} {kind}" for kind, amount in kinds.most_common())
            yield Finding(code, count, subject.of, detail, examples, {"codes": dict(kinds)})


def forms(subject: Subject) -> Iterator[Finding]:
    counts = Counter(row.form for row in subject.rows)
    if len(counts) > 1:
        rare = min(counts, key=lambda form: counts[form])
        found = [index for index, row in enumerate(subject.rows) if row.form == rare]
        listed = ", ".join(f"{count:,} {TITLES[form]}" for form, count in counts.most_common())
        yield subject.finding("forms_mixed", found, listed)


def systems(subject: Subject) -> Iterator[Finding]:
    """More than one system prompt, or some rows without: the model learns a behaviour for each."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(subject.rows):
        groups[system(row)].append(index)
    if len(groups) > 1:
        common = max(groups, key=lambda text: len(groups[text]))
        found = sorted(index for text, group in groups.items() if text != common for index in group)
        without = f", {len(groups['']):,} rows without any" if "" in groups else ""
        detail = f"{len(groups):,} kinds; the commonest stands in {len(groups[common]):,} rows{without}"
        yield subject.finding("systems_differ", found, detail)


def order(subject: Subject) -> Iterator[Finding]:
    yield from _each(subject, "turns_disordered", _disorder)
    empty = [
        index
        for index, row in enumerate(subject.rows)
        if any(message["role"] == "user" and not message["content"].strip() for message in row.messages)
    ]
    if empty:
        yield subject.finding("user_turn_empty", empty)


def _disorder(row: Row) -> str:
    roles = [message["role"] for message in row.messages]
    if "system" in roles[1:]:
        return "a system turn that is not the first"
    for before, after in pairwise(roles):
        if before == after and after != "tool":
            return f"two {after} turns in a row"
    first = roles[1] if roles[0] == "system" and len(roles) > 1 else roles[0]
    return "" if first == "user" else f"it begins with the {first}"


def thoughts(subject: Subject, renders_thought: bool | None) -> Iterator[Finding]:
    """Think blocks; `renders_thought` says whether the base's template knows them, None where there is no base."""
    yield from _each(subject, "thought_unclosed", _broken_thought)
    kinds: dict[bool, list[int]] = {True: [], False: []}
    for index, row in enumerate(subject.rows):
        for turn in row.learned_turns():
            kinds[is_thought(row.messages[turn])].append(index)
    thinking = sorted(set(kinds[True]))
    if renders_thought is False and thinking:
        yield subject.finding("thought_unrendered", thinking)
    elif thinking and kinds[False]:
        fewer = min(kinds.values(), key=len)
        detail = f"{len(kinds[True]):,} answers think, {len(kinds[False]):,} do not"
        yield subject.finding("thoughts_mixed", sorted(set(fewer)), detail)


def _broken_thought(row: Row) -> str:
    for message in row.messages:
        if message["role"] != "assistant":
            continue
        content = message["content"]
        opened, closed = content.count("<think>"), content.count("</think>")
        if opened != closed or opened > 1:
            return f"{opened} <think>, {closed} </think>"
        if opened and not content.lstrip().startswith("<think>"):
            return "text before <think>"
        if opened and message.get("reasoning_content"):
            return "a think block beside reasoning_content"
    return ""


def calls(subject: Subject) -> Iterator[Finding]:
    """Tool calls against the tools that the row declares."""
    checked = _Schemas()
    yield from _each(subject, "tool_unknown", _unknown_tool)
    yield from _each(subject, "tool_arguments", checked.mismatch)
    yield from _each(subject, "tool_answer_unasked", _unasked)


def _called(row: Row) -> Iterator[Mapping[str, Any]]:
    for message in row.messages:
        for call in message.get("tool_calls", ()):
            yield call["function"]


def _declared(row: Row) -> dict[str, Any]:
    return {tool["function"]["name"]: tool["function"].get("parameters") for tool in row.tools or ()}


def _unknown_tool(row: Row) -> str:
    known = _declared(row)
    return next((f"it calls {call['name']}" for call in _called(row) if call["name"] not in known), "")


class _Schemas:
    """Validators by the text of their schema: rows of one data set share few."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def mismatch(self, row: Row) -> str:
        known = _declared(row)
        for call in _called(row):
            schema = known.get(call["name"])
            if schema is None:
                continue
            try:
                error = next(iter(self._validator(schema).iter_errors(call["arguments"])), None)
            except ValueError as wrong:  # of the schema: what it refers to outside of itself is not fetched
                return f"{call['name']}: its schema cannot be used: {shown(str(wrong))}"
            if error is not None:
                where = ".".join(map(str, (call["name"], *error.instance_path)))
                return f"{where}: {shown(error.message)}"
        return ""

    def _validator(self, schema: Any) -> Any:
        import jsonschema_rs

        key = repr(schema)
        if key not in self._made:
            # Its expressions match in linear time, which those of a hostile file need.
            options = jsonschema_rs.RegexOptions()
            self._made[key] = jsonschema_rs.Draft202012Validator(schema, retriever=_unfetched, pattern_options=options)
        return self._made[key]


def _unfetched(uri: str) -> Any:
    raise ValueError(f"it refers to {uri}")


def _unasked(row: Row) -> str:
    open_calls: set[str] = set()
    asked = 0
    for message in row.messages:
        if message["role"] == "assistant":
            calls = message.get("tool_calls", ())
            open_calls, asked = {call["id"] for call in calls if call.get("id")}, len(calls)
        elif message["role"] == "tool":
            answered = message.get("tool_call_id")
            if asked == 0 or (open_calls and answered and answered not in open_calls):
                return f"{answered or 'an answer'} was not called"
            asked -= 1
    return ""


def encoding(subject: Subject) -> Iterator[Finding]:
    """Letters that were lost or changed on the way into the file."""
    for code, look in (
        ("text_mojibake", _mojibake),
        ("text_replaced", lambda text: "\ufffd" if "\ufffd" in text else ""),
        ("text_control", _control),
        ("text_decomposed", _decomposed),
    ):
        yield from _each(subject, code, lambda row, look=look: _first(look, row))  # type: ignore[misc]


def _first(look: Callable[[str], str], row: Row) -> str:
    return next((found for text in texts(row) if not text.isascii() or code_points(text) if (found := look(text))), "")


def code_points(text: str) -> bool:
    """Whether plain ASCII text holds anything that is not printed."""
    return not text.replace("\n", "").replace("\t", "").replace("\r", "").isprintable()


def _mojibake(text: str) -> str:
    """A stretch that becomes fewer letters when its bytes are read as what they were: UTF-8."""
    for match in MOJIBAKE.finditer(text):
        stretch = text[match.start() : match.start() + 3]
        for length in (3, 2):
            try:
                meant = stretch[:length].encode(LEGACY).decode("utf-8")
            except (UnicodeEncodeError, UnicodeDecodeError):
                continue
            if len(meant) == 1:
                return f"{stretch[:length]} was {meant}"
    return ""


def _control(text: str) -> str:
    for letter in text:
        if letter in "\n\t\r" or letter.isprintable():
            continue
        kind = unicodedata.category(letter)
        joins = letter in "\u200c\u200d" and not text.isascii()  # which Persian, Hindi and emoji need
        if kind in ("Cc", "Cf", "Co", "Cs") and not joins and letter != "\u00ad":
            return f"U+{ord(letter):04X} {unicodedata.name(letter, 'control')}"
    return ""


def _decomposed(text: str) -> str:
    return "" if unicodedata.is_normalized("NFC", text) else "not NFC"


def _each(subject: Subject, code: str, look: Callable[[Row], str]) -> Iterator[Finding]:
    """The rows in which `look` sees something, with what it is."""
    found = [(index, what) for index, row in enumerate(subject.rows) if (what := look(row))]
    if found:
        kinds: Sequence[tuple[str, int]] = Counter(what for _, what in found).most_common(3)
        detail = "; ".join(f"{what} ({count:,})" for what, count in kinds)
        yield subject.finding(code, [index for index, _ in found], detail, [what for _, what in found])
