"""`hotshoe data split | clean | restore`: other files made of a data file, which itself stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.options import AsJson, ColumnNames, Data
from server.cli.output import print_json

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
    columns: ColumnNames = None,
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


def clean(
    data: Data,
    out: Annotated[Path, typer.Option(help="The JSONL file to write.")],
    mask: Annotated[
        str | None,
        typer.Option(help="Rules whose values become pseudonyms, with commas; default all of privacy but secret."),
    ] = None,
    drop: Annotated[
        str | None, typer.Option(help="Rules of the data check whose rows are left out; default secret.")
    ] = None,
    map_file: Annotated[
        Path | None, typer.Option("--map", help="Where key and values go, used again if there; default OUT.map.")
    ] = None,
    forget: Annotated[bool, typer.Option("--forget", help="Keep no map: nobody can go back.")] = False,
    columns: ColumnNames = None,
    as_json: AsJson = False,
) -> None:
    """A copy without private things: equal values become equal pseudonyms, which only the map's owner can turn back.

    The map (mode 0600) holds the key and each value: keep it away from the cleaned file, or nothing is private.
    """
    from training.cleaning.run import DROPPED, MASKED, CleanAsked
    from training.cleaning.run import clean as make
    from training.config_file import split_list

    dropped = DROPPED if drop is None else split_list(drop)
    masked = tuple(code for code in MASKED if code not in dropped) if mask is None else split_list(mask)
    report = make(CleanAsked(data, out, masked, dropped, map_file, forget, split_list(columns or "")))
    if as_json:
        print_json(report)
        return
    for line in _clean_lines(report):
        typer.echo(line)


def restore(
    data: Annotated[Path, typer.Argument(help="What `hotshoe data clean` made, or a part of it.")],
    map_file: Annotated[Path, typer.Option("--map", help="The map that was written with it.")],
    out: Annotated[Path, typer.Option(help="The JSONL file to write, its owner's alone.")],
    as_json: AsJson = False,
) -> None:
    """Put the values back in the place of their pseudonyms."""
    from training.cleaning.run import restore as put_back

    report = put_back(data, map_file, out)
    if as_json:
        print_json(report)
    else:
        typer.echo(f"{report['rows']:,} rows into {out}; {report['restored']:,} pseudonyms turned back")


def _clean_lines(report: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{report['data']}: {report['rows']:,} rows, {report['kept_rows']:,} kept, {report['changed_rows']:,} of them "
        f"changed, {report['dropped_rows']:,} dropped, into {report['out']}"
    )
    for code, counts in report["masked"].items():
        yield f"  masked  {code:<16} {counts['times']:,} times, {counts['values']:,} values, {counts['rows']:,} rows"
    for code, found in report["dropped"].items():
        yield f"  dropped {code:<16} {found['rows']:,} rows: {', '.join(found['places'][:5])}"
    for code, count in report["left"].items():
        yield f"  left    {code:<16} {count:,} times: in neither --mask nor --drop"
    if report["map"] is None:
        yield "no map was kept: nobody can go back"
    else:
        yield f"map: {report['map']} ({report['map_values']:,} values, mode 0600): it undoes all of this, keep it apart"
