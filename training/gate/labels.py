"""Labels: where answers, or one field of their JSON, are few and short texts, the task is a classification."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from training.gate.findings import Finding
from training.gate.subject import Subject, normal, system
from training.scores import parse_object

WORD = re.compile(r"\w+")
LONGEST_LABEL = 64
MOST_LABELS = 500
ROWS_A_LABEL = 5  # on average, or what looks like a label is free text
FEWEST_ROWS = 20
SHORTEST_MISSPELT = 6  # letters; below, one letter makes another word
UNBALANCED = 10  # times as many rows of the commonest label as of the rarest
RARE = 5
BLOCKED_SHARE = 0.05
ROWS_FOR_DOUBT = 100
SAMPLE_FOR_DOUBT = 10_000
FOLDS = 5
FEWEST_PASSES, MOST_PASSES, UPDATES = 5, 20, 40_000  # of 10,000 rows, 5 passes find what 20 do (docs/data.md)
ROWS_FOR_FOLDS = 10


@dataclass(frozen=True)
class Labels:
    """The label of each row, and the JSON field that it is read from; "" where the whole answer is the label."""

    values: Sequence[str | None]
    field: str

    @property
    def counts(self) -> Counter[str]:
        return Counter(value for value in self.values if value is not None)


def detect(subject: Subject) -> Labels | None:
    """The labels of a classification; None where the answers are no labels."""
    answers = subject.answers
    found = _field_labels(answers)
    if found is None and _are_labels(answers):
        return Labels([answer.strip() for answer in answers], "")
    return found


def _field_labels(answers: Sequence[str]) -> Labels | None:
    """The labels in the commonest field of JSON answers that holds some."""
    parsed = [json_object(answer) for answer in answers]
    if len(answers) < FEWEST_ROWS or sum(value is not None for value in parsed) < 0.9 * len(answers):
        return None
    fields = Counter(key for value in parsed if value for key, item in value.items() if isinstance(item, str))
    for name, count in fields.most_common():
        if count < 0.9 * len(answers):
            return None
        values = [value.get(name) if value else None for value in parsed]
        if _are_labels([value for value in values if isinstance(value, str)]):
            return Labels([value if isinstance(value, str) else None for value in values], name)
    return None


def _are_labels(values: Sequence[str]) -> bool:
    distinct = set(values)
    return (
        len(values) >= FEWEST_ROWS
        and 2 <= len(distinct) <= min(MOST_LABELS, len(values) // ROWS_A_LABEL)
        and all(0 < len(value) <= LONGEST_LABEL and "\n" not in value for value in distinct)
    )


def json_object(answer: str) -> dict[str, Any] | None:
    """The object that the whole answer is; None for anything else."""
    return parse_object(answer) if answer.startswith("{") else None


def conflicts(subject: Subject, labels: Labels | None) -> Iterator[Finding]:
    """Rows whose question has other labels elsewhere; without labels, other answers, which is only a warning."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, question in enumerate(subject.questions):
        groups[normal(question), normal(system(subject.rows[index]))].append(index)
    values = labels.values if labels else [normal(answer) for answer in subject.answers]
    found = [
        index for group in groups.values() if len({values[index] for index in group} - {None}) > 1 for index in group
    ]
    if not found:
        return
    shown = [str(values[index]) for index in found]
    code = "labels_conflict" if labels else "answers_conflict"
    finding = subject.finding(code, found, f"{len(found) / subject.of:.1%} of the rows", shown)
    yield replace(finding, level="warn") if labels and len(found) <= BLOCKED_SHARE * subject.of else finding


def spelling(subject: Subject, labels: Labels) -> Iterator[Finding]:
    """Labels that are equal but for letter case, separators or one letter."""
    counts = labels.counts
    names = sorted(counts)
    pairs = [(one, other) for at, one in enumerate(names) for other in names[at + 1 :] if _near(one, other)]
    if pairs:
        rarer = {min(pair, key=lambda name: counts[name]) for pair in pairs}
        found = [index for index, value in enumerate(labels.values) if value in rarer]
        detail = "; ".join(f"{one} ({counts[one]:,}) and {other} ({counts[other]:,})" for one, other in pairs[:5])
        yield subject.finding("labels_near", found, detail, [str(labels.values[index]) for index in found])


