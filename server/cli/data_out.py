"""`hotshoe data split` and `hotshoe data clean`: other files made of a data file, which itself stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.output import print_json

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Data = Annotated[Path, typer.Argument(help="JSONL, JSON, CSV or Parquet, or a folder of them.")]
OwnColumns = Annotated[
    str | None, typer.Option("--columns", help="Your own column names, as prompt=Question,completion=Answer.")
]
LABELS_SHOWN = 40


def split(
    data: Data,
    out: Annotated[Path, typer.Option(help="The folder to write: train.jsonl, validation.jsonl, test.jsonl.")],
    by: Annotated[
        str,
        typer.Option(help="What stays together: template, conversation, label, file, or group:COLUMN."),
    ] = "template",
    test_share: Annotated[float, typer.Option(help="Share of the rows to test on.")] = 0.1,
    validation_share: Annotated[float, typer.Option(help="Share of the rows to validate on.")] = 0.1,
    seed: Annotated[int, typer.Option(help="The same seed and data give the same split.")] = 0,
    twins: Annotated[
        str, typer.Option(help="Rows that are nearly the same: together, whatever --by is, or apart.")
    ] = "together",
    columns: OwnColumns = None,
    as_json: AsJson = False,
) -> None:
    """Training, validation and test rows of which none stands, or nearly stands, in another; labels in their shares."""
    from training.config_file import split_list
    from training.split.run import SplitAsked
    from training.split.run import split as make

    asked = SplitAsked(data, out, by, test_share, validation_share, seed, split_list(columns or ""), twins)
    report = make(asked)
    if as_json:
        print_json(report)
        return
    for line in _split_lines(report, out):
        typer.echo(line)


def _split_lines(report: Mapping[str, Any], out: Path) -> Iterator[str]:
    rows = report["rows"]
    yield f"{report['data']} by {report['by']}, seed {report['seed']}, into {out}"
    widest = max(map(len, (*list(report.get("labels", {}))[:LABELS_SHOWN], "groups"))) + 2
    yield " " * widest + "".join(f"{name:>12}" for name in rows)
    labels = list(report.get("labels", {}).items())
    for label, counts in labels[:LABELS_SHOWN]:
        yield f"{label:<{widest}}" + "".join(f"{counts[name]:>12,}" for name in rows)
    if len(labels) > LABELS_SHOWN:
        yield f"… and {len(labels) - LABELS_SHOWN:,} more labels; split.json has them"
    yield f"{'rows':<{widest}}" + "".join(f"{count:>12,}" for count in rows.values())
    yield f"{'groups':<{widest}}" + "".join(f"{report['groups'][name]:>12,}" for name in rows)
    for name, missing in report.get("labels_missing", {}).items():
        yield f"without any row in {name}: {', '.join(missing[:10])}" + ("…" if len(missing) > 10 else "")
    if report["moved_rows"]:
        yield f"{report['moved_rows']:,} rows moved to train: they stood in pieces in rows there"
    for name, kinds in report["leaks"].items():
        counted = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count)
        yield f"{name} rows that stand in an earlier split: {counted or 'none'}"
