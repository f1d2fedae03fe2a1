"""Rows that are the same or nearly: within the training data, and of a test or validation file in it.

Three steps, each on what the one before left: equal after normalisation; equal when names and numbers are masked, so
that the rows of one template collapse before anything is compared; near, by the Jaccard similarity of shingles, of
pairs that MinHash proposes (Broder 1997). Boilerplate that most questions begin or end with is taken away first, or all
rows of a fixed prompt were near. A long test row is near, too, when half of its 13-grams stand in the training data.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from training.gate.findings import Finding
from training.gate.labels import json_object
from training.gate.subject import Subject, normal

NEAR = 0.8
PERMUTATIONS, BANDS = 96, 16  # bands of six values: a pair of Jaccard 0.8 is proposed with probability 0.992
DOUBT = 0.16  # four standard deviations of a similarity of 0.8 as 96 values estimate it
CHUNK = 512  # texts whose shingles are held at a time: some 20 kB for a text of 300 letters
COMPARED = 8  # in each bucket, so many are compared: a bucket of thousands would take their square
LONG_WORDS = 50
GRAM, CONTAINED = 13, 0.5
COMMON = 0.5  # of the questions: what that many begin or end with is boilerplate
SAMPLE = 2_000
URL_OR_ADDRESS = re.compile(r"\bhttps?://\S+|\b\S+@\S+\.\w+")
NUMBER = re.compile(r"\d+(?:[.,:/-]\d+)*")
SHORTEST_VALUE = 2


@dataclass(frozen=True)
class Texts:
    """Of each row its question as it is compared: normalised, less boilerplate, and with names and numbers masked."""

    plain: Sequence[str]
    masked: Sequence[str]
    boilerplate: tuple[str, str]


def texts_of(subject: Subject, boilerplate: tuple[str, str] | None = None) -> Texts:
    """The questions less the boilerplate, which is the subject's own where none is given."""
    boilerplate = boilerplate if boilerplate is not None else boilerplate_of(subject)
    plain = [trimmed(normal(question), boilerplate) for question in subject.questions]
    masked = [mask(text, answer) for text, answer in zip(plain, subject.answers, strict=True)]
    return Texts(plain, masked, boilerplate)


