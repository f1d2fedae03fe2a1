"""Makes the demo's chat rows: train, validation and test come from different templates, so no test template was seen.

`python -m examples.agent_routing.data OUT [--language en] [--seed 0]` writes three JSONL files and prints counts.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.agent_routing.prompts import chat_row
from examples.agent_routing.templates import Language, Template, function_call

SPLITS = ("train", "validation", "test")
SHARES = {"validation": 0.1, "test": 0.2}  # of a label's templates, rounded up; train has the others
ATTEMPTS_PER_ROW = 40


@dataclass(frozen=True)
class Recipe:
    """How many rows to make for one language, of which labels."""

    language: str
    least_templates: int
    rows: dict[str, int]  # per label and split
    more_labels: tuple[str, ...] = ()


ENGLISH = Recipe("en", 9, {"train": 100, "validation": 6, "test": 12})
VIETNAMESE = Recipe("vi", 6, {"train": 54, "validation": 6, "test": 6})
ENGLISH_MORE = Recipe("en", 9, {"train": 16, "validation": 4, "test": 4}, ("HassClimateGetTemperature",))


@dataclass(frozen=True)
class Row:
    """One sentence with the function call it stands for, and the template it was sampled from."""

    sentence: str
    answer: str
    intent: str
    template: str

    def as_chat(self) -> dict[str, Any]:
        return chat_row(self.sentence, self.answer)


@dataclass
class Dataset:
    """The rows of each split, with what was left out and why."""

    language: str
    splits: dict[str, list[Row]]
    ambiguous: int = 0  # sentences that another template had given another answer
    short: dict[str, int] = field(default_factory=dict)  # "split/label" -> rows its templates could not fill

    @property
    def labels(self) -> list[str]:
        return sorted({row.intent for rows in self.splits.values() for row in rows})

    def counts(self) -> dict[str, Counter[str]]:
        """Rows per label, by split."""
        return {split: Counter(row.intent for row in rows) for split, rows in self.splits.items()}

    def leaks(self) -> list[str]:
        """Templates or sentences that two splits share: none, or the split is wrong."""
        found = []
        for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
            for kind in ("template", "sentence"):
                shared = _keys(self.splits[first], kind) & _keys(self.splits[second], kind)
                found += [f"{first} and {second} share the {kind} {key}" for key in sorted(shared)]
        return found

    def write(self, folder: Path, prefix: str = "") -> dict[str, Path]:
        """The chat JSONL files of all splits in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = {split: folder / f"{prefix}{split}.jsonl" for split in SPLITS}
        for split, path in paths.items():
            lines = (json.dumps(row.as_chat(), ensure_ascii=False) for row in self.splits[split])
            path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
        return paths


def make(recipe: Recipe, seed: int = 0, row_seed: int = 0) -> Dataset:
    """The dataset of a recipe: `seed` decides which template is in which split, `row_seed` the sentences."""
    language = Language.load(recipe.language)
    labels = [*language.labels(recipe.least_templates), *recipe.more_labels]
    parts = {label: split_templates(language, language.templates[label], seed) for label in labels}
    rng = random.Random(f"rows {recipe.language} {seed} {row_seed}")
    data = Dataset(recipe.language, {split: [] for split in SPLITS})
    answers: dict[str, str] = {}
    for split in ("test", "validation", "train"):
        for label in labels:
            wanted = recipe.rows[split]
            rows = _sample(language, parts[label][split], wanted, rng, answers, data)
            data.splits[split] += rows
            if len(rows) < wanted:
                data.short[f"{split}/{label}"] = wanted - len(rows)
        rng.shuffle(data.splits[split])
    return data


def split_templates(language: Language, templates: Iterable[Template], seed: int) -> dict[str, list[Template]]:
    """Each template of one label in exactly one split, drawn by seed.

    What is held out is a wording, not a slot: a template goes to test or validation while training keeps another with
    the same slots. Where a label has too few of those, training keeps at least another with each slot.
    """
    train = sorted(templates, key=lambda template: template.text)
    random.Random(f"templates {seed} {train[0].intent}").shuffle(train)
    wanted = {split: max(1, round(len(train) * share)) for split, share in SHARES.items()}
    held: list[Template] = []
    for may_go in (_same_slots_stay, _each_slot_stays):
        for template in list(train):
            rest = [other for other in train if other is not template]
            if len(held) < sum(wanted.values()) and may_go(language, template, rest):
                held.append(template)
                train = rest
    if len(held) < sum(wanted.values()):
        raise ValueError(f"{train[0].intent} has too few templates to hold out {wanted}.")
    return {"validation": held[wanted["test"] :], "test": held[: wanted["test"]], "train": train}


def _same_slots_stay(language: Language, template: Template, rest: Iterable[Template]) -> bool:
    return language.slots(template) in map(language.slots, rest)


def _each_slot_stays(language: Language, template: Template, rest: Iterable[Template]) -> bool:
    return language.slots(template) <= frozenset().union(*map(language.slots, rest))


def _sample(
    language: Language,
    templates: list[Template],
    wanted: int,
    rng: random.Random,
    answers: dict[str, str],
    data: Dataset,
) -> list[Row]:
    rows: list[Row] = []
    for attempt in range(wanted * ATTEMPTS_PER_ROW):
        if len(rows) == wanted:
            break
        template = templates[attempt % len(templates)]
        sentence, slots = language.sample(template, rng)
        answer = function_call(template.intent, slots)
        if sentence in answers:
            data.ambiguous += answers[sentence] != answer
            continue
        answers[sentence] = answer
        rows.append(Row(sentence, answer, template.intent, f"{template.intent}: {template.text}"))
    return rows


def _keys(rows: list[Row], kind: str) -> set[str]:
    return {getattr(row, kind) for row in rows}


def table(data: Dataset) -> str:
    """Counts per label and split, and what was left out, as text."""
    counts = data.counts()
    lines = [f"{'label':<28}" + "".join(f"{split:>12}" for split in SPLITS)]
    lines += [f"{label:<28}" + "".join(f"{counts[split][label]:>12}" for split in SPLITS) for label in data.labels]
    lines.append(f"{'all':<28}" + "".join(f"{len(data.splits[split]):>12}" for split in SPLITS))
    used = {split: len(_keys(data.splits[split], "template")) for split in SPLITS}
    lines.append(f"{'templates':<28}" + "".join(f"{used[split]:>12}" for split in SPLITS))
    lines.append(f"shared between splits: {len(data.leaks())}; sentences dropped as ambiguous: {data.ambiguous}")
    if data.short:
        lines.append("too few sentences: " + ", ".join(f"{key} -{count}" for key, count in sorted(data.short.items())))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--language", choices=("en", "vi"), default="en")
    parser.add_argument("--seed", type=int, default=0, help="which templates are in which split")
    given = parser.parse_args()
    data = make(ENGLISH if given.language == "en" else VIETNAMESE, given.seed)
    for path in data.write(given.out).values():
        print(path)
    print(table(data))


if __name__ == "__main__":
    main()
