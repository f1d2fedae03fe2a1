"""A Hugging Face tokenizer as llama.cpp knows it: tokens, types, merges, and which of its splitting rules is this one.

llama.cpp splits text by rules of its own, chosen by a name (`tokenizer.ggml.pre`). The name is decided here from what
tokenizer.json says it does, so that a tokenizer that some library saved again is the same one still. What has no
equal there is refused: the text would be cut elsewhere, and the model would see other tokens than it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import BaseInvalid, Problem

TOKENIZER = "tokenizer.json"
# llama.cpp's llama_token_type.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
ROLES = ("bos", "eos", "pad", "unk")
FURTHER_ENDS = ("eot", "eom")  # roles of tokens that end an answer beside eos
# What llama.cpp ends an answer at without being told, by its text.
KNOWN_ENDS = {"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "</s>"}

_ANY_CASE, _BOTH_CASES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS, _DIGIT, _DIGITS = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}", r"\p{N}{1,3}"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES, _WORDS_OF_BYTES, _EACH_DIGIT = "bytes", "bytes in words", "each digit"
# The steps of tokenizer.json's pre_tokenizer, and whether its BPE looks for a whole word first -> llama.cpp's name.
SPLITTING: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((f"{_ANY_CASE}|{_WORDS}|{_DIGIT}|{_REST}", _BYTES), False): "qwen2",
    ((f"{_ANY_CASE}|{_MARKS}", _BYTES), False): "qwen35",
    ((f"{_ANY_CASE}|{_WORDS}|{_DIGITS}|{_REST}", _BYTES), True): "llama-bpe",
    ((f"{_ANY_CASE}|{_WORDS}|{_DIGITS}|{_REST}", _BYTES), False): "smaug-bpe",
    ((_EACH_DIGIT, _WORDS_OF_BYTES), False): "smollm",
    ((_WORDS_OF_BYTES,), False): "gpt-2",
}


@dataclass(frozen=True)
class Vocabulary:
    """What goes into the file. `special` maps bos, eos, pad, unk, eot and eom to ids, those that there are."""

    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    special: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    notes: tuple[str, ...] = ()


@dataclass
class _Reading:
    """The files of one tokenizer, and what is found wrong with them."""

    tokenizer: Mapping[str, Any]
    settings: Mapping[str, Any]
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def problem(self, path: str, message: str, advice: str = "") -> None:
        self.problems.append(Problem("tokenizer_not_supported", f"{TOKENIZER}:{path}", message, advice))


def read_vocabulary(folder: Path, config: Mapping[str, Any], *, generation: Path | None = None) -> Vocabulary:
    """The vocabulary of a tokenizer's folder, filled up to the `vocab_size` rows of the embedding with unused tokens.

    `generation` is the folder whose generation_config.json says where answers end, the tokenizer's own unless given.
    Raises BaseInvalid with everything that llama.cpp would do otherwise.
    """
    if not (folder / TOKENIZER).is_file():
        raise BaseInvalid(
            f"{folder} has no {TOKENIZER}, which a GGUF file is made from: save the tokenizer there with transformers."
        )
    reading = _Reading(
        _json(folder / TOKENIZER),
        _json(folder / "tokenizer_config.json"),
        config,
        _json((generation or folder) / "generation_config.json"),
    )
    pre = _splitting(reading)
    _check_model(reading)
    ids, added = _ids(reading)
    for role in ROLES:
        if (text := _named(reading, role)) is not None:
            added[text] = True  # what the tokenizer itself names it takes for special; config.json's ids it never sees
    special = _special(reading, ids)
    adds_bos, adds_eos = _adds(reading, special)
    tokens, types = _tokens(reading, ids, added)
    if reading.problems:
        raise BaseInvalid(
            f"llama.cpp cannot do what the tokenizer of {folder} does, so it is not written as GGUF.",
            problems=tuple(reading.problems),
        )
    merges = tuple(_merge(pair) for pair in reading.tokenizer["model"]["merges"])
    return Vocabulary(pre, tokens, types, merges, special, adds_bos, adds_eos, tuple(reading.notes))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise BaseInvalid(f"{path} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise BaseInvalid(f"{path} is a {type(value).__name__}, not a JSON object.")
    return value


def _splitting(reading: _Reading) -> str:
    """llama.cpp's name for the steps of the pre_tokenizer."""
    described = reading.tokenizer.get("pre_tokenizer")
    steps = tuple(_step(step) for step in _flat(described))
    whole_words = bool(reading.tokenizer.get("model", {}).get("ignore_merges"))
    name = SPLITTING.get((steps, whole_words))
    if name is None:
        found = json.dumps(described, ensure_ascii=False)
        known = ", ".join(SPLITTING.values())
        reading.problem(
            "pre_tokenizer",
            f"no splitting rule of llama.cpp is known to be this one (ignore_merges {whole_words}): {found[:600]}",
            f"known are {known}; export the format hf instead",
        )
    return name or ""


