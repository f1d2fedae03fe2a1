"""A merged version on the real engine answers what base + adapter answers there, under the same name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapters.bases import BaseModel
from server.engine.base import EngineAdapter
from tests.fixtures.engines import EngineRig
from tests.fixtures.service import Server, error_of, eventually, running

PROMPTS = ("The quick brown fox", "Once upon a time", "1, 2, 3,", "Dear customer,")


def answers(one: Any, model: str) -> list[str]:
    """Greedy answers to the prompts, by a server's or an engine's own HTTP."""
    bodies = [{"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 24} for prompt in PROMPTS]
    replies = [one.post("/v1/completions", json=body).json() for body in bodies]
    assert {reply["model"] for reply in replies} == {model}, replies
    return [reply["choices"][0]["text"] for reply in replies]


@pytest.mark.long  # a second engine
def test_a_merged_version_answers_as_base_and_adapter_do(
    vllm_engine: EngineRig, embedded_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOTSHOE_CACHE", str(tmp_path / "cache"))
    with running(embedded_base, tmp_path) as server:
        folder = server.adapter()
        row = server.push("router", folder).json()
        assert row["status"] == "ready", row
        files = server.services.store.folder(row["digest"])
    vllm_engine.call(vllm_engine.engine.load(EngineAdapter("router@1", files, 900)))
    expected = answers(vllm_engine.http, "router@1")
    assert expected != answers(vllm_engine.http, embedded_base.id), "the adapter changes nothing: it proves nothing"
    vllm_engine.unload_all()

    settings: dict[str, Any] = {"engine": "vllm", "kv_cache_bytes": 256 << 20}
    arguments = ("--enforce-eager",)  # compiling takes minutes
    with running(
        embedded_base, tmp_path, is_ready=False, merged="router@1", engine_args=arguments, **settings
    ) as server:
        eventually(lambda: server.http.get("/ready").status_code == 200, 300)
        assert answers(server.http, "router@1") == expected
        check_surface(server, embedded_base)


def check_surface(server: Server, base: BaseModel) -> None:
    """Names, metrics, memory and refusals are those of any server."""
    assert server.http.post("/v1/completions", json={"model": "router", "prompt": "Hi"}).json()["model"] == "router@1"
    assert server.metric("hotshoe_requests_total", model="router@1", outcome="completed") == len(PROMPTS) + 1
    assert error_of(server.say(base.id))["code"] == "not_servable"
    counted = server.http.post("/tokenize", json={"prompt": "hello"})
    assert counted.json()["count"] >= 1, counted.text
    system = server.http.get("/v1/system").json()
    assert system["engine"]["slots"] == 0
    assert [row["place"] for row in system["adapters"]] == ["merged"]
    computed = system["memory"]["places"][0]["computed"]
    assert (computed["slots"], computed["packed"], computed["stage"]) == (0, 0, 0)
    assert computed["weights"] == system["memory"]["weights_bytes"]
    assert server.services.engine.is_ready()
