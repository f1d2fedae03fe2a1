"""The verdict's rules on made evidence, each at its limit; that the docs say what the code does; and real tiny runs."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training import real_faults
from tests.training.faults import FAULTS, Fault, base_of, is_false_alarm, is_told, runs, table
from training.verdict import figures
from training.verdict.evidence import Canaries, Evidence, General, HeldOut, Seen
from training.verdict.judge import judge
from training.verdict.rules import FLAGS, LIMITS, PRIMARY, RULES

ROOT = Path(__file__).resolve().parent.parent.parent
ROWS = 60


def losses(level: float, spread: float = 0.1, rows: int = ROWS, seed: int = 0) -> list[float]:
    """Nats of rows of ten tokens around a level a token; the same seed spreads the same rows the same way."""
    found = 10 * (level + spread * np.random.default_rng(seed).normal(size=rows))
    return [float(loss) for loss in found]


def held_out(rows: int = ROWS, **levels: float) -> HeldOut:
    made = {"base": 2.0, "start": 2.0, "middle": 0.52, "best": 0.5, "last": 0.5, **levels}
    states = {name: losses(level, rows=rows) for name, level in made.items()}
    return HeldOut([10] * rows, [str(row) for row in range(rows)], **states)


def run(**changes: Any) -> Evidence:
    """A run that learned, with changes."""
    steps = range(1, 101)
    curve = [(step, 0.5 + 1.5 * 0.95**step) for step in steps]
    return Evidence(
        **{
            "steps": 100,
            "planned_steps": 100,
            "best_step": 100,
            "training": curve,
            "validation": [(25, 0.9), (50, 0.52), (75, 0.51), (100, 0.5)],
            "learning_rate": [(step, 1e-3) for step in steps],
            "held_out": held_out(),
            **changes,
        }
    )


def test_a_run_that_learned_is_said_to_have_and_nothing_else() -> None:
    found = judge(run())
    assert (found.primary, found.flags, found.advice) == ("learned", (), ())
    assert found.figures["gain"]["low"] <= 1.5 <= found.figures["gain"]["high"]
    assert found == judge(run())


@pytest.mark.parametrize(("gain", "primary"), [(0.0, "no effect"), (0.004, "no effect"), (0.03, "learned")])
def test_a_change_within_one_percent_is_no_effect(gain: float, primary: str) -> None:
    start = 2.0
    rows = held_out(start=start, middle=start - gain, best=start - gain, last=start - gain)
    found = judge(run(held_out=rows))
    assert found.primary == primary
    assert ("Raise the learning rate (it peaked at 0.001)" in " ".join(found.advice)) == (primary == "no effect")


def test_a_change_that_noise_covers_cannot_be_told() -> None:
    rows = replace(held_out(), best=losses(1.95, spread=1.0, seed=1), last=losses(1.95, spread=1.0, seed=1))
    found = judge(run(held_out=replace(rows, middle=rows.last)))
    assert found.primary == "cannot tell" and "to" in found.sentence


@pytest.mark.parametrize("rows", [5, 19])
def test_below_twenty_clusters_nothing_is_told_and_more_rows_are_asked_for(rows: int) -> None:
    found = judge(run(held_out=held_out(rows)))
    assert found.primary == "cannot tell" and f"{rows} validation rows" in found.sentence
    assert "--validation FILE" in found.advice[0]
    one = held_out()
    assert judge(run(held_out=replace(one, clusters=["same"] * ROWS))).primary == "cannot tell"
    assert judge(run(held_out=held_out(20))).primary == "learned"


def test_without_validation_rows_or_the_base_that_is_said() -> None:
    assert "--validation" in judge(run(held_out=None)).advice[0]
    labels = ["a"] * ROWS
    assert (
        "--no-compare" in judge(run(held_out=replace(held_out(), start=[], base=[], best=[], labels=labels))).advice[0]
    )


def test_a_validation_loss_that_rose_again_while_training_fell_is_overfit_and_the_step_is_named() -> None:
    rows = held_out(last=0.62)
    found = judge(run(held_out=rows, best_step=40))
    assert found.primary == "overfit" and "0.508 to 0.628" in found.sentence
    assert found.advice[0].startswith("Stop at step 40")
    assert judge(run(held_out=held_out(last=0.51), best_step=40)).primary == "learned", "a rise of 2% is none"
    flat = [(step, 0.5) for step in range(1, 101)]
    assert judge(run(held_out=rows, best_step=40, training=flat)).primary == "learned", "training did not fall"


def test_rows_that_lead_away_from_validation_are_overfit_where_training_fell_and_diverged_where_not() -> None:
    rows = held_out(best=2.3, middle=2.4, last=2.4)
    found = judge(run(held_out=rows, best_step=25))
    assert found.primary == "overfit" and "same task" in found.advice[0]
    rising = [(step, 2.0 + 0.002 * step) for step in range(1, 101)]
    diverged = judge(run(held_out=rows, best_step=25, training=rising))
    assert diverged.primary == "diverged"
    for sentence in (found.sentence, diverged.sentence):
        assert sentence.endswith("(by 0.300 to 0.300)."), "a rise has no minus"


def test_a_loss_that_still_fell_in_the_second_half_of_the_learning_is_underfit() -> None:
    found = judge(run(held_out=held_out(middle=1.2, best=0.8, last=0.8)))
    assert found.primary == "underfit" and found.figures["twice_the_steps"] == pytest.approx(0.3, abs=0.01)
    assert found.advice[0].startswith("Train about twice as long (200 steps)")
    assert judge(run(held_out=held_out(middle=0.9, best=0.8, last=0.8))).primary == "learned"


def test_twice_the_steps_take_a_loss_no_lower_than_nothing() -> None:
    found = judge(run(held_out=held_out(middle=0.95, best=0.2, last=0.2)))
    last = found.figures["twice_the_steps"]
    assert found.primary == "underfit" and last == pytest.approx(0.2, abs=0.02)
    assert f"still falling at {last:.3f}: twice the steps would lower it by about {last:.2f}" in found.sentence


def test_the_middle_is_of_the_learning_rate_and_not_of_the_steps() -> None:
    validation = [(25, 1.0), (50, 1.0), (75, 1.0), (100, 1.0)]
    assert figures.middle_step(validation, [(step, 1.0) for step in range(1, 101)]) == 50
    assert figures.middle_step(validation, [(step, 1.0 if step <= 50 else 0.01) for step in range(1, 101)]) == 25
    assert figures.middle_step([(100, 1.0)], []) is None


def test_a_training_loss_that_lost_half_of_its_fall_is_diverged_and_a_spike_is_not() -> None:
    fallen = [(step, max(0.5, 2.0 - 0.05 * step)) for step in range(1, 61)]
    up = [(step, 1.6) for step in range(61, 101)]
    validation = [(25, 0.7), (50, 1.2), (75, 1.5), (100, 1.6)]
    found = judge(run(training=fallen + up, validation=validation))
    assert found.primary == "diverged"
    assert "rose 3 evaluations in a row" in found.advice[0] and "--learning-rate 0.00025" in found.advice[0]
    spike = [(step, 6.0 if step in (70, 71) else 0.5) for step in range(61, 101)]
    assert judge(run(training=fallen + spike)).primary == "learned"
    noisy = [(step, 1.0 + (-1) ** step * 0.4) for step in range(1, 101)]
    assert judge(run(training=noisy)).primary == "learned"


@pytest.mark.parametrize(
    ("ranks", "is_memorised"), [([1], True), ([500], False), ([1, 400, 600], False), ([3, 8], True), ([23, 1], True)]
)
def test_canaries_that_rank_higher_among_their_candidates_than_chance_allows_are_memorised(
    ranks: list[int], is_memorised: bool
) -> None:
    found = judge(run(canaries=Canaries(len(ranks), ranks, 1000)))
    assert (found.flags == ("memorised",)) == is_memorised
    assert found.primary == "learned"


def test_the_chance_of_canaries_is_that_of_the_product_of_their_ranks() -> None:
    one, other = 10 / 1001, 11 / 1001
    assert figures.canaries_p(Canaries(1, [10], 1000)) == pytest.approx(one)
    both = one * other  # P(U V <= c) = c - c ln c
    assert figures.canaries_p(Canaries(2, [10, 11], 1000)) == pytest.approx(both - both * math.log(both))


def test_canaries_that_nothing_remembers_are_said_to_be_in_one_run_of_a_hundred() -> None:
    drawn = np.random.default_rng(3).integers(1, 1002, size=(4000, 8))
    told = sum(figures.canaries_p(Canaries(8, ranks.tolist(), 1000)) < LIMITS.canary_p for ranks in drawn)
    assert told / 4000 == pytest.approx(0.01, abs=0.005)


def seen(best: float, doubts: list[float] | None = None, seed: int = 5) -> Seen:
    return Seen(
        [10] * ROWS, [f"t{row}" for row in range(ROWS)], losses(2.0, seed=seed), losses(best, seed=seed), doubts
    )


def test_without_canaries_a_gain_that_tells_rows_trained_on_from_others_is_memorised() -> None:
    assert judge(run(seen=seen(0.2))).flags == ("memorised",)
    rows = replace(
        held_out(), best=losses(0.5, 0.3, seed=1), last=losses(0.5, 0.3, seed=1), middle=losses(0.52, 0.3, seed=1)
    )
    assert judge(run(held_out=rows, seen=replace(seen(0.5), best=losses(0.5, 0.3, seed=8)))).flags == ()


def test_general_text_that_got_harder_is_forgotten() -> None:
    base = losses(3.0, rows=40)
    assert judge(run(general=General(base, [loss + 0.3 for loss in base]))).flags == ("forgot",)
    assert judge(run(general=General(base, [loss + 0.05 for loss in base]))).flags == ()


def test_doubts_of_more_than_two_percent_of_short_answers_are_label_noise_where_it_learned() -> None:
    doubts = [5.0] * 9 + [0.0] * (ROWS - 9)
    assert judge(run(seen=seen(0.5, doubts))).flags == ("label noise",)
    assert judge(run(seen=seen(0.5, [1.0] * ROWS))).flags == ()
    assert judge(run(seen=seen(0.5, [5.0] + [0.0] * (ROWS - 1)))).flags == ()
    nothing = held_out(start=2.0, best=2.0, middle=2.0, last=2.0)
    assert "label noise" not in judge(run(held_out=nothing, seen=seen(2.0, doubts))).flags


def test_the_label_that_stays_hard_is_asked_more_rows_of() -> None:
    rows = held_out()
    labels = ["rare" if row < 10 else "common" for row in range(ROWS)]
    best = [loss + (12.0 if label == "rare" else 0.0) for loss, label in zip(rows.best, labels, strict=True)]
    evidence = run(held_out=replace(rows, best=best, last=best, middle=best, labels=labels))
    found = judge(replace(evidence, rows_of_label={"rare": 12, "common": 300}))
    assert found.advice == ("150 more rows of label 'rare', whose loss is 1.71: it has 12.",)


def test_a_gain_that_rows_unlike_all_trained_on_do_not_have_is_said() -> None:
    rows = held_out()
    is_far = [row < 30 for row in range(ROWS)]
    best = [before if far else after for before, after, far in zip(rows.start, rows.best, is_far, strict=True)]
    found = judge(run(held_out=replace(rows, best=best, last=best, middle=best, is_far=is_far)))
    assert found.primary == "learned" and "unlike any row trained on" in found.advice[0]
    assert judge(run(held_out=replace(rows, is_far=is_far))).advice == ()
    few = [row < 5 for row in range(ROWS)]
    assert "far_gain" not in judge(run(held_out=replace(rows, is_far=few))).figures


def test_every_outcome_has_a_rule_and_every_limit_is_in_the_docs() -> None:
    page = (ROOT / "docs" / "verdict.md").read_text()
    for rule in RULES:
        assert f"| {rule.code} | {rule.kind} | {rule.holds} |" in page, rule.code
    assert {rule.code for rule in RULES} == {*PRIMARY, *FLAGS}
    table = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", page, re.MULTILINE))
    assert table == {name: f"{value:g}" for name, value in vars(LIMITS).items()}


def test_evidence_in_a_card_is_short_plain_json() -> None:
    kept = run(seen=seen(0.5, [0.0] * ROWS), canaries=Canaries(1, [3], 1000)).as_dict()
    assert json.loads(json.dumps(kept, allow_nan=False)) == kept
    assert len(json.dumps(kept)) < 10_000


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_of(tmp_path_factory.mktemp("words"))


SAMPLE = ("learning rate far too high", "wrong labels")


def test_real_runs_that_diverged_and_that_had_wrong_labels_are_told(words: Path) -> None:
    chosen = tuple(fault for fault in FAULTS if fault.name in SAMPLE)
    for fault, seed, found in runs(chosen, range(300, 301), words):
        assert is_told(fault, found) and not is_false_alarm(fault, found), (fault.name, seed, found)


@pytest.mark.long
@pytest.mark.timeout(5400)
def test_of_twenty_runs_with_each_fault_nine_in_ten_are_told_and_false_alarms_are_one_in_twenty(words: Path) -> None:
    results = [(fault, found) for fault, _, found in runs(FAULTS, range(400, 420), words)]
    print("\n".join(table(results)))  # the matrix of docs/verdict.md; pytest -rP shows it
    told: dict[str, list[bool]] = {}
    for fault, found in results:
        told.setdefault(fault.name, []).append(is_told(fault, found))
    false = [is_false_alarm(fault, found) for fault, found in results]
    assert all(sum(found) >= 0.9 * len(found) for found in told.values()), told
    assert sum(false) <= 0.05 * len(false)


@pytest.mark.long
@pytest.mark.model
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fault", real_faults.FAULTS, ids=lambda fault: fault.name)
def test_a_real_run_of_the_embedded_base_with_the_fault_is_told(fault: Fault, tmp_path: Path) -> None:
    found = real_faults.run(fault, tmp_path)
    print(fault.name, found)
    assert is_told(fault, found) and not is_false_alarm(fault, found), found
