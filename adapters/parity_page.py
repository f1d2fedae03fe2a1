"""parity.html: the parity report of an export as one page that a customer may be shown, without script or network.

Names, prompts and answers are anybody's text: they are bounded, their control characters made visible, and escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapters.parity_picture import Bar, figure, picture_svg
from adapters.parity_verdict import largest_explained, sets_of

TEMPLATE = Path(__file__).with_name("parity.html")
MOST_TENSORS, MOST_PROBLEMS, MOST_ANSWERS, LONGEST_TEXT = 12, 20, 6, 1200
SETS = {"probe": "Probe", "evaluation": "Evaluation rows"}
HIDDEN = "\N{REPLACEMENT CHARACTER}"
COLUMNS = ("mean difference", "largest", "mean KL", "largest KL", "same top token")


def page(parity: Mapping[str, Any], facts: Mapping[str, Any]) -> bytes:
    """The page of a parity report, passed or failed; the same report gives the same bytes.

    `facts` are the manifest's `source`, `dtype`, `base` (id, digest) and `adapter` (digest).
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    logits = parity.get("logits")
    made = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        facts=_facts(facts),
        outcome=_outcome(parity, text(facts["dtype"])),
        tiles=_tiles(parity),
        picture=Markup(picture_svg(list(_bars(parity)))),  # noqa: S704 - made of our own labels and numbers
        logits=[_logits_table(*one, text(facts["dtype"])) for one in sets_of(logits)] if logits else [],
        forms=[_form(form) for form in parity.get("forms", ())],
        answers=list(_answers(logits)) if logits else [],
        answers_left_out=text(logits["answers_left_out"]) if logits and logits.get("answers_left_out") else "",
        tensors=_tensors(parity.get("weights")),
        notes=[text(note) for note in parity.get("notes", ())],
    )
    return made.encode()


def text(value: Any) -> str:
    """Any value as bounded text in which nothing hides."""
    whole = str(value)
    kept = (letter if letter.isprintable() or letter in "\n\t" else HIDDEN for letter in whole[:LONGEST_TEXT])
    return "".join(kept) + (" …" if len(whole) > LONGEST_TEXT else "")


def _facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        ("adapter", text(facts["source"])),
        ("adapter digest", text(facts["adapter"]["digest"])),
        ("base", text(facts["base"]["id"])),
        ("base digest", text(facts["base"]["digest"])),
        ("written in", text(facts["dtype"])),
    ]
    named = {"source": text(facts["source"]), "base_id": text(facts["base"]["id"]), "dtype": text(facts["dtype"])}
    return {**named, "rows": rows}


