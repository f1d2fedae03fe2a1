"""The faults of faults.py on the embedded base and real sentences: one run of each, as people would meet them.

    python -m tests.training.real_faults [--faults NAMES]       the second table of docs/verdict.md

The task is to name the intent of a sentence for a home assistant; validation sentences are of templates that training
does not have. What is replayed the base itself says: asked for nothing, it writes a user's turn and answers it (Xu et
al., arXiv 2406.08464).
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from adapters.embedded import EMBEDDED, open_base
from adapters.errors import TrainingStopped
from examples.agent_routing.data import ENGLISH, make
from tests.training.conftest import chat, write_jsonl
from tests.training.faults import SYLLABLES, Fault, is_false_alarm, is_told, said
from training.config import TrainingConfig
from training.trainer import train

SEED = 17
END = "<|im_end|>"
SYSTEM = "Name the intent of the sentence."
REPLAYED_ROWS, LONGEST_TURN = 192, 48
# General text gets harder for this base with whatever it is taught: that is no false alarm where nothing is replayed.
FORGETS = ("forgot",)
of_many = partial(Fault, also=FORGETS, rows=320, validation=96)
of_few = partial(Fault, rows=32, validation=96)

FAULTS = (
    of_many("learned", "learned"),
    of_many("too few steps", "underfit", asked={"epochs": 0.5, "learning_rate": 1e-4}),
    of_few(
        "too many epochs on few rows",
        "overfit",
        also=("memorised", *FORGETS),
        answers="random",  # with the right ones, two sentences an intent are enough for this task
        asked={"epochs": 30.0, "patience": 0, "evaluations": 10},
    ),
    of_many("learning rate far too high", "diverged", asked={"learning_rate": 0.1, "max_gradient_norm": 100.0}),
    of_many("learning rate far too low", "no effect", also=(), asked={"learning_rate": 1e-7, "epochs": 1.0}),
    of_many("few validation rows", "cannot tell", validation=8),
    of_few(
        "rows learned by heart",
        None,
        ("memorised",),
        also=FORGETS,
        answers="unique",
        asked={"epochs": 30.0, "evaluations": 1},
    ),
    of_many(
        "canaries learned by heart",
        "learned",
        ("memorised",),
        asked={"canaries": 4, "epochs": 8.0, "patience": 0},
    ),
    of_many("wrong labels", "learned", ("label noise",), noise=0.15),
    of_many("what the base could do is overwritten", "learned", ("forgot",), asked={"learning_rate": 2e-3}),
)
# A base this small keeps less by it than the rule asks for, and the run is still learning: it is shown, and not held.
REPLAYED = of_many("what the base could do is replayed", "learned", also=(), asked={"replay_share": 0.4})


@cache
def sentences() -> dict[str, list[tuple[str, str]]]:
    """By side the sentences with their intents; no template is on both sides."""
    splits = make(ENGLISH).splits
    return {
        "training": [(row.sentence, row.intent) for row in splits["train"]],
        "validation": [(row.sentence, row.intent) for split in ("validation", "test") for row in splits[split]],
    }


def run(fault: Fault, folder: Path) -> dict[str, Any]:
    """The card's verdict on one run of the fault; of a run that the guard stopped, only what it came to."""
    draw = random.Random(f"{fault.name} {SEED}")
    sides = {
        side: write_jsonl(folder / f"{side}.jsonl", rows(fault, side, count, draw))
        for side, count in (("training", fault.rows), ("validation", fault.validation))
    }
    asked: dict[str, Any] = {"epochs": 3.0, "evaluations": 5, "batch_size": 16} | fault.asked
    if "replay_share" in asked:
        asked["replay"] = write_jsonl(folder / "replay.jsonl", said_by_the_base())
    config = TrainingConfig(
        data=sides["training"],
        validation=sides["validation"],
        name="n",
        out=folder / "out",
        method="lora",
        seed=SEED,
        data_check=False,
        samples=0,
        report_to=("none",),
        checkpoint_steps=10_000,
        **asked,
    )
    try:
        found: dict[str, Any] = train(config, lambda line: None).card["verdict"]
    except TrainingStopped as error:
        return {"primary": "diverged", "flags": [], "sentence": str(error)}
    return found


def rows(fault: Fault, side: str, count: int, draw: random.Random) -> list[dict[str, Any]]:
    """Rows of a side: all of one sort of sentence after another, so that few rows have every intent."""
    known = sentences()[side]
    intents = sorted({intent for _, intent in known})
    of = {intent: [one for one in known if one[1] == intent] for intent in intents}
    made = []
    for number in range(count):
        sentence, intent = draw.choice(of[intents[number % len(intents)]])
        if fault.answers == "unique":
            intent = "".join(draw.choices(SYLLABLES, k=3))
        elif fault.answers == "random":
            intent = draw.choice(intents)
        elif draw.random() < fault.noise:
            intent = draw.choice([other for other in intents if other != intent])
        made.append(chat(sentence, intent, system=SYSTEM))
    return made


@cache
def said_by_the_base() -> list[dict[str, Any]]:
    """Rows that the embedded base writes: a user's turn out of nothing, and its own answer to it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = open_base(EMBEDDED).folder
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    torch.manual_seed(SEED)

    def turns(prompts: list[str], *, is_drawn: bool) -> list[str]:
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        how = {"do_sample": True, "temperature": 1.0, "top_p": 0.95} if is_drawn else {"do_sample": False}
        ids = model.generate(**batch, max_new_tokens=LONGEST_TURN, pad_token_id=tokenizer.pad_token_id, **how)
        texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :])
        return [text.partition(END)[0].strip() for text in texts]

    made: list[dict[str, Any]] = []
    head, middle = "<|im_start|>user\n", f"{END}\n<|im_start|>assistant\n"
    while len(made) < REPLAYED_ROWS:
        questions = [question for question in turns([head] * 64, is_drawn=True) if question]
        answers = turns([f"{head}{question}{middle}" for question in questions], is_drawn=False)
        made += [
            chat(question, answer, system=None) for question, answer in zip(questions, answers, strict=True) if answer
        ]
    return made[:REPLAYED_ROWS]


def table(results: list[tuple[Fault, dict[str, Any]]]) -> Iterator[str]:
    yield "| Made to | Right | Said | |"
    yield "|---|---|---|---|"
    for fault, found in results:
        right = " + ".join([fault.primary or "any", *fault.flags])
        outcome = "told" if is_told(fault, found) else "NOT TOLD"
        if is_false_alarm(fault, found):
            outcome += ", false alarm"
        yield f"| {fault.name} | {right} | {said(found)} | {outcome} |"


def main() -> None:
    from training.quiet import quieten

    quieten()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", default="", help="names, with commas between; default all")
    asked = parser.parse_args()
    results = []
    for fault in (*FAULTS, REPLAYED):
        if asked.faults and fault.name not in asked.faults.split(","):
            continue
        with tempfile.TemporaryDirectory() as folder:
            results.append((fault, run(fault, Path(folder))))
        found = results[-1][1]
        sys.stdout.write(f"{fault.name}: {said(found)} | {found['sentence']}\n")
        sys.stdout.flush()
    sys.stdout.write("\n".join(table(results)) + "\n")


if __name__ == "__main__":
    main()
