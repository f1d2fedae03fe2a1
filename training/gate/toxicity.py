"""Swear words, by word lists: glin-profanity's of 24 languages, and a short one of ours for Vietnamese.

A list knows words, no meanings: insults without a swear word, hate and threats pass, and a quoted word does not. Only
the lists of languages that the data is in are used, since one language's word is another's curse.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from training.gate.findings import Finding
from training.gate.subject import Subject, texts

LISTED = {
    "ar": "arabic",
    "zh": "chinese",
    "cs": "czech",
    "da": "danish",
    "nl": "dutch",
    "en": "english",
    "eo": "esperanto",
    "fi": "finnish",
    "fr": "french",
    "de": "german",
    "hi": "hindi",
    "hu": "hungarian",
    "it": "italian",
    "ja": "japanese",
    "ko": "korean",
    "no": "norwegian",
    "fa": "persian",
    "pl": "polish",
    "pt": "portuguese",
    "ru": "russian",
    "es": "spanish",
    "sv": "swedish",
    "th": "thai",
    "tr": "turkish",
}  # glin-profanity's names of the languages
OWN = "vi"
OWN_LIST = "vulgar_vi.txt"
UNSPACED = ("zh", "ja", "th")  # written without spaces: a word is looked for anywhere in the text
SHARE_OF_A_LANGUAGE = 0.05  # of the data's texts; below, a language is as likely told wrongly
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
SIGNS = re.compile(r"[@$*!0134]")
# Letters among signs and digits that stand for letters.
DISGUISED = re.compile(r"(?<!\S)(?=\S*[^\W\d_])(?=\S*[@$*!0134])[\w@$*!]{3,20}(?!\S)")
# On the lists, and everyday words: a date, "mow grass", "go on"; kisses. Found on sentences for home assistants.
ORDINARY = frozenset(("31", "gras maaien", "jatka", "xx"))


class Profanity:
    """The word lists of some languages as one: `of` has the swear words of a text, as they stand in it."""

    def __init__(self, languages: Iterable[str]) -> None:
        self.languages = tuple(code for code in languages if code in LISTED or code == OWN)
        words = {word for word in self._listed() if word and word not in ORDINARY}
        self._single = {word for word in words if WORD.fullmatch(word)}
        self._phrases = _alternatives(words - self._single)
        self._leads = {found.group() for phrase in words - self._single if (found := WORD.search(phrase))}
        self._inside = _anywhere(self._unspaced())
        self._of_token = lru_cache(maxsize=1 << 16)(self._disguised)

    def of(self, text: str) -> list[str]:
        folded = unicodedata.normalize("NFC", text).casefold()
        words = WORD.findall(folded)
        found = [] if self._single.isdisjoint(words) else [word for word in words if word in self._single]
        if self._phrases and not self._leads.isdisjoint(words):
            found += self._phrases.findall(folded)
        if self._inside:
            found += self._inside.findall(folded)
        if SIGNS.search(folded):
            found += [token for token in DISGUISED.findall(folded) if self._of_token(token)]
        return list(dict.fromkeys(found))

    def _listed(self) -> Iterator[str]:
        from glin_profanity import Filter

        names = [LISTED[code] for code in self.languages if code in LISTED and code not in UNSPACED]
        if names:
            yield from (unicodedata.normalize("NFC", word).casefold() for word in Filter({"languages": names}).words)
        if OWN in self.languages:
            yield from own_words()

    def _unspaced(self) -> Iterator[str]:
        from glin_profanity import Filter

        names = [LISTED[code] for code in self.languages if code in UNSPACED]
        if names:
            yield from (word for word in Filter({"languages": names}).words if len(word) > 1 and not word.isascii())

    @cached_property
    def _filter(self) -> Any:
        from glin_profanity import Filter

        names = [LISTED[code] for code in self.languages if code in LISTED]
        return Filter({"languages": names or ["english"], "detect_leetspeak": True, "ignore_words": sorted(ORDINARY)})

    def _disguised(self, token: str) -> bool:
        """Letters that are written as signs or digits, which the library undoes."""
        return bool(self._filter.is_profane(token))


def own_words() -> list[str]:
    """The Vietnamese list; the file names its source."""
    lines = (Path(__file__).parent / OWN_LIST).read_text("utf-8").splitlines()
    return [unicodedata.normalize("NFC", line.strip()) for line in lines if line and not line.startswith("#")]


def profane(subject: Subject, shares: Mapping[str, float]) -> tuple[dict[str, Any], list[Finding]]:
    """Rows with swear words of the languages whose `shares` of the data are not small, and of English; what was not
    looked for is said."""
    spoken = [code for code, share in shares.items() if share >= SHARE_OF_A_LANGUAGE]
    known = Profanity(dict.fromkeys(["en", *spoken]))
    without = [code for code in spoken if code not in known.languages]
    words: Counter[str] = Counter()
    found: dict[int, str] = {}
    for index, row in enumerate(subject.rows):
        said = list(dict.fromkeys(word for text in texts(row) for word in known.of(text)))
        if said:
            words.update(said)
            found[index] = ", ".join(said)
    listed = ", ".join(f"{word} ({count:,})" for word, count in words.most_common(5))
    findings = [subject.finding("profanity", list(found), listed, list(found.values()))] if found else []
    looked = f"swear words were looked for in {', '.join(known.languages)}"
    gap = f"; no list for {', '.join(without)}" if without else ""
    findings.append(Finding("toxicity_unchecked", 0, subject.of, looked + gap))
    return {"languages": list(known.languages), "without_list": without}, findings


def _alternatives(phrases: Iterable[str]) -> re.Pattern[str] | None:
    """One expression for phrases, as whole words."""
    ordered = sorted(phrases, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, ordered))})(?!\w)") if ordered else None


def _anywhere(words: Iterable[str]) -> re.Pattern[str] | None:
    ordered = sorted(set(words), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None
