"""Servers over the scripted engine, open and with a key, that a module's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from adapters.bases import BaseModel
from tests.conftest import CONTEXT_TOKENS, SLOTS, STAGED_LIMIT
from tests.fixtures.borrowed import BorrowedEngine
from tests.fixtures.engines import EngineRig
from tests.fixtures.service import Server, running

KEY = "a-key-of-the-surface"


@pytest.fixture(scope="module")
def server(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_base, tmp_path_factory.mktemp("open")) as one:
        yield one


@pytest.fixture(scope="module")
def keyed(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_base, tmp_path_factory.mktemp("keyed"), api_key=KEY) as one:
        yield one


@pytest.fixture(scope="module")
def on_vllm(vllm_engine: EngineRig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A whole server, with a key, over the session's real engine."""
    scratch = tmp_path_factory.mktemp("on-vllm")
    limits: dict[str, Any] = {"slots": SLOTS, "staged_limit": STAGED_LIMIT, "context_length_tokens": CONTEXT_TOKENS}
    with running(
        vllm_engine.base, scratch, on=BorrowedEngine(vllm_engine, scratch / "run"), api_key=KEY, **limits
    ) as one:
        yield one
