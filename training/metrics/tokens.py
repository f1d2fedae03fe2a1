"""Words of any script, for ROUGE: rouge-score's own tokenizer keeps a-z and 0-9 only, and drops Vietnamese and Chinese.

A word is a run of letters, their marks and digits, folded (NFKC, letter case). Scripts that write no spaces between
words give one token a letter, as is usual for Chinese.
"""

from __future__ import annotations

import unicodedata
from functools import cache

import regex

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
TOKEN = regex.compile(rf"(?V1)[{UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{UNSPACED}]]+")
HAN, OTHER_UNSPACED = regex.compile(r"\p{Han}"), regex.compile(r"(?V1)[[" + UNSPACED + r"]--\p{Han}]")
LETTER = regex.compile(r"\p{L}")
MANY = 0.3  # of the letters


def tokens(text: str) -> list[str]:
    """The words of a text."""
    found: list[str] = TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())
    return found


class Words:
    """`tokens` as rouge-score takes a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return tokens(text)


@cache
def _letters(text: str) -> tuple[int, int, int]:
    return len(LETTER.findall(text)), len(HAN.findall(text)), len(OTHER_UNSPACED.findall(text))


def bleu_tokenizer(texts: tuple[str, ...]) -> str:
    """sacrebleu's tokenizer for the script of the texts: `zh`, `char` (Japanese, Thai and the like), or `13a`."""
    letters, han, others = (sum(column) for column in zip(*map(_letters, texts), strict=True)) if texts else (0, 0, 0)
    if others > MANY * letters:
        return "char"
    return "zh" if han > MANY * letters else "13a"
