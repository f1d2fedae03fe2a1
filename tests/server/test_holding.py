"""U19 on a server: an update far larger than its base is kept, not proven, until the operator raises the limit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapters.bases import load_base
from adapters.errors import AdapterRefused
from server.cli.main import build_app
from tests.fixtures.adapters import write_adapter
from tests.fixtures.bases import tiny_qwen2
from tests.fixtures.service import Server, eventually


def test_u19_a_huge_update_is_served_once_the_operator_allows_its_size(
    make_server: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(tiny_qwen2(tmp_path / "whole"))
    folder = write_adapter(tmp_path / "huge", base, alpha=1e5)
    server = make_server(base)
    monkeypatch.setenv("HOTSHOE_URL", str(server.http.base_url))
    result = CliRunner().invoke(build_app(), ["push", str(folder), "--name", "huge"])
    assert isinstance(result.exception, AdapterRefused)
    assert "kept and not served" in str(result.exception)
    row = server.http.get("/v1/adapters/huge/versions/1?wait=5").json()
    assert (row["status"], row["reasons"][0]["code"], row["is_held"]) == ("quarantined", "update_too_large", True)
    server.stop()

    server = make_server(base)
    assert server.http.get("/v1/adapters/huge/versions/1?wait=2").json()["status"] == "quarantined"
    server.stop()
    server = make_server(base, max_update_ratio=1e9)
    monkeypatch.setenv("HOTSHOE_URL", str(server.http.base_url))
    again = CliRunner().invoke(build_app(), ["push", str(folder), "--name", "huge"])
    assert (again.exit_code, again.exception) == (0, None)
    row = server.http.get("/v1/adapters/huge/versions/1").json()
    assert (row["status"], row["is_held"]) == ("ready", False)


def test_u19_what_was_out_for_its_rank_is_measured_before_it_is_proven(
    make_server: Callable[..., Server], tmp_path: Path
) -> None:
    base = load_base(tiny_qwen2(tmp_path / "whole"))
    server = make_server(base, max_rank=4)
    assert server.push("huge", server.adapter(alpha=1e5, rank=8)).json()["status"] == "export_only"
    server.stop()
    server = make_server(base)
    shown = "/v1/adapters/huge/versions/1"
    eventually(lambda: server.http.get(shown).json()["status"] == "quarantined")  # it is tried again by and by
    row = server.http.get(shown).json()
    assert (row["status"], row["reasons"][0]["code"], row["is_held"]) == ("quarantined", "update_too_large", True)
