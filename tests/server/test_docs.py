"""What the docs promise is what the code has: routes, error codes, metrics, settings."""

from __future__ import annotations

import re
from pathlib import Path

from server.access import ROUTES
from server.errors import STATUS
from server.metrics import OUTCOMES, Metrics
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


def test_every_metric_is_in_the_docs_with_its_type_and_labels() -> None:
    found = {
        (row[0].removesuffix("_total"), row[1], tuple(re.findall(r"\w+", row[2]))) for row in rows("http.md", "Metrics")
    }
    registry = Metrics(1).registry
    families = {family.name: family.type for family in registry.collect()}
    assert {(name, kind) for name, kind, _ in found} == set(families.items())
    labels = {name: names for name, _, names in found}
    for collector in registry._collector_to_names:
        assert labels[collector._name] == tuple(collector._labelnames), collector._name  # type: ignore[attr-defined]


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
