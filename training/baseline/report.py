"""The report of a baseline: what was measured before training, and the verdict after it, in one JSON document."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.durable import replace_file
from adapters.errors import ConfigInvalid, OutputExists

FORMAT = 1
KIND = "baseline"


def read(path: Path) -> dict[str, Any] | None:
    """The report in a file; None where there is no file, and OutputExists where it is something else.

    Raises ConfigInvalid where there is no folder to write it into.
    """
    if not path.exists():
        if not path.absolute().parent.is_dir():
            raise ConfigInvalid(f"There is no folder {path.parent} to write the report into.", param="report")
        return None
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise OutputExists(f"{path} is no report of a baseline: name another file with --report.", param="report")
    if found.get("format") != FORMAT:
        raise OutputExists(
            f"{path} is a report of format {found.get('format')!r}, and this release writes format {FORMAT}: name "
            "another file with --report.",
            param="report",
        )
    return found


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Write the report whole or not at all; raises ConfigInvalid where it cannot be written."""
    text = json.dumps(report, ensure_ascii=False, indent=2, allow_nan=False)
    try:
        replace_file(path, f"{text}\n".encode())
    except OSError as error:
        raise ConfigInvalid(f"The report cannot be written to {path}: {error}.", param="report") from error


def difference_from(report: Mapping[str, Any], facts: Mapping[str, Any]) -> str | None:
    """What the report is about otherwise than this: the first of base, template, data and task; None if nothing."""
    for name in ("base", "task"):
        if report.get(name) != facts[name]:
            return name
    for name, now in facts["data"].items():
        if report["data"][name]["digest"] != now["digest"]:
            return f"{name} data"
    return None


def summary(path: Path) -> dict[str, Any]:
    """What a run's card says of a baseline: the best prompt, the rivals and the verdict, without texts of rows."""
    try:
        found = read(path)
    except OutputExists as error:
        raise ConfigInvalid(
            f"{path} is no report of `hotshoe baseline` that this release reads.", param="report"
        ) from error
    if found is None:
        raise ConfigInvalid(f"There is no report {path}: make one with `hotshoe baseline`.", param="report")
    if not found["is_finished"]:
        raise ConfigInvalid(f"{path} is not finished: run `hotshoe baseline` again, which goes on.", param="report")
    metric = found["task"]["metric"]
    return {
        "made_at": found["made_at"],
        "base": found["base"],
        "data": found["data"],
        "metric": metric,
        "margin": found["settings"]["margin"],
        "prompts": [
            {"name": one["name"], **one["figures"][metric], "prompt_tokens": one["prompt_tokens"]["mean"]}
            for one in found["prompts"]
        ],
        "best_prompt": found["best"]["name"],
        "rivals": [
            {key: rival[key] for key in ("name", "title", "gives", "figure", "is_enough")} for rival in found["rivals"]
        ],
        "no_rivals": found["no_rivals"],
        "said": found["said"],
        "verdict": found["verdict"],
    }


def lines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(kind, line) for the terminal; a kind is plain, good, bad or open."""
    metric = report["task"]["metric"]
    data = report["data"]
    made = [
        (
            "plain",
            f"{report['base']['id']}, {report['form']}: {metric} on {data['validation']['rows']:,} validation rows",
        )
    ]
    for one in report["prompts"]:
        mark = "*" if one["name"] == report["best"]["name"] else " "
        tokens = f"{one['prompt_tokens']['mean']:,.0f} tokens"
        made.append(("plain", f"  {mark} {_figure(one['figures'][metric])}  {one['name']}, {tokens}"))
    for rival in report["rivals"]:
        of_label = "" if rival["gives"] == "answer" else ", the label alone"
        made.append(("plain", f"    {_figure(rival['figure'])}  {rival['title']}{of_label}"))
    made += [("plain", line) for line in report["said"]]
    verdict = report.get("verdict")
    if verdict is not None:
        made += _verdict_lines(verdict, metric)
    return made


def _verdict_lines(verdict: Mapping[str, Any], metric: str) -> list[tuple[str, str]]:
    kind = {"worth_it": "good", "not_worth_it": "bad", "cannot_tell": "open"}[verdict["verdict"]]
    made = [
        ("plain", f"{verdict['adapter']['name']}: {metric} on {verdict['data']['rows']:,} test rows"),
        ("plain", f"    {_figure(verdict['figures']['adapter'])}  the adapter, {verdict['form']}"),
        ("plain", f"    {_figure(verdict['figures']['prompt'])}  the best prompt"),
    ]
    for rival in verdict["rivals"]:
        of_label = "" if rival["gives"] == "answer" else ", the label alone"
        made.append(("plain", f"    {_figure(rival['figure'])}  {rival['title']}{of_label}"))
    made += [("plain", line) for line in verdict["said"][1:]]
    made.append((kind, f"{verdict['verdict'].replace('_', ' ')}: {verdict['said'][0]}"))
    return made


def _figure(value: Mapping[str, Any]) -> str:
    if value.get("estimate") is None:
        return "no figure"
    return f"{value['estimate']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
