"""What the docs promise is what the code has: routes, error codes, metrics, settings."""

from __future__ import annotations

import re
from pathlib import Path

from adapters.file_rows import PURPOSES
from adapters.types import VersionStatus
from server.access import ROUTES
from server.errors import STATUS
from server.memory_watch import GPU, MAIN, PARTS
from server.metrics import NO_MODEL, OTHER, OUTCOMES, Metrics
from server.residency import Residency
from server.settings import Settings

DOCS = Path(__file__).parents[2] / "docs"


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    text = (DOCS / page).read_text().split(f"\n## {heading}\n", 1)[1]
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert table, heading
    lines = table.group().splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_route_is_in_the_docs_with_its_scope() -> None:
    assert [row[:2] for row in rows("http.md", "Routes")] == [
        [f"{route.method} {route.path}", route.scope or "public"] for route in ROUTES
    ]


def test_every_error_code_is_in_the_docs_with_its_status_and_type() -> None:
    found = {(int(row[0]), row[1], row[2]) for row in rows("http.md", "Errors")}
    assert found == {(status, kind.code, name) for kind, (status, name) in STATUS.items()}


def test_every_metric_is_in_the_docs_with_its_type_labels_and_meaning() -> None:
    found = [
        (row[0].removesuffix("_total"), row[1], tuple(re.findall(r"\w+", row[2])), row[3])
        for row in rows("http.md", "Metrics")
    ]
    registry = Metrics(1).registry
    labels = {metric._name: tuple(metric._labelnames) for metric in registry._collector_to_names}  # type: ignore[attr-defined]
    families = [(family.name, family.type, labels[family.name], family.documentation) for family in registry.collect()]
    assert sorted(found) == sorted(families), "one row for each family, and one family for each row"


def test_every_value_of_a_metrics_fixed_label_is_in_the_docs() -> None:
    text = (DOCS / "http.md").read_text().split("\n## Metrics\n", 1)[1].split("\n## ", 1)[0]
    residencies = [residency for residency in Residency if residency is not Residency.ABSENT]
    for value in (*VersionStatus, *residencies, *PURPOSES, *PARTS, MAIN, GPU, "usage", "events", OTHER, NO_MODEL):
        assert f"`{value}`" in text, value


def test_every_outcome_is_explained() -> None:
    text = (DOCS / "http.md").read_text()
    assert all(f"`{outcome}`" in text for outcome in OUTCOMES)


def test_every_setting_is_in_the_docs_with_its_default() -> None:
    found = {row[0]: row[1] for row in rows("operations.md", "Settings")}
    fields = Settings.model_fields
    assert list(found) == [f"HOTSHOE_{name.upper()}" for name in fields]
    for name, field in fields.items():
        if name != "home":
            shown = "-" if field.default in (None, ()) else str(field.default)
            assert found[f"HOTSHOE_{name.upper()}"] == shown, name
    assert all(
        row[2] == fields[row[0].removeprefix("HOTSHOE_").lower()].description
        for row in rows("operations.md", "Settings")
    )
