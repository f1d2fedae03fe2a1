"""What the whole session shares: the embedded base and one real engine on it. Starting vLLM takes half a minute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.bases import BaseModel, load_base
from server.engine.base import EngineOptions
from tests.fixtures.adapters import shape_only_base
from tests.fixtures.engines import EngineRig

# Three slots: with its spare one the engine has four, so that four adapters fill every slot.
SLOTS, STAGED_LIMIT, MAX_RANK, CONTEXT_TOKENS, KV_CACHE_BYTES = 3, 6, 64, 2048, 384 << 20


@pytest.fixture(scope="session")
def embedded_base() -> BaseModel:
    """The base that ships, prepared in the user's cache when it is not there yet."""
    from adapters.embedded import default_base

    return load_base(default_base())


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A two-layer base without weights: enough for a server on the scripted engine."""
    return shape_only_base(tmp_path_factory.mktemp("base") / "tiny")


def engine_options(base: BaseModel, run_dir: Path) -> EngineOptions:
    return EngineOptions(
        base_folder=base.folder,
        base_id=base.id,
        run_dir=run_dir,
        slots=SLOTS,
        max_rank=MAX_RANK,
        staged_limit=STAGED_LIMIT,
        context_length_tokens=CONTEXT_TOKENS,
        kv_cache_bytes=KV_CACHE_BYTES,
        extra_args=("--enable-prompt-tokens-details",),
    )


@pytest.fixture(scope="session")
def vllm_engine(embedded_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineRig]:
    """vLLM on the embedded base, the one real engine of the session. Unload what a test loaded (`rig.unload_all()`)."""
    from server.engine.vllm import VllmEngine

    scratch = tmp_path_factory.mktemp("vllm")
    rig = EngineRig(VllmEngine(engine_options(embedded_base, scratch / "run")), embedded_base, scratch)
    try:
        rig.call(rig.engine.start())
        yield rig
    finally:
        rig.close()
