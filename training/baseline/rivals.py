"""What a simple model does with the same rows: the commonest label, and a linear model over words and letters.

They give a label and nothing else. Where the whole answer is a label that is the task; where it is one field of an
object, they are compared by that field alone, and it is said. How strongly a linear model is held back is chosen on the
validation rows, as a prompt is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from training.baseline.nearest import vectorizer
from training.baseline.sets import Part, Sets
from training.metrics import Task
from training.metrics.labels import NO_LABEL, label_in

STRENGTHS = (0.1, 1.0, 10.0)
MOST_ROWS_CHOSEN = 20_000  # above, one strength is taken
MAJORITY, LINEAR, PROBE = "majority", "tfidf_linear", "linear_probe"
TITLES = {
    MAJORITY: "the commonest label",
    LINEAR: "TF-IDF of words and letters with a linear model",
    PROBE: "a linear probe on the frozen base",
}

Told = Callable[[Part], list[str]]  # of each row its label


@dataclass(frozen=True)
class Rival:
    """One simple model, fitted; `detail` says what was chosen."""

    name: str
    label: str  # the field that it fills; "" where the label is the whole answer
    tell: Told
    detail: str = ""

    def answers(self, part: Part) -> list[str]:
        """Its answers, in the form of the rows'."""
        return [text if not self.label else json.dumps({self.label: text}) for text in self.tell(part)]


def why_none(sets: Sets, task: Task) -> str | None:
    """Why there is no simple model to compare with; None where there is."""
    if task.label is not None:
        return None
    if task.kind == "text":
        return "the answers are free text: a model of labels has none to give"
    return "no field of the answers is a label: name it with --label where one is"


def simple_rivals(sets: Sets, task: Task) -> list[Rival]:
    """Those that need no base; nothing where the task has no label."""
    if task.label is None:
        return []
    given = labels_of(sets.training, task)
    commonest = Counter(given).most_common(1)[0][0]
    rivals = [Rival(MAJORITY, task.label, lambda part: [commonest] * len(part.examples))]
    if len(set(given)) > 1:
        rivals.append(_linear(sets, task, given))
    return rivals


def labels_of(part: Part, task: Task) -> list[str]:
    return [label_in(text, task.label or "") or NO_LABEL for text in part.expected]


def share_right(said: Sequence[Any], wanted: Sequence[str]) -> float:
    return sum(bool(one == want) for one, want in zip(said, wanted, strict=True)) / len(wanted)


def choose(fit: Callable[[Any], Any], score: Callable[[Any], float], settings: Sequence[Any]) -> tuple[Any, Any]:
    """The setting whose model scores best on validation rows, and that model; of equal ones the first."""
    made = [(fit(setting), setting) for setting in settings]
    scores = [score(model) for model, _ in made]
    model, setting = made[scores.index(max(scores))]
    return setting, model


def _linear(sets: Sets, task: Task, given: Sequence[str]) -> Rival:
    from sklearn.svm import LinearSVC

    features = vectorizer()
    trained = features.fit_transform(sets.training.questions)
    wanted = labels_of(sets.validation, task)
    held_out = features.transform(sets.validation.questions)

    def fit(strength: float) -> Any:
        return LinearSVC(C=strength, random_state=0).fit(trained, given)

    def right(model: Any) -> float:
        return share_right(model.predict(held_out), wanted)

    strengths = STRENGTHS if len(given) <= MOST_ROWS_CHOSEN else STRENGTHS[1:2]
    strength, model = choose(fit, right, strengths)

    def tell(part: Part) -> list[str]:
        return [str(label) for label in model.predict(features.transform(part.questions))]

    return Rival(LINEAR, task.label or "", tell, f"C = {strength:g} of {', '.join(f'{one:g}' for one in strengths)}")