def boilerplate_of(subject: Subject) -> tuple[str, str]:
    """The words that most questions begin with, and those that most end with."""
    step = max(1, len(subject.questions) // SAMPLE)
    words = [normal(question).split(" ") for question in subject.questions[::step]]
    head = _common([tuple(text) for text in words])
    tail = _common([tuple(reversed(text)) for text in words])
    return " ".join(head), " ".join(reversed(tail))


def _common(texts: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The longest beginning that more than half of the different texts share."""
    texts = list(set(texts))
    found: tuple[str, ...] = ()
    while len(texts) > 1:
        size = len(found) + 1
        (longer, count), *_ = Counter(text[:size] for text in texts if len(text) > size).most_common(1) or [((), 0)]
        if count <= COMMON * len(texts):
            break
        found = longer
    return found


def trimmed(text: str, boilerplate: tuple[str, str]) -> str:
    head, tail = boilerplate
    if head and text.startswith(head + " "):
        text = text[len(head) + 1 :]
    if tail and text.endswith(" " + tail):
        text = text[: -len(tail) - 1]
    return text


def mask(text: str, answer: str) -> str:
    """The text with every value of a JSON answer that it names, every number, URL and address replaced by its kind."""
    for value in sorted(_values(json_object(answer)), key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", "<value>", text)
    return NUMBER.sub("<number>", URL_OR_ADDRESS.sub("<address>", text))


def _values(value: Any) -> Iterator[str]:
    """The texts in a JSON value, in their order; a stack of our own, since JSON nests deeper than Python calls."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += reversed(value.values())
        elif isinstance(value, list):
            waiting += reversed(value)
        elif isinstance(value, str) and len(value) >= SHORTEST_VALUE:
            yield normal(value)


def within(subject: Subject, texts: Texts, figures: dict[str, Any]) -> Iterator[Finding]:
    """Rows that repeat an earlier one: equal, of one template, or near. Each row is counted in the first that fits.

    `figures` gets how many different questions, templates and clusters of near templates there are, and what is near.
    """
    indices = list(range(len(texts.plain)))
    whole = list(zip(texts.plain, map(normal, subject.answers), strict=True))
    yield from _repeats(subject, "twins_exact", indices, _firsts(whole))
    firsts = _firsts(texts.plain)  # one question with two answers is a conflict and no twin
    different = [index for index in indices if firsts[index] == index]
    places = _firsts([texts.masked[index] for index in different])
    yield from _repeats(subject, "twins_template", different, [different[place] for place in places])
    templates = [index for index, place in zip(different, places, strict=True) if different[place] == index]
    near = _near_clusters([texts.masked[index] for index in templates])
    yield from _repeats(subject, "twins_near", templates, [templates[place] for place in near])
    figures |= {"questions": len(different), "templates": len(templates), "clusters": len(set(near))}
    figures |= {"near_jaccard": NEAR, "contained_share": CONTAINED, "contained_words": GRAM}


def clusters(texts: Texts) -> list[int]:
    """Of each row the first row of its cluster: equal, of one template, or near, through others of it if need be."""
    joined = _Joined(len(texts.plain))
    for keys in (texts.plain, texts.masked):
        for index, first in enumerate(_firsts(keys)):
            joined.join(first, index)
    templates = sorted(set(_firsts(texts.masked)))
    for place, like in enumerate(_near_clusters([texts.masked[index] for index in templates])):
        joined.join(templates[like], templates[place])
    return [joined.first(index) for index in range(len(texts.plain))]


def _firsts(keys: Sequence[Hashable]) -> list[int]:
    """Of each key the index of its first occurrence."""
    seen: dict[Hashable, int] = {}
    return [seen.setdefault(key, index) for index, key in enumerate(keys)]


def _repeats(subject: Subject, code: str, rows: Sequence[int], firsts: Sequence[int]) -> Iterator[Finding]:
    """The rows that are like an earlier one, `firsts` being that one for each."""
    found = [(row, first) for row, first in zip(rows, firsts, strict=True) if row != first]
    if not found:
        return
    groups = Counter(first for _, first in found)
    largest, repeats = groups.most_common(1)[0]
    detail = f"{len(groups):,} groups; the largest has {repeats + 1:,} rows, like {subject.rows[largest].place}"
    like = [f"like {subject.rows[first].place}" for _, first in found]
    yield subject.finding(code, [row for row, _ in found], detail, like)


def across(subject: Subject, other: Subject, name: str, texts: Texts | None = None) -> Iterator[Finding]:
    """Rows of `other` (the test or validation data) that stand in the subject's: equal, of one template, or near."""
    kinds = leaks(subject, other, texts)
    if name == "test":
        for kind, found in kinds.items():
            if found:
                yield other.finding(f"leak_{kind}", list(found), "", [_like(subject, at) for at in found.values()])
        return
    together = {index: like for found in kinds.values() for index, like in found.items()}
    if together:
        detail = ", ".join(f"{len(found):,} {kind}" for kind, found in kinds.items() if found)
        yield other.finding("validation_leak", list(together), detail, [_like(subject, at) for at in together.values()])


def leaks(subject: Subject, other: Subject, texts: Texts | None = None) -> dict[str, dict[int, int]]:
    """By kind (exact, template, near) the rows of `other` that stand in the subject's, each once, with the row there.

    The row is -1 where a long text's pieces stand in several. `texts` are the subject's, where they are made already.
    """
    texts = texts or texts_of(subject)
    theirs = texts_of(other, texts.boilerplate)
    plain, masked = first_places(texts.plain), first_places(texts.masked)
    exact = {index: plain[text] for index, text in enumerate(theirs.plain) if text in plain}
    template = {i: masked[text] for i, text in enumerate(theirs.masked) if i not in exact and text in masked}
    rest = [index for index in range(len(other.rows)) if index not in exact and index not in template]
    near = _near_to([texts.masked[index] for index in masked.values()], [theirs.masked[index] for index in rest])
    places = list(masked.values())
    close = {rest[at]: places[like] for at, like in near.items()}
    for index in _contained(texts.plain, [(index, theirs.plain[index]) for index in rest if index not in close]):
        close[index] = -1
    return {"exact": exact, "template": template, "near": close}


def _like(subject: Subject, index: int) -> str:
    return f"like {subject.rows[index].place}" if index >= 0 else "in pieces"


def first_places(texts: Sequence[str]) -> dict[str, int]:
    """Of each different text the index of its first occurrence."""
    return {text: index for index, text in reversed(list(enumerate(texts)))}


def shingles(text: str) -> frozenset[str]:
    """Runs of five letters of a short text, of five words of a long one."""
    words = text.split(" ")
    if len(words) >= LONG_WORDS:
        return frozenset(" ".join(words[at : at + 5]) for at in range(len(words) - 4))
    return frozenset(text[at : at + 5] for at in range(max(1, len(text) - 4)))


_kept_shingles = lru_cache(maxsize=CHUNK)(shingles)


def jaccard(one: str, other: str) -> float:
    """Shared shingles of all shingles of two texts."""
    first, second = _kept_shingles(one), _kept_shingles(other)
    return len(first & second) / len(first | second)


def digests(texts: Sequence[str]) -> Any:
    """[texts, PERMUTATIONS] MinHash of each text's shingles."""
    import numpy
    from rensa import RMinHash

    made = numpy.empty((len(texts), PERMUTATIONS), numpy.uint32)
    for start in range(0, len(texts), CHUNK):
        sets = [list(shingles(text)) for text in texts[start : start + CHUNK]]
        matrix = RMinHash.digest_matrix_from_token_sets(sets, num_perm=PERMUTATIONS, seed=1)
        made[start : start + CHUNK] = matrix.to_rows()
    return made


def _band_keys(made: Any) -> Iterator[Any]:
    """Of each band one number a text; equal bands have equal numbers."""
    import numpy

    size = PERMUTATIONS // BANDS
    weights = numpy.random.default_rng(1).integers(1, 1 << 63, size, numpy.uint64) | numpy.uint64(1)
    for start in range(0, PERMUTATIONS, size):
        yield (made[:, start : start + size].astype(numpy.uint64) * weights).sum(axis=1, dtype=numpy.uint64)


def _groups(keys: Any) -> Iterator[list[int]]:
    """Indices of equal keys, where there are several, each group in order."""
    import numpy

    _, inverse, counts = numpy.unique(keys, return_inverse=True, return_counts=True)
    shared = numpy.flatnonzero(counts[inverse] > 1)
    order = shared[numpy.argsort(inverse[shared], kind="stable")]
    for group in numpy.split(order, numpy.flatnonzero(numpy.diff(inverse[order])) + 1):
        yield group.tolist()


def _is_near(one: str, other: str, share: float) -> bool:
    """Whether two texts are near; `share` of their MinHash is equal, which spares most comparisons."""
    return share >= NEAR - DOUBT and jaccard(one, other) >= NEAR


class _Joined:
    """Numbers that are joined in groups, each group named by its smallest."""

    def __init__(self, count: int) -> None:
        self._root = list(range(count))

    def first(self, index: int) -> int:
        root = self._root
        while root[index] != index:
            root[index] = root[root[index]]
            index = root[index]
        return index

    def join(self, one: int, other: int) -> None:
        smaller, larger = sorted((self.first(one), self.first(other)))
        self._root[larger] = smaller


def _near_clusters(texts: Sequence[str]) -> list[int]:
    """Of each text the first that it is near to, through others of its group if need be; itself where it is alone.

    Of each bucket the first few texts are compared with the others.
    """
    made = digests(texts)
    proposed: dict[int, set[int]] = defaultdict(set)
    for keys in _band_keys(made):
        for group in _groups(keys):
            for place, index in enumerate(group):
                proposed[index].update(group[: min(place, COMPARED)])
    joined = _Joined(len(texts))
    for index in sorted(proposed):
        for like in sorted(proposed[index]):
            if _is_near(texts[like], texts[index], (made[like] == made[index]).mean()):
                joined.join(like, index)
    return [joined.first(index) for index in range(len(texts))]


def _near_to(texts: Sequence[str], others: Sequence[str]) -> dict[int, int]:
    """Of each of the others that is near to a text: which one, the first of those compared."""
    if not others or not texts:
        return {}
    import numpy

    made, theirs = digests(texts), digests(others)
    proposed: dict[int, set[int]] = defaultdict(set)
    for keys, wanted in zip(_band_keys(made), _band_keys(theirs), strict=True):
        buckets: dict[int, list[int]] = defaultdict(list)
        for index in numpy.flatnonzero(numpy.isin(keys, wanted)).tolist():
            bucket = buckets[int(keys[index])]
            if len(bucket) < COMPARED:
                bucket.append(index)
        for at, key in enumerate(wanted.tolist()):
            proposed[at].update(buckets.get(key, ()))
    found = {}
    for at, candidates in proposed.items():
        near = (i for i in sorted(candidates) if _is_near(texts[i], others[at], (made[i] == theirs[at]).mean()))
        if (like := next(near, None)) is not None:
            found[at] = like
    return found


def _contained(texts: Sequence[str], others: Sequence[tuple[int, str]]) -> Iterator[int]:
    """Those of the long others of whose 13-grams half or more stand in a text."""
    long = [(index, grams) for index, text in others if (grams := _grams(text))]
    wanted = {gram for _, grams in long for gram in grams}
    if not wanted:
        return
    there = {gram for text in texts for gram in _grams(text) if gram in wanted}
    for index, grams in long:
        if sum(gram in there for gram in grams) >= CONTAINED * len(grams):
            yield index


def _grams(text: str) -> list[int]:
    words = text.split(" ")
    return [hash(tuple(words[at : at + GRAM])) for at in range(len(words) - GRAM + 1)]
