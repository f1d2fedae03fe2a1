"""A report as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from training.evaluation.confusion import label_name, matrix
from training.printable import printable

MOST_LABELS = 20
WIDEST_TABLE = 10  # labels of the confusion table
NAMES = {
    "exact_match": "exact match",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "micro_f1": "micro-F1",
    "weighted_f1": "weighted F1",
    "invalid": "invalid answers",
    "json_valid": "valid JSON",
    "field_f1": "F1 of fields",
    "chrf": "chrF",
    "bleu": "BLEU",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "semantic": "likeness of meaning",
    "gptscore": "GPTScore (nats)",
}


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The whole report but its rows, without control characters."""
    return map(printable, _lines(report))


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"{report['model']} on {report['data']}: {report['rows']:,} rows in {report['clusters']:,} clusters"
    yield from _aligned([(named(name), _figure(found)) for name, found in report["metrics"].items()])
    if report["clusters"] < report["fewest_clusters"]:
        yield f"  fewer than {report['fewest_clusters']} clusters: the intervals tell little"
    if report["noise"]:
        noise = report["noise"]
        yield f"  asked again in another batch order, {noise['changed']} of {noise['rows']} answers differ"
    for rival in report["against"]:
        yield f"against {rival['name']}"
        yield from _aligned([(named(name), _difference(found)) for name, found in rival["metrics"].items()])
    yield from _similarity(report)
    yield from _labels(report)
    yield from _forgetting(report.get("forgetting"))
    yield from _judges(report)
    for note in report["notes"]:
        yield f"note: {note}"


def named(metric: str) -> str:
    """A metric's name for people."""
    return NAMES.get(metric, metric)


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _figure(found: Mapping[str, Any]) -> str:
    if found["estimate"] is None:
        return "nothing to measure"
    noise = found.get("noise")
    left = f", {found['left_out']} rows left out" if found.get("left_out") else ""
    floor = f", batching moves it by {noise['floor']:.3f}" if noise and noise["floor"] else ""
    return f"{shown(found['estimate'])}  [{shown(found['low'])}, {shown(found['high'])}]{floor}{left}"


def _difference(found: Mapping[str, Any]) -> str:
    if found["estimate"] is None:
        return "nothing to compare"
    interval = f"[{found['low']:+.3f}, {found['high']:+.3f}]"
    return f"{found['estimate']:+.3f}  {interval}, p {found['p']:.3g} (there {shown(found['rival'])})"


def _similarity(report: Mapping[str, Any]) -> Iterator[str]:
    found = report["similarity"]
    if not found:
        return
    yield "by similarity to the nearest training row"
    for name, part in found["bins"].items():
        figure = _figure(part["metrics"][report["primary"]]) if "metrics" in part else ""
        yield f"  {name:<7} {part['rows']:>6,} rows, {part['clusters']:,} clusters  {figure}".rstrip()
    yield f"  for a verdict: {found['verdict_bin'] or 'cannot tell'} ({found['why']})"


def _labels(report: Mapping[str, Any]) -> Iterator[str]:
    table: Sequence[Mapping[str, Any]] = report.get("labels") or ()
    if not table:
        return
    width = min(28, max(len(printable(row["label"])) for row in table))
    yield f"{'label':<{width}}  {'rows':>6}  {'given':>6}  precision  recall     F1"
    for row in table[:MOST_LABELS]:
        name = printable(row["label"])[:width]
        yield (
            f"{name:<{width}}  {row['rows']:>6,}  {row['given']:>6,}  {row['precision']:>9.3f}  {row['recall']:>6.3f}  "
            f"{row['f1']:>5.3f}"
        )
    if len(table) > MOST_LABELS:
        yield f"  and {len(table) - MOST_LABELS:,} more labels: --html and --json have all"
    if len(table) <= WIDEST_TABLE:
        yield from _confusion(report["confusion"], width)


def _confusion(pairs: Sequence[Mapping[str, Any]], width: int) -> Iterator[str]:
    names, columns, counts = matrix(pairs)
    heads = [label_name(name)[:8] for name in columns]
    yield "wanted below, given on the right"
    yield f"{'':<{width}}  " + " ".join(f"{head:>8}" for head in heads)
    for name, row in zip(names, counts, strict=True):
        yield f"{printable(name)[:width]:<{width}}  " + " ".join(f"{count or '.':>8}" for count in row)


def _forgetting(found: Mapping[str, Any] | None) -> Iterator[str]:
    if not found:
        return
    ratio, kl = found["perplexity_ratio"], found["mean_kl"]
    yield found["sentence"]
    yield f"  perplexity times {shown(ratio['estimate'])} [{shown(ratio['low'])}, {shown(ratio['high'])}], mean KL " + (
        f"{shown(kl['estimate'])} nats [{shown(kl['low'])}, {shown(kl['high'])}]"
    )
    if found["advice"]:
        yield f"  → {found['advice']}"


def _judges(report: Mapping[str, Any]) -> Iterator[str]:
    if score := report.get("gptscore"):
        of_expected = shown(score["of_expected"])
        yield f"GPTScore by {score['evaluator']}: {score['warning']}; of the expected answers {of_expected}"
    judge = report.get("judge") or {"against": {}}
    for name, found in judge["against"].items():
        yield f"{judge['model']} judged {found['rows']:,} rows against {name}, each in both orders"
        yield f"  win rate {_figure(found['win_rate'])}"
        bias = found["position_bias"]
        leaning = "-" if bias is None else f"{bias:+.3f}"
        yield f"  position bias {leaning}, {found['undecided']} rows judged differently in the two orders"
        if found["invalid_replies"] or found["errors"]:
            yield f"  {found['invalid_replies']} replies were no vote, {found['errors']} requests failed"


def _aligned(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    for name, text in rows:
        yield f"  {name:<20} {text}"