def _flat(step: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(step, Mapping) and step.get("type") == "Sequence":
        for inner in step.get("pretokenizers", ()):
            yield from _flat(inner)
    elif isinstance(step, Mapping):
        yield step


def _step(step: Mapping[str, Any]) -> str:
    """One step in one word of SPLITTING; what is none of them stays as it is and matches nothing."""
    kind, pattern = step.get("type"), step.get("pattern")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return _WORDS_OF_BYTES if step.get("use_regex", True) else _BYTES
    if kind == "Digits" and step.get("individual_digits"):
        return _EACH_DIGIT
    is_plain = step.get("behavior") == "Isolated" and not step.get("invert")
    if kind == "Split" and is_plain and isinstance(pattern, Mapping) and "Regex" in pattern:
        return str(pattern["Regex"]).replace(_BOTH_CASES, _ANY_CASE)
    return json.dumps(step)


def _check_model(reading: _Reading) -> None:
    model = reading.tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        reading.problem("model.type", f"is {model.get('type')!r}; byte-level BPE is what is written")
    for key in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            reading.problem(f"model.{key}", f"is {model[key]!r}, which llama.cpp's BPE does not do")
    normalizer = reading.tokenizer.get("normalizer")
    if normalizer == {"type": "NFC"}:
        reading.notes.append("The tokenizer composes characters (NFC) and llama.cpp does not: send it composed text.")
    elif normalizer is not None:
        reading.problem("normalizer", f"is {json.dumps(normalizer)[:200]}; llama.cpp's BPE has none, nor NFC")


def _ids(reading: _Reading) -> tuple[dict[str, int], dict[str, bool]]:
    """Token -> id for all, and token -> whether it is special for the added ones."""
    ids: dict[str, int] = dict((reading.tokenizer.get("model") or {}).get("vocab") or {})
    added: dict[str, bool] = {}
    listed = list(reading.tokenizer.get("added_tokens") or ())
    named = reading.settings.get("added_tokens_decoder") or {}
    for entry in [*listed, *({**entry, "id": int(number)} for number, entry in named.items())]:
        text, number = str(entry["content"]), int(entry["id"])
        if ids.setdefault(text, number) != number:
            reading.problem("added_tokens", f"{text!r} has the ids {ids[text]} and {number}")
        wide = [key for key in ("lstrip", "rstrip", "single_word") if entry.get(key)]
        if wide and text not in added:
            reading.problem("added_tokens", f"{text!r} has {' and '.join(wide)}, which llama.cpp would not do")
        added[text] = added.get(text, False) or bool(entry.get("special"))
    return ids, added


def _special(reading: _Reading, ids: Mapping[str, int]) -> dict[str, int]:
    special = {role: number for role in ROLES if (number := _role(reading, role, ids)) is not None}
    for role, number in special.items():
        if number not in ids.values():
            reading.problem("added_tokens", f"has no token {number}, which config.json names as its {role}")
    texts = {number: text for text, number in ids.items()}
    ends = reading.generation.get("eos_token_id", reading.config.get("eos_token_id"))
    others = [
        number
        for number in (ends if isinstance(ends, list) else [ends])
        if number is not None and number != special.get("eos") and texts.get(number) not in KNOWN_ENDS
    ]
    special |= {role: int(number) for role, number in zip(FURTHER_ENDS, others, strict=False)}
    if left := others[len(FURTHER_ENDS) :]:
        reading.notes.append(f"llama.cpp takes three tokens that end an answer; these do not in it: {left}.")
    return special


def _role(reading: _Reading, role: str, ids: Mapping[str, int]) -> int | None:
    """The tokenizer's own token for a role, else the one that the model's config names."""
    if (text := _named(reading, role)) is not None:
        if text not in ids:
            reading.problem("added_tokens", f"has no {text!r}, which tokenizer_config.json names as its {role}_token")
        return ids.get(text)
    number = reading.config.get(f"{role}_token_id")
    number = number[0] if isinstance(number, list) and number else number
    return number if isinstance(number, int) else None


def _named(reading: _Reading, role: str) -> str | None:
    named = reading.settings.get(f"{role}_token")
    text = named.get("content") if isinstance(named, Mapping) else named
    return text if isinstance(text, str) else None


def _adds(reading: _Reading, special: Mapping[str, int]) -> tuple[bool, bool]:
    """Whether the tokenizer puts bos before a text and eos behind it."""
    before, after = _around(reading, special)
    adds_bos = before or bool(reading.settings.get("add_bos_token"))
    if adds_bos and "bos" not in special:
        reading.problem("post_processor", "a text begins with bos, and no token is named as bos")
    return adds_bos, after or bool(reading.settings.get("add_eos_token"))


def _around(reading: _Reading, special: Mapping[str, int]) -> tuple[bool, bool]:
    outer = reading.tokenizer.get("post_processor") or {}
    before = after = False
    for step in outer.get("processors", ()) if outer.get("type") == "Sequence" else [outer] if outer else []:
        if step.get("type") == "TemplateProcessing":
            ids = [
                step["special_tokens"][part["SpecialToken"]["id"]]["ids"] if "SpecialToken" in part else None
                for part in step["single"]
            ]
            at = ids.index(None) if None in ids else 0
            before, after = ids[:at] == [[special.get("bos")]], ids[at + 1 :] == [[special.get("eos")]]
            if (ids[:at] and not before) or (ids[at + 1 :] and not after):
                reading.problem("post_processor", f"adds {ids}; llama.cpp adds bos before a text and eos behind it")
        elif step.get("type") != "ByteLevel":
            reading.problem("post_processor", f"is {step.get('type')!r}, which llama.cpp's BPE does not do")
    return before, after


def _tokens(
    reading: _Reading, ids: Mapping[str, int], added: Mapping[str, bool]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    rows = int(reading.config["vocab_size"])
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [UNUSED] * rows
    for text, number in ids.items():
        if not 0 <= number < rows:
            reading.problem("model.vocab", f"{text!r} has the id {number}; the embedding has {rows} rows")
            continue
        if types[number] != UNUSED:
            reading.problem("model.vocab", f"{text!r} and {tokens[number]!r} are both token {number}")
        tokens[number] = text
        types[number] = NORMAL if text not in added else CONTROL if added[text] else USER_DEFINED
    return tuple(tokens), tuple(types)


def _merge(pair: str | list[str]) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)
