"""Alerts are about metrics that exist, are well-formed, and each has its heading in docs/operations.md."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from server.metrics import OUTCOMES, Metrics

ROOT = Path(__file__).resolve().parent.parent.parent
DEPLOY = ROOT / "deploy"
RULES: list[dict[str, Any]] = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]
# `up` and `instance` are Prometheus' own, `job` is prometheus.yml's.
SCRAPED = {"job", "instance"}


def series() -> dict[str, set[str]]:
    """Every name that /metrics can show, with its labels."""
    found: dict[str, set[str]] = {"up": set()}
    for metric in Metrics(10).registry._collector_to_names:
        kind, name = metric._type, metric._name  # type: ignore[attr-defined]
        labels = set(metric._labelnames)  # type: ignore[attr-defined]
        names = {"counter": [f"{name}_total"], "histogram": [f"{name}_{part}" for part in ("bucket", "sum", "count")]}
        for one in names.get(kind, [name]):
            found[one] = labels | ({"le"} if one.endswith("_bucket") else set())
    return found


def selectors(expression: promql_parser.Expr) -> Iterator[promql_parser.VectorSelector]:
    """Every selector in an expression."""
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression
    for name in ("lhs", "rhs", "expr", "vector_selector", "args", "param"):
        inner = getattr(expression, name, None)
        for one in inner if isinstance(inner, list) else [inner]:
            if one is not None and not isinstance(one, str):
                yield from selectors(one)


def test_the_rules_are_read_at_all() -> None:
    assert len(RULES) > 10
    assert series()["hotshoe_time_to_first_token_seconds_bucket"] == {"model", "le"}
    found = list(selectors(promql_parser.parse('sum(rate(a{b="c"}[5m])) / (d or e offset 1m) > 1')))
    assert [one.name for one in found] == ["a", "d", "e"]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_an_alert_asks_for_metrics_and_labels_that_exist(rule: dict[str, Any]) -> None:
    known = series()
    found = list(selectors(promql_parser.parse(rule["expr"])))
    assert found
    for selector in found:
        assert selector.name in known
        for matcher in selector.matchers.matchers:
            assert matcher.name in known[selector.name] | SCRAPED
    grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", rule["expr"]))))
    assert grouped <= set().union(*(known[one.name or ""] for one in found)) | SCRAPED


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_an_alert_asks_for_outcomes_that_are_counted(rule: dict[str, Any]) -> None:
    for selector in selectors(promql_parser.parse(rule["expr"])):
        if selector.name == "hotshoe_requests_total":
            for matcher in selector.matchers.matchers:
                assert matcher.name != "outcome" or set(matcher.value.split("|")) <= set(OUTCOMES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_an_alert_says_how_bad_it_is_and_what_it_saw(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    named = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
    assert named and named <= SCRAPED | {"place", "source", "outcome"}


def test_every_alert_has_its_heading_in_the_docs_and_every_heading_its_alert() -> None:
    section = (ROOT / "docs" / "operations.md").read_text().split("\n## Alerts and faults\n")[1].split("\n## ")[0]
    headings = re.findall(r"^### (\w+)$", section, re.MULTILINE)
    assert headings == [rule["alert"] for rule in RULES]
    for rule in RULES:
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        text = section.split(f"### {rule['alert']}\n")[1].split("\n### ")[0]
        assert len(text.split()) > 25


def test_links_between_alerts_lead_somewhere() -> None:
    section = (ROOT / "docs" / "operations.md").read_text().split("\n## Alerts and faults\n")[1].split("\n## ")[0]
    anchors = {rule["alert"].lower() for rule in RULES}
    assert set(re.findall(r"\(#(\w+)\)", section)) <= anchors


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_prometheus_itself_fires_and_keeps_quiet_as_meant() -> None:
    done = subprocess.run(
        ["promtool", "test", "rules", str(Path(__file__).with_name("alerts.test.yaml"))],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
