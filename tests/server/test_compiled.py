"""The engine with vLLM's compilation kept on: the answers of the eager one, compiled anew and from the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.bases import BaseModel
from server.engine.base import EngineAdapter
from server.engine.vllm import VllmEngine
from tests.conftest import engine_options
from tests.fixtures.adapters import write_adapter
from tests.fixtures.engines import EngineRig
from tests.fixtures.reference import assert_same_greedy
from tests.server.test_mixed_batch import PROMPTS

pytestmark = [pytest.mark.model, pytest.mark.long, pytest.mark.timeout(3000)]
RANKS = (4, 16, 64, 8)


def answers(rig: EngineRig, adapters: list[EngineAdapter]) -> list[dict[str, Any]]:
    """Base and four adapters in one batch, then the same requests one by one."""
    rig.unload_all()
    for adapter in adapters:
        rig.call(rig.engine.load(adapter))
    models = [rig.base.id, *(adapter.engine_name for adapter in adapters)]
    asked = [
        {"model": model, "prompt": prompt, "max_tokens": 16, "logprobs": 5, "ignore_eos": True}
        for model, prompt in zip(models, PROMPTS, strict=True)
    ]
    found = [*rig.complete_together(asked), *(rig.complete(**request).json() for request in asked)]
    rig.unload_all()
    return found


def test_a_compiled_engine_answers_as_the_eager_one_does_also_from_its_cache(
    vllm_engine: EngineRig, embedded_base: BaseModel, tmp_path: Path
) -> None:
    adapters = [
        EngineAdapter(
            f"compiled-{rank}@1",
            write_adapter(tmp_path / f"r{rank}", embedded_base, rank=rank, alpha=2 * rank, scale=0.05, seed=rank),
            9_000 + rank,
        )
        for rank in RANKS
    ]
    eager = answers(vllm_engine, adapters)
    for start, said in (("first", "saved AOT compiled function"), ("second", "Directly load AOT compilation")):
        folder = tmp_path / start
        folder.mkdir()
        env = {"HOTSHOE_LORA_COMPILE": "1", "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
        rig = EngineRig(
            VllmEngine(replace(engine_options(embedded_base, folder / "run"), env=env)), embedded_base, folder
        )
        try:
            rig.call(rig.engine.start())
            compiled = answers(rig, adapters)
        finally:
            rig.close()
        for ours, expected in zip(compiled, eager, strict=True):
            assert_same_greedy(ours, expected)
        assert said in (folder / "run" / "engine.log").read_text(), start
