"""`POST /v1/adapters?dry_run=true` and `hotshoe push --check`: what an upload would become, with nothing kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from server.cli.main import build_app
from tests.adapters.test_mlx import write_mlx
from tests.fixtures.adapters import write_adapter
from tests.fixtures.service import Server

runner = CliRunner()


def post(server: Server, folder: Path, weights: str = "adapter_model.safetensors") -> httpx.Response:
    files = {part: (folder / file).read_bytes() for part, file in
             (("config", "adapter_config.json"), ("weights", weights))}  # fmt: skip
    return server.http.post("/v1/adapters?dry_run=true", data={"name": "router"}, files=files)


def is_empty(server: Server) -> bool:
    adapters = server.http.get("/v1/adapters").json()["data"]
    return adapters == [] and server.services.store.digests() == set() and server.services.store.leftovers() == []


def test_a_dry_run_says_what_the_upload_would_become_and_keeps_nothing(server: Server, tmp_path: Path) -> None:
    answers = [
        post(server, write_adapter(tmp_path / "fits", server.base)).json(),
        post(server, write_mlx(tmp_path / "mlx", server.base), "adapters.safetensors").json(),
        post(server, write_adapter(tmp_path / "dora", server.base, config={"use_dora": True})).json(),
    ]
    assert [answer["verdict"] for answer in answers] == ["accept", "convert", "export_only"]
    assert [answer["status"] for answer in answers] == ["quarantined", "quarantined", "export_only"]
    assert answers[0]["digest"].startswith("sha256:")
    assert is_empty(server)


def test_a_dry_run_refuses_with_the_reasons_of_the_upload_and_leaves_no_row(server: Server, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, server.base, fill=(float("nan"), 1.0))
    answer = post(server, folder)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "non_finite")
    assert len(answer.json()["error"]["problems"]) == len(server.base.shapes)
    assert is_empty(server)


def test_push_check_says_the_same_and_exits_with_3_when_it_would_be_refused(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOTSHOE_URL", str(server.http.base_url))
    mlx = write_mlx(tmp_path / "mlx", server.base)
    (mlx / "README.md").write_text("x")
    result = runner.invoke(build_app(), ["push", str(mlx), "--name", "router", "--check"])
    assert result.exit_code == 0
    assert "convert: it would be quarantined, 14 modules, rank 4" in result.stdout  # beside the server's own log
    assert "left out: README.md" in result.stdout
    result = runner.invoke(build_app(), ["push", str(mlx), "--name", "router", "--check", "--json"])
    found, _ = json.JSONDecoder().raw_decode(result.stdout[result.stdout.index("{\n") :])
    assert found["reasons"][0]["code"] == "converted"
    other = write_adapter(tmp_path / "other", server.base, config={"r": "8", "surprise": 1})
    result = runner.invoke(build_app(), ["push", str(other), "--name", "router", "--check"])
    assert isinstance(result.exception, Exception)
    assert {problem.path for problem in result.exception.problems} == {"config.r", "config.surprise"}
    assert is_empty(server)


def test_a_push_says_which_setting_would_make_an_export_only_version_servable(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOTSHOE_URL", str(server.http.base_url))
    folder = write_adapter(tmp_path / "dora", server.base, config={"use_dora": True})
    result = runner.invoke(build_app(), ["push", str(folder), "--name", "dora"])
    assert result.exit_code == 0
    assert "dora@1 is export_only" in result.stdout
    assert "not_servable  config.use_dora" in result.stdout
    assert "Train with use_dora=False to serve it." in result.stdout
    server.http.delete("/v1/adapters/dora/versions/1")


def test_u17_a_value_that_overflows_in_the_dtype_the_engine_serves_in_is_refused(
    make_server: Callable[..., Server], tmp_path: Path
) -> None:
    server = make_server(dtype="float16")
    folder = write_adapter(tmp_path / "large", server.base, fill=(1e5, 1.0))
    answer = post(server, folder)
    assert answer.json()["error"]["code"] == "non_finite"
    assert "overflows in the serving dtype (largest 65504)" in answer.json()["error"]["message"]
    server.stop()
    assert post(make_server(dtype="bfloat16"), folder).json()["verdict"] == "accept"
