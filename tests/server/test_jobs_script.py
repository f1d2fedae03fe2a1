"""The script of docs/jobs.md, as it stands there, against vLLM on the embedded base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples.agent_routing.data import ENGLISH, make
from tests.conftest import CONTEXT_TOKENS, SLOTS, STAGED_LIMIT
from tests.fixtures.borrowed import BorrowedEngine
from tests.fixtures.engines import EngineRig
from tests.fixtures.service import running
from tests.test_docs import ROOT, blocks

ROWS = 16
URL = "http://127.0.0.1:8000/v1"


@pytest.mark.model
def test_the_script_of_the_docs_trains_and_asks_the_model_that_it_made(
    vllm_engine: EngineRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make(ENGLISH).splits["train"]
    for name, some in (("train.jsonl", rows[:ROWS]), ("more.jsonl", rows[ROWS : 2 * ROWS])):
        data = "".join(json.dumps(row.as_chat()) + "\n" for row in some)
        (tmp_path / name).write_text(data, "utf-8")
    monkeypatch.chdir(tmp_path)
    script = next(iter(blocks(ROOT / "docs" / "jobs.md", ("python",))))
    assert URL in script
    limits = {"slots": SLOTS, "staged_limit": STAGED_LIMIT, "context_length_tokens": CONTEXT_TOKENS}
    with running(vllm_engine.base, tmp_path, on=BorrowedEngine(vllm_engine, tmp_path / "run"), **limits) as server:
        assert server.base.id in script
        names: dict[str, Any] = {}
        exec(compile(script.replace(URL, f"{server.url}/v1"), "docs/jobs.md", "exec"), names)  # noqa: S102
        names["client"].close()
        said = capsys.readouterr().out
        assert "the fine-tuned model is support-router@1" in said
        assert "\nsupport-router@1 " in said and "\nsupport-router@2 " in said
        row = server.http.get("/v1/adapters/support-router/versions/2").json()
        assert (row["status"], row["aliases"], row["parent"]) == ("ready", ["stable"], "support-router@1")
    vllm_engine.unload_all()
