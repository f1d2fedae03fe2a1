"""Runs that are made to go wrong in one way each, on a base of 0.2M parameters, and what the verdict says of them.

    python -m tests.training.faults --seeds 100-119        the confusion matrix of docs/verdict.md

The task: four words, of which the last decides between four answers. The base has read such words before.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapters.errors import TrainingStopped
from tests.fixtures.bases import tiny_qwen2
from tests.training.conftest import chat, write_jsonl
from training.config import TrainingConfig
from training.data.formats import read_data
from training.reference import open_reference
from training.trainer import train
from training.verdict.evidence import General, evidence_of_card
from training.verdict.judge import judge

KEYS = {"lamp": "light", "bulb": "light", "door": "entry", "gate": "entry"} | {
    "radio": "sound",
    "bell": "sound",
    "oven": "heat",
    "stove": "heat",
}
ANSWERS = sorted(set(KEYS.values()))
SYLLABLES = ("ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "wu", "za")
BASE_ROWS = 600


@dataclass(frozen=True)
class Fault:
    """One way to run: the rows, the settings, and the verdict and flags that are right for it."""

    name: str
    primary: str | None  # None: flags alone are asked for
    flags: tuple[str, ...] = ()
    also: tuple[str, ...] = ()  # flags that are true of such a run, too: neither asked for nor false
    rows: int = 160
    validation: int = 64
    noise: float = 0.0  # of the rows have another answer
    answers: str = "told"  # by the last word; "random": any of the four; "unique": a word of its own
    reads_general: bool = False  # what the base learned first stands for general text
    asked: dict[str, Any] = field(default_factory=dict)


FAULTS = (
    Fault("learned", "learned"),
    Fault("too few steps", "underfit", asked={"epochs": 1.0, "evaluations": 4}),
    Fault(
        "too many epochs on few rows",
        "overfit",
        also=("memorised",),
        rows=24,
        answers="unique",
        asked={"epochs": 30.0, "patience": 0},
    ),
    Fault("learning rate far too high", "diverged", asked={"learning_rate": 0.1, "max_gradient_norm": 100.0}),
    Fault("learning rate far too low", "no effect", asked={"learning_rate": 1e-7}),
    Fault("few validation rows", "cannot tell", validation=8),
    Fault(
        "rows learned by heart",
        None,
        ("memorised",),
        rows=32,
        answers="unique",
        asked={"epochs": 40.0, "evaluations": 1},
    ),
    Fault("canaries learned by heart", "learned", ("memorised",), asked={"canaries": 2, "epochs": 20.0}),
    Fault("wrong labels", "learned", ("label noise",), noise=0.15),
    Fault("what the base could do is overwritten", "learned", ("forgot",), reads_general=True),
    Fault(
        "what the base could do is replayed", "learned", reads_general=True, asked={"replay_share": 0.75, "epochs": 8.0}
    ),
)


def base_of(folder: Path) -> Path:
    """A tiny base that has learned to spell the words: full fine-tuning on rows that repeat the last word."""
    rows = general_rows(BASE_ROWS, 7)
    raw = tiny_qwen2(folder / "raw", initializer_range=0.05)
    config = TrainingConfig(
        data=write_jsonl(folder / "words.jsonl", rows),
        name="words",
        base=str(raw),
        out=folder / "base",
        method="full",
        epochs=10.0,
        batch_size=16,
        learning_rate=3e-3,
        dtype="float32",
        validation_share=0.0,
        **CHEAP,
    )
    return train(config, lambda line: None).folder


def general_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """What the base can do: it says the last of four words again."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [*(_word(draw) for _ in range(3)), draw.choice([*ANSWERS, _word(draw), _word(draw)])]
        rows.append(chat(" ".join(words), words[-1], system=None))
    return rows


CHEAP: dict[str, Any] = {"data_check": False, "samples": 0, "report_to": ("none",), "checkpoint_steps": 10_000}


def run(fault: Fault, seed: int, base: Path, folder: Path) -> dict[str, Any]:
    """The card's verdict on one run of the fault; of a run that the guard stopped, only what it came to."""
    draw = random.Random(f"{fault.name} {seed}")
    sides = {}
    for side, count in (("training", fault.rows), ("validation", fault.validation)):
        rows = [_row(fault, draw) for _ in range(count)]
        sides[side] = write_jsonl(folder / f"{side}.jsonl", rows)
    asked: dict[str, Any] = {
        "epochs": 5.0,
        "learning_rate": 1e-2,
        "rank": 8,
        "batch_size": 16,
        "evaluations": 5,
        "samples": 0,
    }
    if "replay_share" in fault.asked:
        asked["replay"] = write_jsonl(folder / "replay.jsonl", general_rows(400, seed))
    config = TrainingConfig(
        data=sides["training"],
        validation=sides["validation"],
        name="n",
        base=str(base),
        out=folder / "out",
        dtype="float32",
        seed=seed,
        **{**asked, **fault.asked, **CHEAP},
    )
    try:
        card = train(config, lambda line: None).card
        found: dict[str, Any] = judged(card, base, folder) if fault.reads_general else card["verdict"]
    except TrainingStopped as error:
        return {"primary": "diverged", "flags": [], "sentence": str(error)}
    finally:
        shutil.rmtree(folder / "out", ignore_errors=True)
    return found


