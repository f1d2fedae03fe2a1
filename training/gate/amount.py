"""Amount and shape: how many rows, how long they are, how much of them is learned, and in which languages they are."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from statistics import fmean
from typing import Any, Self, TypeVar

from training.data.dataset import lengths_of
from training.data.jsontext import RowInvalid
from training.data.rows import Row
from training.data.template import ChatTemplate
from training.gate.findings import Finding
from training.gate.subject import Subject

T = TypeVar("T")

# Up to so many parameters: fewest and most rows, and who says so.
AMOUNTS = (
    (3e9, 2_000, 50_000, "2,000 to 50,000 rows for bases of about 1.8 billion parameters"),
    (20e9, 1_000, 50_000, "between the figures for small and for large bases; judgement"),
    (float("inf"), 1_000, 50_000, "1,000 chosen rows on 65 billion parameters: arXiv 2305.11206"),
)
HUNDREDS = 1_000
CUTS = (256, 512, 1024, 2048, 4096, 8192)
LEAST_LEARNED_SHARE = 0.02
SAMPLE_FOR_LANGUAGES = 5_000
LETTERS_OF_A_LANGUAGE = 20  # shorter texts are told wrongly too often
LETTERS_OF_TWO = 40
SURE = 0.9


@dataclass(frozen=True)
class Lengths:
    """Of each row that renders the tokens of its longest sequence and those learned; and the rows that do not."""

    tokens: Sequence[int]
    learned: Sequence[int]
    indices: Sequence[int]
    failed: Sequence[tuple[int, str]]

    @classmethod
    def of_rendered(cls, lengths: Sequence[tuple[int, int]]) -> Self:
        """Of rows that all render."""
        return cls([tokens for tokens, _ in lengths], [learned for _, learned in lengths], range(len(lengths)), [])

    @classmethod
    def joined(cls, parts: Sequence[Lengths]) -> Self:
        """Of ranges of rows, in their order."""
        tokens, learned = _chained(part.tokens for part in parts), _chained(part.learned for part in parts)
        return cls(tokens, learned, _chained(part.indices for part in parts), _chained(part.failed for part in parts))


NO_LENGTHS = Lengths((), (), (), ())


def _chained(parts: Iterable[Sequence[T]]) -> list[T]:
    return list(chain.from_iterable(parts))


def measure(rows: Sequence[Row], template: ChatTemplate, supervise: str, first: int = 0) -> Lengths:
    """Render rows as training does, `first` being the number of the first of them."""
    tokens, learned, indices, failed = [], [], [], []
    for index, sequences in enumerate(template.render_all(rows, supervise), start=first):
        if isinstance(sequences, RowInvalid):
            failed.append((index, f"{sequences.code}: {sequences.message}"))
            continue
        indices.append(index)
        longest, supervised = lengths_of(sequences)
        tokens.append(longest)
        learned.append(supervised)
    return Lengths(tokens, learned, indices, failed)


def unrendered(subject: Subject, lengths: Lengths) -> Iterator[Finding]:
    if lengths.failed:
        found, reasons = zip(*lengths.failed, strict=True)
        yield subject.finding("row_unrendered", found, texts=reasons)


def too_long(subject: Subject, lengths: Lengths, longest: int, over_long: str) -> Iterator[Finding]:
    """Rows above `longest` tokens; only a warning where it is chosen what becomes of them."""
    found = [index for index, tokens in zip(lengths.indices, lengths.tokens, strict=True) if tokens > longest]
    if found:
        chosen = {"cut": "they will be cut", "drop": "they will be left out"}.get(over_long)
        detail = f"above {longest:,} tokens" + (f"; {chosen}" if chosen else "")
        finding = subject.finding("row_too_long", found, detail)
        yield replace(finding, level="warn") if chosen else finding


def rows(subject: Subject, parameters: int | None) -> Iterator[Finding]:
    """The number of rows against what others found enough for a base of the size."""
    count = len(subject.rows)
    _, fewest, most, source = next(entry for entry in AMOUNTS if (parameters or 0) <= entry[0])
    if count < fewest:
        level = None if count < HUNDREDS else "note"
        yield Finding("rows_few", count, count, f"{count:,} rows; evidence: {source}", level=level)
    if count > most:
        yield Finding("rows_many", count, count, f"{count:,} rows; evidence: {source}")


def share(lengths: Lengths) -> Iterator[Finding]:
    tokens, learned = sum(lengths.tokens), sum(lengths.learned)
    if tokens and learned / tokens < LEAST_LEARNED_SHARE:
        detail = f"{learned:,} of {tokens:,} tokens, {learned / tokens:.1%}"
        yield Finding("learned_share", len(lengths.tokens), len(lengths.tokens), detail)


def figures(lengths: Lengths) -> dict[str, Any]:
    """Lengths in tokens: percentiles, a histogram by powers of two, and what a longest length would cut."""
    if not lengths.tokens:
        return {}
    ordered = sorted(lengths.tokens)
    bins = Counter(1 << max(4, (tokens - 1).bit_length()) for tokens in ordered)
    return {
        "tokens": {name: percentile(ordered, share) for name, share in (("p50", 50), ("p95", 95), ("p99", 99))}
        | {"max": ordered[-1], "mean": round(fmean(ordered), 1), "sum": sum(ordered)},
        "histogram": {f"<={upper}": bins[upper] for upper in sorted(bins)},
        "learned_tokens": sum(lengths.learned),
        "learned_share": round(sum(lengths.learned) / sum(ordered), 4),
        "rows_above": {str(cut): sum(tokens > cut for tokens in ordered) for cut in CUTS if cut < ordered[-1]},
    }


def percentile(ordered: Sequence[int], share: int) -> int:
    """The smallest value that so many percent do not exceed."""
    return ordered[max(0, -(-len(ordered) * share // 100) - 1)]


def languages(subject: Subject, seed: int = 0) -> tuple[dict[str, Any], list[Finding]]:
    """Shares of the languages that texts are in, of a sample; and rows whose answer is in another than its question."""
    told = _identifier()
    count = len(subject.rows)
    sample = sorted(random.Random(seed).sample(range(count), min(count, SAMPLE_FOR_LANGUAGES)))  # noqa: S311
    found: Counter[str] = Counter()
    differing, pairs = [], []
    for index in sample:
        asked, answered = subject.questions[index], subject.answers[index]
        kinds = [told.classify(text) if letters(text) >= LETTERS_OF_A_LANGUAGE else None for text in (asked, answered)]
        found.update(language for language, _ in filter(None, kinds))
        if all(kinds) and min(letters(asked), letters(answered)) >= LETTERS_OF_TWO:
            (one, sure_of_one), (other, sure_of_other) = kinds  # type: ignore[misc]
            if one != other and min(sure_of_one, sure_of_other) >= SURE:
                differing.append(index)
                pairs.append(f"{one} → {other}")
    all_found = sum(found.values())
    shares = {
        language: round(amount / all_found, 3) for language, amount in found.most_common() if amount >= 0.01 * all_found
    }
    findings = [subject.finding("languages_differ", differing, texts=pairs)] if differing else []
    return {"shares": shares, "texts": all_found, "sampled_rows": len(sample)}, findings


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def letters(text: str) -> int:
    """How many letters of prose a text has: none in JSON or code, whose words are no language."""
    return 0 if text[:1] in "{[<" else sum(map(str.isalpha, text[:400]))
