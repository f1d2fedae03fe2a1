"""How near each asked row is to what was trained on: its best Jaccard similarity with a training row.

Questions are compared as the data gate compares them: normalised, boilerplate taken away, names and numbers masked. A
row of a template that was trained on is `near`, and its score says little about rows of another: `far` is what a
verdict uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.data.rows import Row
from training.gate.subject import Subject
from training.gate.twins import NEAR, boilerplate_of, first_places, shingles, texts_of
from training.metrics.measure import Floats, Integers
from training.statistics import FEWEST_CLUSTERS

FAR = 0.5
BINS = ("near", "middle", "far")
CHUNK = 64  # asked rows that are compared at a time


@dataclass(frozen=True)
class Nearness:
    """Of each asked row its similarity to the nearest training row, and that row's place."""

    similarity: Floats
    places: Sequence[str]

    def bins(self) -> dict[str, Integers]:
        """The rows that are near (0.8 or more, as the data gate has it), far (below 0.5), and between."""
        near, far = self.similarity >= NEAR, self.similarity < FAR
        return {
            "near": np.flatnonzero(near),
            "middle": np.flatnonzero(~near & ~far),
            "far": np.flatnonzero(far),
        }


def nearness(asked: Sequence[Row], trained: Sequence[Row]) -> Nearness:
    """Compare every asked row with every different training row."""
    training, test = Subject.of_rows(trained), Subject.of_rows(asked)
    boilerplate = boilerplate_of(training)
    rows_of = first_places(texts_of(training, boilerplate).masked)
    texts = list(rows_of)
    best, at = nearest(texts_of(test, boilerplate).masked, texts)
    return Nearness(best, [str(trained[rows_of[texts[place]]].place) for place in at])


def verdict_bin(clusters: dict[str, int]) -> tuple[str | None, str]:
    """Which rows a verdict may use, and why: the far ones, where they lie in clusters enough to be told from."""
    far = clusters.get("far", 0)
    if far >= FEWEST_CLUSTERS:
        return "far", f"{far:,} templates are unlike any training row"
    return None, (
        f"only {far:,} templates are unlike any training row, and fewer than {FEWEST_CLUSTERS} tell nothing about new "
        "ones: add such rows to the test data"
    )


def nearest(asked: Sequence[str], trained: Sequence[str]) -> tuple[Floats, Integers]:
    """Of each asked text its best Jaccard similarity with a trained one, and which that is.

    Jaccard = shared / (own + theirs - shared), by products of sparse matrices of shingles.
    """
    from scipy.sparse import csr_matrix

    columns: dict[str, int] = {}
    theirs = _matrix(trained, columns, csr_matrix)
    own = _matrix(asked, columns, csr_matrix)
    theirs.resize(theirs.shape[0], len(columns))
    turned, their_sizes = theirs.T.tocsr(), np.diff(theirs.indptr)
    best, places = np.zeros(len(asked)), np.zeros(len(asked), dtype=np.int64)
    for start in range(0, len(asked), CHUNK):
        shared = (own[start : start + CHUNK] @ turned).tocsr()
        sizes = np.diff(own[start : start + CHUNK].indptr)
        for row in range(shared.shape[0]):
            part = slice(shared.indptr[row], shared.indptr[row + 1])
            if part.start == part.stop:
                continue
            common, others = shared.data[part], shared.indices[part]
            alike = common / (sizes[row] + their_sizes[others] - common)
            top = int(alike.argmax())
            best[start + row], places[start + row] = alike[top], others[top]
    return best, places


def _matrix(texts: Sequence[str], columns: dict[str, int], made: Any) -> Any:
    indices: list[int] = []
    ends = [0]
    for text in texts:
        indices += [columns.setdefault(piece, len(columns)) for piece in shingles(text)]
        ends.append(len(indices))
    return made((np.ones(len(indices)), indices, ends), shape=(len(texts), len(columns)))