def _near(one: str, other: str) -> bool:
    one, other = ("".join(filter(str.isalnum, normal(text))) for text in (one, other))
    if one == other:
        return True
    return min(len(one), len(other)) >= SHORTEST_MISSPELT and _one_letter_apart(one, other)


def _one_letter_apart(one: str, other: str) -> bool:
    """One letter is added, missing or another; a digit in its place is meant."""
    while one and other and one[0] == other[0]:
        one, other = one[1:], other[1:]
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    return max(len(one), len(other)) <= 1 and not any(map(str.isdigit, one + other))


def balance(subject: Subject, labels: Labels) -> Iterator[Finding]:
    counts = labels.counts
    ordered = counts.most_common()
    (most, many), (least, few) = ordered[0], ordered[-1]
    if many > UNBALANCED * few:
        yield Finding("labels_unbalanced", many, subject.of, f"{most} has {many:,} rows, {least} has {few:,}")
    rare = {label for label, count in ordered if count < RARE}
    if rare:
        found = [index for index, value in enumerate(labels.values) if value in rare]
        yield subject.finding(
            "labels_rare", found, ", ".join(sorted(rare)[:10]), [str(labels.values[i]) for i in found]
        )


def doubtful(subject: Subject, labels: Labels, seed: int = 0) -> tuple[dict[str, Any], list[Finding]]:
    """Probably wrong labels: confident learning over what linear models say of rows that they have not seen.

    Northcutt et al., arXiv 1911.00068, as cleanlab does it. Rows of labels with fewer than ten rows are left out.
    """
    counts = labels.counts
    usable = [
        index for index, value in enumerate(labels.values) if value is not None and counts[value] >= ROWS_FOR_FOLDS
    ]
    if len(usable) < ROWS_FOR_DOUBT or len({labels.values[index] for index in usable}) < 2:
        return {"rows": 0}, []
    import random

    chosen = sorted(random.Random(seed).sample(usable, min(len(usable), SAMPLE_FOR_DOUBT)))  # noqa: S311
    kept = Counter(labels.values[index] for index in chosen)
    chosen = [index for index in chosen if kept[labels.values[index]] >= FOLDS]
    names = sorted({str(labels.values[index]) for index in chosen})
    number = {name: at for at, name in enumerate(names)}
    given = [number[str(labels.values[index])] for index in chosen]
    probabilities = out_of_fold([subject.questions[index] for index in chosen], given, seed)

    import numpy
    from cleanlab.filter import find_label_issues

    ranked = find_label_issues(
        numpy.asarray(given), probabilities, filter_by="both", return_indices_ranked_by="self_confidence", n_jobs=1
    )
    found = [chosen[at] for at in ranked]
    likelier = [names[int(probabilities[at].argmax())] for at in ranked]
    texts = [f"{labels.values[index]} → {name}?" for index, name in zip(found, likelier, strict=True)]
    detail = f"told by a linear model over words and letters, from {len(chosen):,} rows"
    return {"rows": len(chosen)}, [subject.finding("labels_doubtful", found, detail, texts)] if found else []


def out_of_fold(questions: Sequence[str], given: Sequence[int], seed: int) -> Any:
    """[rows, labels] probabilities of each row's labels by a model that was fitted without the row."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import SGDClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_union

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, tokenizer=WORD.findall, token_pattern=None)
    parts = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, max_features=50_000)
    features = make_union(words, parts).fit_transform(questions)
    # Finds planted flips as exactly as a logistic regression fitted to its end does, in a twentieth of the time.
    passes = min(MOST_PASSES, max(FEWEST_PASSES, UPDATES // len(questions)))
    model = SGDClassifier(loss="log_loss", alpha=1e-4, max_iter=passes, tol=None, random_state=seed, n_jobs=2)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    return cross_val_predict(model, features, list(given), cv=folds, method="predict_proba")
