"""Texts by their words and letters: what is most like another, and the features of a linear model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from training.gate.labels import WORD
from training.gate.twins import first_places

MOST_FEATURES = 200_000
CHUNK = 512  # questions that are compared at a time


def vectorizer() -> Any:
    """TF-IDF of words and pairs of words, and of runs of two to five letters within words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_union

    words = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, tokenizer=_words, token_pattern=None, max_features=MOST_FEATURES
    )
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, max_features=MOST_FEATURES)
    return make_union(words, letters)


def _words(text: str) -> list[str]:
    """Its words; a text of signs alone is one word."""
    found: list[str] = WORD.findall(text)
    return found or [text or " "]


class Nearest:
    """Of a question the texts most like it, by the cosine of their TF-IDF."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._firsts = list(first_places(texts).values())[::-1]
        self._vectorizer = vectorizer()
        self._texts = self._vectorizer.fit_transform([texts[at] for at in self._firsts])

    def of(self, questions: Sequence[str], count: int) -> list[list[int]]:
        """For each the places of the `count` nearest different texts, the nearest last."""
        found: list[list[int]] = []
        for start in range(0, len(questions), CHUNK):
            asked = self._vectorizer.transform(questions[start : start + CHUNK])
            likeness = (asked @ self._texts.T).toarray()
            order = np.argsort(-likeness, axis=1, kind="stable")[:, :count]
            found += [[self._firsts[at] for at in reversed(row)] for row in order.tolist()]
        return found
