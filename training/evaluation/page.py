"""A report as one self-contained page, without script or network: figures, and every row's answers, the worst first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.evaluation.confusion import confusion_svg
from training.evaluation.lines import named, shown
from training.page_template import page_template
from training.printable import printable

TEMPLATE = Path(__file__).with_name("report.html")
MOST_ROWS = 500  # of the answers; the file of --out has all
MOST_LABELS = 200


def report_html(report: Mapping[str, Any]) -> str:
    """The whole page; everything from the data and from models is escaped, control characters are made visible."""
    from markupsafe import Markup

    rows = report["rows_shown"]
    pairs = report.get("confusion") or ()
    less_is_better = report["primary"] in report["less_is_better"]
    return page_template(
        TEMPLATE
    ).render(
        report=report,
        primary=named(report["primary"]),
        figures=_figures(report),
        against=[(rival["name"], _differences(rival["metrics"])) for rival in report["against"]],
        similarity=_similarity(report),
        labels=(report.get("labels") or ())[:MOST_LABELS],
        confusion=Markup(confusion_svg(pairs)) if pairs else "",  # noqa: S704 - every name in it is escaped
        forgetting=report.get("forgetting"),
        judges=_judges(report),
        shown_rows=[_row(row, less_is_better) for row in rows[:MOST_ROWS]],
        left_rows=max(0, len(rows) - MOST_ROWS),
        rivals=list(rows[0]["rivals"]) if rows else [],
        number=shown,
        text=visible,
    )


def visible(value: Any) -> str:
    """A value as text of several lines in which nothing hides; nothing for None."""
    return "" if value is None else printable(str(value), kept="\n\t")


def _figures(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Name, estimate, interval, and what else there is to know of each metric."""
    made = []
    for name, found in report["metrics"].items():
        signature = report["signatures"].get(name, "")
        noise = found.get("noise")
        said = [f"batching moves it by {noise['floor']:.3f}"] if noise and noise["floor"] else []
        said += [f"{found['left_out']:,} rows left out"] if found.get("left_out") else []
        made.append(
            (named(name), shown(found["estimate"]), _interval(found), "; ".join([*said, signature]).strip("; "))
        )
    return made


def _differences(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    return [
        (
            named(name),
            shown(found.get("rival")),
            "-" if found["estimate"] is None else f"{found['estimate']:+.3f}",
            _interval(found, "+.3f"),
            f"{found['p']:.3g}" if "p" in found else "-",
        )
        for name, found in metrics.items()
    ]


def _similarity(report: Mapping[str, Any]) -> Any:
    found = report["similarity"]
    if not found:
        return None
    rows = []
    for name, part in found["bins"].items():
        figure = part.get("metrics", {}).get(report["primary"])
        estimate, interval = (shown(figure["estimate"]), _interval(figure)) if figure else ("-", "")
        rows.append((name, f"{part['rows']:,}", f"{part['clusters']:,}", estimate, interval))
    return {"rows": rows, "why": found["why"], "bin": found["verdict_bin"] or "cannot tell"}


def _judges(report: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    judge = report.get("judge")
    if not judge:
        return []
    made = []
    for name, found in judge["against"].items():
        rows = [
            ("win rate", f"{shown(found['win_rate']['estimate'])} {_interval(found['win_rate'])}"),
            ("won, lost, tied, judged differently in the two orders", ", ".join(str(found[key]) for key in _OUTCOMES)),
            ("position bias", shown(found["position_bias"])),
            ("replies that were no vote, failed requests", f"{found['invalid_replies']}, {found['errors']}"),
        ]
        made.append((f"{judge['model']} on {found['rows']:,} rows against {name}", rows))
    return made


_OUTCOMES = ("wins", "losses", "ties", "undecided")


def _interval(found: Mapping[str, Any], form: str = ".3f") -> str:
    if found.get("estimate") is None:
        return ""
    few = "" if found["is_telling"] else " (few clusters)"
    return f"[{found['low']:{form}}, {found['high']:{form}}]{few}"


def _row(row: Mapping[str, Any], less_is_better: bool) -> dict[str, Any]:
    return {**row, "kind": _kind(row["score"], less_is_better), "columns": _columns(row)}


def _kind(score: float | None, less_is_better: bool) -> str:
    """`right` or `wrong` where a score is at the end of what it can be, else `part`."""
    if score is None:
        return "part"
    worth = 1 - score if less_is_better else score
    return "right" if worth >= 1 else "wrong" if worth <= 0 else "part"


def _columns(row: Mapping[str, Any]) -> Sequence[tuple[str, str, float | None]]:
    rivals = [(name, found["answer"], found["score"]) for name, found in row["rivals"].items()]
    return [("expected", row["expected"], None), ("answer", row["answer"], row["score"]), *rivals]
