"""A card as a page: `card_html(card)` makes it from card.json alone, self-contained, without script or network.

The card may be anybody's claim. Nothing in it is trusted: every value becomes bounded, escaped text, and what has
another type or size than expected is shown as text or left out. The page needs jinja2 and nothing else of a trainer's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from training.curve import curve_svg, is_number, points
from training.page_template import page_template
from training.printable import printable

TEMPLATE = Path(__file__).with_name("card.html")
LONGEST_TEXT, MOST_ROWS = 400, 60
SCORES = {
    "exact_match": "exact match",
    "json_valid": "valid JSON",
    "label_accuracy": "label accuracy",
    "field_f1": "F1 of the other fields",
}
SECTIONS = (
    ("Goal", ("goal",)),
    ("Figures of the verdict", ("verdict", "figures")),
    ("Answers, with intervals", ("evaluation", "figures", "metrics")),
    ("Answers, by likeness to the rows trained on", ("evaluation", "figures", "similarity")),
    ("Checked as a server will", ("check",)),
    ("Prompting instead", ("baseline",)),
    ("Forgetting", ("forgetting",)),
    ("Privacy", ("privacy",)),
    ("Training data", ("data", "training")),
    ("Validation data", ("data", "validation")),
    ("Data check", ("gate",)),
    ("Plan against actual", ("plan",)),
    ("Cost", ("cost",)),
    ("Settings", ("settings",)),
    ("Base", ("base",)),
    ("Template", ("template",)),
    ("Adapter", ("adapter",)),
    ("Lineage", ("lineage",)),
    ("Versions", ("versions",)),
)
GOOD, BAD = ("learned",), ("diverged", "no effect")  # of the others something is to be done
MOST_FLAGS, MOST_SAMPLES, MOST_ADVICE, DEEPEST = 3, 6, 8, 3


def card_html(card: Mapping[str, Any]) -> str:
    """The whole page. The same card gives the same bytes."""
    from markupsafe import Markup

    evaluation = part(card, "evaluation")
    result = part(card, "result")
    curve = part(result, "curve")
    base_loss = number(part(evaluation, "loss").get("base"))
    best_step = number(result.get("best_step"))
    adapter_loss = number(part(evaluation, "loss").get("adapter"))
    return page_template(TEMPLATE).render(
        title=text(card.get("name") or "An adapter without a name"),
        subtitle=_subtitle(card),
        outcome=_outcome(card),
        check=_check(card),
        samples=_samples(card),
        review=_review(card),
        verdict=text(evaluation["verdict"]) if evaluation.get("verdict") else _why_no_evaluation(card),
        is_worse=base_loss is not None and adapter_loss is not None and adapter_loss > base_loss,
        tiles=_tiles(card),
        curve=Markup(curve_svg(curve, base_loss, best_step)),  # noqa: S704 - made of numbers only
        has_validation=bool(points(curve.get("validation"))),
        has_base=base_loss is not None,
        has_rate=bool(points(curve.get("learning_rate"))),
        comparison=_comparison(evaluation),
        compared_on=_compared_on(evaluation),
        sections=[(heading, _rows(part(card, *path))) for heading, path in SECTIONS if part(card, *path)],
    )


def part(card: Mapping[str, Any], *path: str) -> dict[str, Any]:
    """The object at the path; an empty one where there is none."""
    value: Any = card
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return dict(value) if isinstance(value, Mapping) else {}


def number(value: Any) -> float | None:
    """A finite number, or None."""
    return float(value) if is_number(value) else None


def text(value: Any) -> str:
    """Any value as bounded text for people."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _number_text(value)
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return text(", ".join(map(text, value[:MOST_ROWS])) if value else None)
    written = value if isinstance(value, str) else _json(value)
    shown = printable(written)
    return shown if len(shown) <= LONGEST_TEXT else shown[:LONGEST_TEXT] + " …"


def _number_text(value: float) -> str:
    if not is_number(value):
        return "not a number"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        return "(cannot be shown)"


def _subtitle(card: Mapping[str, Any]) -> str:
    method = part(card, "settings").get("method")
    task = part(card, "goal").get("task")
    said = [
        text(task) if task else "",
        f"{text(method)} on {text(part(card, 'base').get('id'))}" if method else "",
        f"from {text(card['parent'])}" if card.get("parent") else "",
        f"trained {text(card['created_at'])}" if card.get("created_at") else "",
    ]
    return ", ".join(piece for piece in said if piece)


def _outcome(card: Mapping[str, Any]) -> dict[str, Any] | None:
    """The verdict on the run, how it is coloured, its flags and what to do."""
    verdict = part(card, "verdict")
    if not verdict.get("sentence"):
        return None
    primary = text(verdict.get("primary"))
    flags = _texts(verdict.get("flags"), MOST_FLAGS)
    kind = "bad" if primary in BAD else "good" if primary in GOOD and not flags else "warn"
    return {
        "kind": kind,
        "sentence": text(verdict["sentence"]),
        "flags": flags,
        "advice": _texts(verdict.get("advice"), MOST_ADVICE),
    }


