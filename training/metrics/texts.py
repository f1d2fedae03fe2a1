"""How near a text is to the expected one: chrF and BLEU as sacrebleu computes them, ROUGE over words of any script.

chrF (Popović 2015) is the default for free text: it needs no words and so no tokenizer. The figure of chrF and BLEU is
the corpus's, from the summed counts of n-grams; the score of a row is the sentence's. ROUGE (Lin 2004) is the mean F1
of the rows; ROUGE-1 and ROUGE-2 are rouge-score's, ROUGE-L is its figure in linear memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from training.metrics.measure import Floats, Integers, Measure
from training.metrics.tokens import Words, bleu_tokenizer, tokens


def chrf(expected: Sequence[str], answers: Sequence[str]) -> Measure:
    """chrF2, character n-grams up to 6."""
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    counts = _counts(metric, expected, answers)
    scores = np.array([metric._compute_f_score(row) for row in counts.tolist()]) / 100

    def corpus(indices: Integers) -> float:
        return float(metric._compute_f_score(counts[indices].sum(axis=0).tolist())) / 100

    return Measure("chrf", scores, corpus, _signature(metric))


def bleu(expected: Sequence[str], answers: Sequence[str]) -> Measure:
    """BLEU-4, exponentially smoothed; of a row with the orders that it is long enough for."""
    from sacrebleu.metrics import BLEU

    tokenize = bleu_tokenizer(tuple(expected))
    metric = BLEU(tokenize=tokenize, force=True)
    sentence = BLEU(tokenize=tokenize, force=True, effective_order=True)
    counts = _counts(metric, expected, answers)
    scores = np.array([sentence._compute_score_from_stats(row).score for row in counts.tolist()]) / 100

    def corpus(indices: Integers) -> float:
        return float(metric._compute_score_from_stats(counts[indices].sum(axis=0).tolist()).score) / 100

    return Measure("bleu", np.clip(scores, 0, 1), corpus, _signature(metric))


def _counts(metric: Any, expected: Sequence[str], answers: Sequence[str]) -> Any:
    """(rows, counts): the matches that the metric sums over a corpus."""
    return np.array(metric._extract_corpus_statistics(list(answers), [list(expected)]), dtype=np.int64)


def _signature(metric: Any) -> str:
    return str(metric.get_signature())


def rouge(expected: Sequence[str], answers: Sequence[str], kind: str) -> Measure:
    """`rouge1`, `rouge2` or `rougeL`: F1 of shared words, of pairs of words, of the longest common subsequence."""
    pairs = list(zip(expected, answers, strict=True))
    if kind == "rougeL":
        scores = [common_f1(tokens(right), tokens(answer)) for right, answer in pairs]
    else:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], tokenizer=Words())
        scores = [scorer.score(right, answer)[kind].fmeasure for right, answer in pairs]
    return Measure(kind, _floats(scores), signature="F1 over words of any script, no stemming")


def common_f1(one: Sequence[str], other: Sequence[str]) -> float:
    """F1 of the longest common subsequence of two texts: 2 * length / (words of one + words of the other)."""
    return 2 * longest_common(one, other) / (len(one) + len(other)) if one and other else 0.0


def longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence.

    Bit b of `row` is 0 where the table's row rises at column b, and one addition makes the next row (Hyyrö 2004): so
    texts of thousands of words, whose table has millions of cells, take milliseconds.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(one)) - 1
    row = full
    for word in other:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & full
    return len(one) - row.bit_count()


def _floats(scores: Sequence[float]) -> Floats:
    return np.asarray(scores, dtype=np.float64)
