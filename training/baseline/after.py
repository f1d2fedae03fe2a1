"""After training: the adapter against the best prompt and the simple models, on test rows that are counted as read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapters.errors import ConfigInvalid
from training.baseline import forms, words
from training.baseline.asking import Asker, Local, Served
from training.baseline.before import LABEL_METRIC, Report, Say, about, rivals_of
from training.baseline.ground import Ground
from training.baseline.ledger import Ledger, Reading, now
from training.baseline.models import (
    base_of,
    identity,
    opened_adapter,
    served_adapter,
    served_base,
    trained_on,
)
from training.baseline.prompts import Recipe, Written
from training.baseline.rivals import Rival
from training.baseline.served import timed
from training.baseline.sets import Part
from training.baseline.verdict import Paired, enough, judge, mean_of
from training.data.columns import Columns
from training.data.formats import read_data
from training.evaluate import Prompt
from training.evaluation.figures import difference, figure
from training.metrics import Items
from training.quiet import Progress, unwatched

ORDINALS = {1: "first", 2: "second", 3: "third"}


class Trial:
    """One adapter on the test rows. Two models are never in memory together: the base answers first, and goes."""

    def __init__(self, ground: Ground, report: Report, say: Say, progress: Progress) -> None:
        if ground.sets.test is None or (ground.asked.adapter is None and ground.asked.served is None):
            raise ConfigInvalid("A verdict needs test rows and an adapter: give --test and --adapter.", param="test")
        self.ground, self.test = ground, ground.sets.test
        self.say, self.progress = say, progress
        self.recipe = Recipe.from_dict(report["best"]["recipe"])
        self.seed = int(report["settings"]["seed"])
        self.served = served_base(ground)
        self.adapter: Asker | None = served_adapter(ground)
        self.identity = identity(ground)

    @property
    def name(self) -> str:
        folder = self.ground.asked.adapter
        return self.ground.asked.served or (folder.name if folder is not None else "")

    @property
    def plain(self) -> list[Prompt]:
        """What the adapter is asked: the rows as they are."""
        return [example.prompt for example in self.test.examples]

    def judged(self, reading: Reading) -> tuple[dict[str, Any], float, list[str]]:
        """The verdict's part of the report, its p for the ledger, and the adapter's answers."""
        ground, margin = self.ground, self.ground.asked.margin
        prompt_form, written, prompted, told = self._base_answers()
        self.say(f"{len(self.test.examples):,} test rows, the adapter")
        self.adapter = self.adapter or opened_adapter(ground)
        replies = self.adapter.answers(self.plain, ground.max_tokens(), self.progress)
        theirs, ours = ground.scored(self.test, prompted), ground.scored(self.test, replies.texts)
        grouping = ground.grouping(self.test, ours)
        paired = Paired(ours.primary, theirs.primary, grouping.clusters, grouping.strata)
        found = judge(paired, margin, [look.p for look in reading.others])
        rivals = [self._against(rival, texts, replies.texts) for rival, texts in told]
        made = {
            "verdict": found.verdict,
            "made_at": now(),
            "adapter": {"name": self.name, "identity": self.identity, "answered_by": list(replies.answered_by)},
            "form": self.adapter.form,
            "prompt_form": prompt_form,
            "data": self.test.as_dict(),
            "by": ground.asked.by,
            "ledger": _of_ledger(reading),
            "figures": {"adapter": figure(ours.primary, grouping), "prompt": figure(theirs.primary, grouping)},
            "judged": found.as_dict(),
            "rivals": rivals,
            "cost": self._cost(written),
            "drift": {"why_none": "not asked for"},
            "said": words.after_training(found, self.name, self.recipe.name, rivals, reading.number, margin),
        }
        return made, found.p, replies.texts

    def other_data(self) -> list[str]:
        """A word of warning where the adapter learned from other rows than the simple models did."""
        folder, training = self.ground.asked.adapter, self.ground.asked.training
        learned = trained_on(folder).get("training") if folder is not None else None
        if learned is None or learned == read_data(training, Columns(self.ground.asked.columns)).digest:
            return []
        return [f"{self.name} was trained on other data than {training}, as its card says; the others were not."]

    def drift(self, final: Sequence[str]) -> dict[str, Any]:
        """The score in the form of training beside the final one, on the same rows."""
        ground, folder = self.ground, self.ground.asked.adapter
        if folder is None:
            return {"why_none": "the adapter's folder, which says how it was trained, is not here: name it, too"}
        settings = forms.trained_settings(folder)
        if settings is None:
            return {"why_none": f"{folder} has no card that says how it was trained"}
        form = forms.form_of(settings)
        if form == forms.stored_form(ground.base) and ground.asked.served is None:
            return {"why_none": f"it was trained on the base in {form}, which is the form scored here"}
        final_form = self.adapter.form if self.adapter is not None else ""
        self.adapter = None
        self.say(f"{len(self.test.examples):,} test rows, the adapter on the base as it was trained: {form}")
        trained = Local(forms.as_trained(ground.base, folder, settings), form)
        texts = trained.answers(self.plain, ground.max_tokens(), self.progress).texts
        before, after = ground.scored(self.test, texts), ground.scored(self.test, final)
        grouping = ground.grouping(self.test, after)
        return {
            "trained_form": form,
            "final_form": final_form,
            "rows": len(texts),
            "trained": figure(before.primary, grouping),
            "final": figure(after.primary, grouping),
            "difference": difference(after.primary, before.primary, grouping),
            "changed_answers": sum(one != other for one, other in zip(texts, final, strict=True)),
        }

    def _base_answers(self) -> tuple[str, Written, list[str], list[tuple[Rival, list[str]]]]:
        """The base's form, the best prompt with its answers to it, and those of every rival."""
        ground = self.ground
        self.say(f"{len(self.test.examples):,} test rows, the best prompt ({self.recipe.name})")
        kitchen = ground.kitchen(self.seed)
        written = kitchen.write(self.recipe, self.test, ground.tokens, ground.most_prompt_tokens())
        base, reference = base_of(ground, self.served)
        answers = base.answers(written.prompts, ground.max_tokens(), self.progress).texts
        told = [(one, one.answers(self.test)) for one in rivals_of(ground, reference, self.say, self.progress)]
        if reference is not None:
            reference.model = None
        return base.form, written, answers, told

    def _against(self, rival: Rival, texts: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
        ground = self.ground
        ours, theirs = (_labels(ground, self.test, said) for said in (answers, texts))
        grouping = ground.grouping(self.test, ours)
        found = difference(ours.primary, theirs.primary, grouping)
        return {
            **about(ground, rival),
            "figure": figure(theirs.primary, grouping),
            "difference": found,
            "is_enough": enough(found, ground.asked.margin),
        }

    def _cost(self, written: Written) -> dict[str, Any]:
        tokens = {
            "prompt": round(mean_of(written.tokens), 1),
            "adapter": round(mean_of([self.ground.tokens(prompt) for prompt in self.plain]), 1),
        }
        if self.served is not None and isinstance(self.adapter, Served):
            return {"prompt_tokens": tokens, **timed(self.served, self.adapter, written.prompts, self.plain)}
        why = "times are taken of a server: give --url and the served adapter"
        return {"prompt_tokens": tokens, "ttft_p50_seconds": None, "not_timed": why}


def decide(
    ground: Ground, report: Report, ledger: Ledger, say: Say, progress: Progress = unwatched, *, drifts: bool = True
) -> Report:
    """The report with a verdict on the test rows; the reading is written down before anything is asked."""
    trial = Trial(ground, report, say, progress)
    reading = ledger.begin(trial.test.digest, trial.identity, f"{ground.metric} above {ground.asked.margin:g}")
    say(f"the test rows are read for the {ORDINALS.get(reading.number, f'{reading.number}th')} time")
    made, p, answers = trial.judged(reading)
    ledger.end(reading, trial.test.digest, p)
    if drifts:
        made["drift"] = trial.drift(answers)
    made["said"] = [*made["said"], *trial.other_data(), words.cost(made["cost"])]
    if "difference" in made["drift"]:
        made["said"].append(words.drift(made["drift"]))
    return {**report, "verdict": made}


def _labels(ground: Ground, part: Part, answers: Sequence[str]) -> Items:
    return ground.scored(part, answers, (LABEL_METRIC,))


def _of_ledger(reading: Reading) -> dict[str, Any]:
    return {
        "readings": reading.number,
        "others": [{"subject": one.subject, "measure": one.measure, "p": one.p} for one in reading.others],
        "torn_lines": reading.torn_lines,
    }