def _check(card: Mapping[str, Any]) -> dict[str, Any] | None:
    check = part(card, "check")
    if not check.get("sentence"):
        return None
    return {"is_bad": check.get("passed") is not True, "sentence": text(check["sentence"])}


def _samples(card: Mapping[str, Any]) -> list[tuple[str, list[dict[str, str]]]]:
    """Wrong answers first: they say more."""
    made = []
    for key, heading in (("wrong", "Wrong answers"), ("right", "Right answers")):
        rows = part(card, "samples").get(key)
        kept = [row for row in rows if isinstance(row, Mapping)][:MOST_SAMPLES] if isinstance(rows, list) else []
        if kept:
            made.append(
                (heading, [{name: text(row.get(name)) for name in ("question", "expected", "answer")} for row in kept])
            )
    return made


def _review(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = card.get("review")
    kept = [row for row in rows if isinstance(row, Mapping)][:MOST_ROWS] if isinstance(rows, list) else []
    return [(text(row.get("severity")), _finding(row)) for row in kept]


def _finding(row: Mapping[str, Any]) -> str:
    named = " ".join(text(row[key]) for key in ("setting", "value") if row.get(key) is not None)
    said = text(row.get("effect") or row.get("rule"))
    better = f" Better: {text(row['suggestion'])}." if row.get("suggestion") else ""
    return f"{named}: {said}.{better}" if named else f"{said}.{better}"


def _texts(value: Any, most: int) -> list[str]:
    return [text(item) for item in value[:most]] if isinstance(value, list) else []


def _why_no_evaluation(card: Mapping[str, Any]) -> str:
    if not part(card, "data", "validation"):
        return "Not compared with the base: there were no validation rows."
    return "Not compared with the base: it was turned off."


def _tiles(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    result, cost, adapter = part(card, "result"), part(card, "cost"), part(card, "adapter")
    made = [
        ("training loss", _fixed(result.get("training_loss"), 3)),
        ("validation loss", _fixed(result.get("validation_loss"), 3)),
        ("steps", _fixed(result.get("steps"), 0)),
        ("size", _bytes(adapter.get("bytes"))),
        ("time", _seconds(cost.get("seconds"))),
        ("peak memory", _bytes(cost.get("peak_memory_bytes"))),
        ("tokens/s", _fixed(cost.get("tokens_per_second"), 0)),
    ]
    return [(label, value) for label, value in made if value]


def _comparison(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    loss, answers = part(evaluation, "loss"), part(evaluation, "answers")
    base, adapter = part(answers, "base"), part(answers, "adapter")
    rows = [("validation loss", _fixed(loss.get("base"), 4), _fixed(loss.get("adapter"), 4))]
    rows += [(label, _fixed(base.get(key), 3), _fixed(adapter.get(key), 3)) for key, label in SCORES.items()]
    return [row for row in rows if row[1] or row[2]]


def _compared_on(evaluation: Mapping[str, Any]) -> str:
    answers = part(evaluation, "answers")
    losses = f"Loss over {text(evaluation.get('sequences'))} validation sequences"
    if not answers:
        left_out = evaluation.get("answers_left_out")
        return f"{losses}; no answers were asked for" + (f": {text(left_out)}." if left_out else ".")
    label = part(answers, "adapter").get("label")
    named = f" The label is {text(label)}." if label else ""
    return f"{losses}; greedy answers to {text(answers.get('rows'))} of them.{named}"


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    flat = list(_flat(values))
    shown = flat[:MOST_ROWS]
    left = len(flat) - len(shown)
    return [*shown, (f"{left} more", "in card.json")] if left > 0 else shown


def _flat(values: Mapping[str, Any], before: str = "", depth: int = 1) -> Iterator[tuple[str, str]]:
    """Objects within are spread out, those with an estimate and its interval become one text."""
    for key, value in list(values.items())[: MOST_ROWS + 1]:
        name = f"{before}{text(str(key)).replace('_', ' ')}"
        if isinstance(value, Mapping) and value and depth < DEEPEST:
            spread = _interval(value)
            if spread:
                yield name, spread
            else:
                yield from _flat(value, f"{name}: ", depth + 1)
        else:
            yield name, text(value)


def _interval(value: Mapping[str, Any]) -> str:
    """An estimate with its interval; empty for any other object."""
    found = [number(value.get(key)) for key in ("estimate", "low", "high")]
    if any(one is None for one in found):
        return ""
    estimate, low, high = (f"{one:,.4g}" for one in found if one is not None)
    return f"{estimate} ({low} to {high})"


def _fixed(value: Any, digits: int) -> str:
    found = number(value)
    return "" if found is None else f"{found:,.{digits}f}"


def _bytes(value: Any) -> str:
    found = number(value)
    if found is None:
        return ""
    return f"{found / 1e9:,.2f} GB" if found >= 1e9 else f"{found / 1e6:,.1f} MB"


def _seconds(value: Any) -> str:
    found = number(value)
    if found is None:
        return ""
    minutes, rest = divmod(round(found), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{found:.1f} s"
