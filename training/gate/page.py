"""A report for people: lines for a terminal, and one self-contained page without script or network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from training.gate.report import Report
from training.page_template import page_template

TEMPLATE = Path(__file__).with_name("report.html")
EXAMPLES_OF_A_LINE = 3
MOST_LABELS = 30
VERDICTS = {
    "pass": "Nothing was found that speaks against training on this data.",
    "warn": "Fit to train on; look at the warnings first.",
    "block": "Not fit to train on as it is.",
}


def report_lines(report: Report) -> Iterator[tuple[str, str]]:
    """Level and text of each line; the level is "" where the line is no finding."""
    about = report.about
    yield "", f"{about['data']} ({about['form']}): {report.figures['rows']:,} rows, {about['digest'][:19]}"
    for name, value in figure_rows(report.figures):
        yield "", f"  {name:<18} {value}"
    for finding in report.findings:
        counted = f" {finding['count']:,} of {finding['of']:,}:" if finding["count"] else ""
        detail = f" ({finding['detail']})" if finding["detail"] else ""
        yield finding["level"], f"{finding['level']:<5} {finding['code']}:{counted} {finding['title']}{detail}"
        for example in finding["examples"][:EXAMPLES_OF_A_LINE]:
            yield "", f"        {example['place']} {example['text']}".rstrip()
        yield "", f"      → {finding['advice']}"
    yield report.verdict, f"{report.verdict}: {VERDICTS[report.verdict]}"


def figure_rows(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The figures as short texts."""
    if tokens := figures.get("tokens"):
        named = ", ".join(f"{name} {tokens[name]:,}" for name in ("p50", "p95", "p99", "max"))
        yield "tokens a row", f"{named}; {tokens['sum']:,} in all"
        yield "learned", f"{figures['learned_tokens']:,} tokens, {figures['learned_share']:.1%}"
    if above := figures.get("rows_above"):
        yield "rows above", ", ".join(f"{int(cut):,} tokens: {count:,}" for cut, count in above.items())
    if shares := figures.get("languages", {}).get("shares"):
        yield "languages", ", ".join(f"{language} {share:.1%}" for language, share in list(shares.items())[:8])
    if twins := figures.get("twins"):
        yield (
            "different",
            f"{twins['questions']:,} questions, {twins['templates']:,} templates, {twins['clusters']:,} groups of them "
            f"(near from Jaccard {twins['near_jaccard']:g})",
        )
    if labels := figures.get("labels"):
        counts = list(labels["counts"].items())
        more = f" and {len(counts) - 8:,} more" if len(counts) > 8 else ""
        listed = ", ".join(f"{label} {count:,}" for label, count in counts[:8])
        yield "labels", f"{len(counts):,}, read from {labels['read_from']}: {listed}{more}"


def report_html(report: Report) -> str:
    """The whole page; everything from the data is escaped."""
    histogram = report.figures.get("histogram", {})
    labels = report.figures.get("labels", {}).get("counts", {})
    return page_template(TEMPLATE).render(
        about=report.about,
        verdict=report.verdict,
        sentence=VERDICTS[report.verdict],
        rows=report.figures["rows"],
        figures=list(figure_rows(report.figures)),
        findings=report.findings,
        digest=report.digest,
        bars=[
            (heading, _bars(counts))
            for heading, counts in (
                ("Tokens a row", histogram),
                ("Rows a label", dict(list(labels.items())[:MOST_LABELS])),
            )
            if counts
        ],
    )


def _bars(counts: Mapping[str, int]) -> list[tuple[str, int, float]]:
    """Name, count and percent of the longest bar."""
    most = max(counts.values())
    return [(name, count, round(100 * count / most, 1)) for name, count in counts.items()]