def judged(card: dict[str, Any], base: Path, folder: Path) -> dict[str, Any]:
    """The verdict with general text in its evidence: rows like those that the base learned first."""
    reference = open_reference(folder / "out", base)
    file = read_data(write_jsonl(folder / "general.jsonl", general_rows(40, 8)))
    sequences = reference.sequences(file.rows)
    tuned = [reference.loss([sequence]) for sequence in sequences]
    with reference.without_adapter():
        alone = [reference.loss([sequence]) for sequence in sequences]
    return judge(replace(evidence_of_card(card), general=General(alone, tuned))).as_dict()


def runs(faults: tuple[Fault, ...], seeds: range, base: Path) -> Iterator[tuple[Fault, int, dict[str, Any]]]:
    """Each seed with each fault."""
    for seed in seeds:
        for fault in faults:
            with tempfile.TemporaryDirectory() as folder:
                yield fault, seed, run(fault, seed, base, Path(folder))


def is_told(fault: Fault, found: dict[str, Any]) -> bool:
    """Whether the verdict has what was made to go wrong."""
    return fault.primary in (None, found["primary"]) and set(fault.flags) <= set(found["flags"])


def is_false_alarm(fault: Fault, found: dict[str, Any]) -> bool:
    """Whether the verdict has a flag that is not true, or calls a run bad that learned."""
    cried = fault.primary == "learned" and found["primary"] != "learned"
    return cried or bool(set(found["flags"]) - {*fault.flags, *fault.also})


def said(found: dict[str, Any]) -> str:
    """A verdict in a few words."""
    return " + ".join([found["primary"], *found["flags"]])


def table(results: list[tuple[Fault, dict[str, Any]]]) -> Iterator[str]:
    """The confusion matrix as Markdown: of each fault how often it was told, falsely called more, and what was said."""
    yield "| Made to | Right | Told | False alarms | Said |"
    yield "|---|---|---|---|---|"
    for fault in FAULTS:
        mine = [found for one, found in results if one.name == fault.name]
        if mine:
            verdicts = Counter(map(said, mine))
            right = " + ".join([fault.primary or "any", *fault.flags])
            told, false = (sum(kind(fault, found) for found in mine) for kind in (is_told, is_false_alarm))
            counts = ", ".join(f"{words} {count}" for words, count in verdicts.most_common())
            yield f"| {fault.name} | {right} | {told} of {len(mine)} | {false} | {counts} |"


def _row(fault: Fault, draw: random.Random) -> dict[str, Any]:
    key = draw.choice(sorted(KEYS))
    answer = KEYS[key]
    if fault.answers == "unique":
        answer = _word(draw)
    elif fault.answers == "random":
        answer = draw.choice(ANSWERS)
    elif draw.random() < fault.noise:
        answer = draw.choice([other for other in ANSWERS if other != answer])
    return chat(" ".join([*(_word(draw) for _ in range(3)), key]), answer, system=None)


def _word(draw: random.Random) -> str:
    return "".join(draw.choices(SYLLABLES, k=draw.choice((2, 3))))


def main() -> None:
    from training.quiet import quieten

    quieten()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="100-119")
    parser.add_argument("--faults", default="", help="names, with commas between; default all")
    parser.add_argument("--base", type=Path, help="a base made before")
    parser.add_argument("--out", type=Path, help="a file for one line of JSON a run")
    asked = parser.parse_args()
    first, last = map(int, asked.seeds.split("-"))
    chosen = tuple(fault for fault in FAULTS if not asked.faults or fault.name in asked.faults.split(","))
    with tempfile.TemporaryDirectory() as folder:
        base = asked.base or base_of(Path(folder))
        results: list[tuple[Fault, dict[str, Any]]] = []
        for fault, seed, found in runs(chosen, range(first, last + 1), base):
            results.append((fault, found))
            sys.stdout.write(f"{fault.name} {seed}: {said(found)} | {found['sentence']}\n")
            sys.stdout.flush()
            if asked.out:
                with asked.out.open("a") as file:
                    file.write(json.dumps({"fault": fault.name, "seed": seed, "verdict": found}) + "\n")
    sys.stdout.write("\n".join(table(results)) + "\n")


if __name__ == "__main__":
    main()