def _outcome(parity: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    problems = [text(problem) for problem in parity.get("problems", ())]
    if parity["verdict"] != "passed":
        left = len(problems) - MOST_PROBLEMS
        shown = [*problems[:MOST_PROBLEMS], *([f"and {left:,} more"] if left > 0 else [])]
        sentence = "Failed: this merge is not what base and adapter give. It was not exported."
        return {"kind": "bad", "sentence": sentence, "said": "What is wrong:", "problems": shown}
    differs = f"rounding to {dtype}" if dtype != "float32" else "the order of additions in float32"
    sentence = f"Passed: the merged model computes what base and adapter compute together, up to {differs}."
    if parity["level"] == "weights_only":
        sentence = f"Passed: every merged weight is base plus adapter, up to {differs}."
    if parity["level"] == "files":
        sentence = "Passed: the files are the adapter's own, byte for byte."
    return {"kind": "good", "sentence": sentence, "said": " ".join(_said(parity)), "problems": []}


def _said(parity: Mapping[str, Any]) -> Iterator[str]:
    if weights := parity.get("weights"):
        yield (
            f"Each of the {weights['changed_elements']:,} changed weights, in {weights['changed_tensors']:,} tensors, "
            "was read back and computed again."
        )
        if unchanged := weights["unchanged_tensors_equal"]:
            yield f"{unchanged:,} other tensors are those of the base, byte for byte."
    if parity.get("merged_by") == "peft":
        yield "The adapter is more than low-rank updates, so PEFT merged it."
    for form in parity.get("forms", ()):
        found = form["against_peft"]
        yield (
            f"{text(form['name'])}: {found['identical']} of {found['prompts']} answers are base + adapter's; "
            f"over {found['positions']:,} tokens the mean KL is {figure(found['mean_kl'])} nats."
        )
    if logits := parity.get("logits"):
        merged, floor = logits["merged_against_peft"], logits["rounding_floor"]
        yield (
            f"The scores of the next token are off by {figure(merged['mean_abs'])} in the mean over "
            f"{merged['positions']:,} positions; rounding alone costs {figure(floor['mean_abs'])}."
        )
        for name, answers in _answered(logits):
            found = answers["merged_against_peft"]
            which = "of the probe" if name == "probe" else "to the evaluation rows"
            yield f"{found['identical']} of {found['prompts']} answers {which} are identical{_rest(found)}."
    elif parity["level"] == "weights_only":
        yield f"Logits were not compared: {text(parity.get('reason'))}."


def _rest(found: Mapping[str, Any]) -> str:
    left = found["prompts"] - found["identical"]
    if not left:
        return ""
    return f"; {'one parts' if left == 1 else f'{left} part'} where two tokens are so close that rounding decides"


def _answered(logits: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return ((name, figures["answers"]) for name, figures in sets_of(logits) if figures.get("answers"))


def _tiles(parity: Mapping[str, Any]) -> list[tuple[str, str]]:
    tiles = []
    if weights := parity.get("weights"):
        tiles.append(("weights beyond the bound", f"{weights['outside_bound']:,}"))
        if weights["least_update_kept"] is not None:
            tiles.append(("update kept, at least", _share(weights["least_update_kept"])))
    if logits := parity.get("logits"):
        tiles.append(("same top token", _share(logits["merged_against_peft"]["top1_agreement"])))
        for name, answers in _answered(logits):
            found = answers["merged_against_peft"]
            tiles.append((f"identical answers, {SETS[name].lower()}", f"{found['identical']} of {found['prompts']}"))
    return tiles


def _bars(parity: Mapping[str, Any]) -> Iterator[Bar]:
    if weights := parity.get("weights"):
        yield Bar("weights, relative error", _number(weights["relative_error"]), _number(weights["rounding_floor"]))
    for name, figures in sets_of(parity["logits"]) if parity.get("logits") else ():
        for key, label in (("mean_abs", "mean"), ("max_abs", "largest")):
            measured, floor = figures["merged_against_peft"], figures["rounding_floor"]
            limit = largest_explained(figures, key) if measured["largest_logit"] is not None else None
            values = _number(measured[key]), _number(floor[key])
            yield Bar(f"logits of the {name}, {label} difference", *values, limit)


def _number(value: float | None) -> float:
    """A figure of the report; one that was not finite is null there."""
    return float("inf") if value is None else float(value)


def _logits_table(name: str, figures: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    counts = figures["probe" if name == "probe" else "counts"]
    left = [f"{count} left out: {text(reason)}" for reason, count in counts["left_out"].items()]
    said = (
        f"{counts['sequences']} prompts{' and their answers' if figures.get('answers') else ''}, "
        f"{figures['merged_against_peft']['positions']:,} of {counts['tokens']:,} positions, in float32"
    )
    rows = [
        ("merged, against base + adapter", figures["merged_against_peft"]),
        ("rounding alone", figures["rounding_floor"]),
        ("merged, against PEFT's rounded merge", figures["merged_against_rounded_peft"]),
        (f"the base, computed in {dtype}", figures.get("dtype_floor")),
    ]
    return {
        "heading": f"Logits: {SETS[name].lower()}",
        "said": "; ".join([said, *left]) + ".",
        "columns": COLUMNS,
        "rows": [(label, _columns(found)) for label, found in rows if found],
    }


def _columns(found: Mapping[str, Any]) -> list[str]:
    shown = [figure(found[key]) for key in ("mean_abs", "max_abs", "mean_kl", "max_kl")]
    return [*shown, _share(found["top1_agreement"])]


def _share(value: float | None) -> str:
    """Whole only where it is whole: 99.97% is not 100%."""
    if value is None:
        return "none"
    return f"{value:.0%}" if value in (0.0, 1.0) else f"{min(value, 0.9999) if value < 1 else value:.2%}"


def _form(form: Mapping[str, Any]) -> dict[str, Any]:
    found = form["against_peft"]
    kind = "failed" if form["problems"] else "passed" if form["is_judged"] else "reported"
    answers = f"{found['identical']} of {found['prompts']}"
    return {
        "name": text(form["name"]),
        "values": [answers, _share(found["top1_agreement"]), figure(found["mean_kl"]), figure(found["mean_abs"]), kind],
    }


def _answers(logits: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, answers in _answered(logits):
        found, floor = answers["merged_against_peft"], answers["rounding_floor"]
        differences = {difference["prompt"]: difference for difference in found["first_differences"]}
        yield {
            "heading": f"Answers: {SETS[name].lower()}",
            "said": (
                f"The likeliest token each time, {answers['max_new_tokens']} at most. Identical are "
                f"{found['identical']} of {found['prompts']}; of PEFT's own rounded merge, {floor['identical']}."
            ),
            "shown": [_answer(row, differences.get(row["row"])) for row in answers["shown"][:MOST_ANSWERS]],
        }


def _answer(row: Mapping[str, Any], difference: Mapping[str, Any] | None) -> dict[str, Any]:
    kind = "same" if difference is None else "rounding" if difference["is_rounding"] else "bug"
    shown = {key: text(row[key]) for key in ("prompt", "same", "peft", "merged")}
    shown |= {key: shown[key] or "(ends here)" for key in ("peft", "merged")}
    return {**shown, "first": row["first_difference"], "kind": kind, "said": _parted(difference)}


def _parted(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return ""
    gap = "" if difference["gap"] is None else f", over a gap of {figure(difference['gap'])} nats"
    why = "as rounding may" if difference["is_rounding"] else "which rounding cannot explain"
    return f"They part at token {difference['token'] + 1}{gap}, {why}."


def _tensors(weights: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The worst first: by elements outside the bound, the error as a multiple of rounding, the update that is kept."""
    if not weights or not weights["tensors"]:
        return None
    rows = sorted(weights["tensors"], key=_badness)
    return {
        "heading": "Changed tensors, the worst first",
        "said": (
            f"{min(len(rows), MOST_TENSORS)} of {len(rows):,}. Error and rounding are relative to the tensor's norm; "
            "update kept is the part of the adapter's update that survived rounding; outside are elements that are not "
            "the rounded sum."
        ),
        "rows": [_tensor(row) for row in rows[:MOST_TENSORS]],
    }


def _badness(row: Mapping[str, Any]) -> tuple[int, float, float, str]:
    error, floor = _number(row["relative_error"]), _number(row["rounding_floor"])
    times_rounding = round(error / floor if floor else error, 2)
    return -row["outside"], -times_rounding, _number(row["update_kept"]), row["name"]


def _tensor(row: Mapping[str, Any]) -> list[str]:
    figures = [figure(row["relative_error"]), figure(row["rounding_floor"]), _share(row["update_kept"])]
    return [text(row["name"]), f"{row['elements']:,}", *figures, f"{row['outside']:,}"]
