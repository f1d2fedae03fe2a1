"""The engine's answers held against PEFT's, in the child that a server starts: the figures go into the proof."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters.bases import BaseModel, load_base
from adapters.publish import PublishContext, publish
from adapters.registry import Registry
from adapters.store import BlobStore
from adapters.types import AdapterVersion, VersionStatus
from server.agreement import Agreement
from server.restoring import key_of
from tests.fixtures.adapters import write_adapter
from tests.fixtures.bases import tiny_qwen2
from tests.fixtures.service import Server

IDS = list(b"served by an engine")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base(tiny_qwen2(tmp_path_factory.mktemp("base") / "tiny-qwen2"))


@pytest.fixture
def context(tmp_path: Path, base: BaseModel) -> Iterator[PublishContext]:
    registry = Registry.open(tmp_path / "home")
    yield PublishContext(registry, BlobStore(tmp_path / "home" / "blobs"), base, max_rank=64)
    registry.close()


def said_by_peft(base: BaseModel, adapter: Path) -> list[dict[str, Any]]:
    """What a right engine answers, as `read_answer` gives it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.folder), adapter).eval()
    with torch.no_grad():
        rows = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
    return [{"ids": IDS, "top": [{t: float(row[t]) for t in row.topk(5).indices.tolist()} for row in rows[:-1]]}]


def compared(
    context: PublishContext, version: AdapterVersion, served: list[dict[str, Any]], free_bytes: int = 1 << 40
) -> dict[str, Any]:
    """The version's proof after a worker with this engine and this memory has looked at it."""

    async def ask(_: AdapterVersion) -> list[dict[str, Any]]:
        return served

    worker = Agreement(context.registry, context.store, context.base, ask, True, lambda: free_bytes)
    asyncio.run(worker.compare(version))
    proof = context.registry.get(*key_of(version)).proof
    assert proof is not None
    return dict(proof)


def test_a_proof_says_how_far_the_engine_is_from_peft_where_there_is_memory_to_ask(
    context: PublishContext, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "adapter", context.base, scale=0.2)
    version = publish(folder, "router", context=context)
    proof = {"is_proven": True, "code": "proven", "shows": ["effect"]}
    context.registry.set_status(*key_of(version), VersionStatus.READY, proof=proof)
    served = said_by_peft(context.base, folder)
    served[0]["top"][3] = {token: value - 0.5 for token, value in served[0]["top"][3].items()}
    assert compared(context, version, [])["shows"] == ["effect"], "an engine that says nothing shows nothing"
    assert compared(context, version, served, free_bytes=10**9)["shows"] == ["effect"]
    found = compared(context, version, served)
    assert found["shows"] == ["effect", "agreement"] and found["peft"]["positions"] == len(IDS) - 1
    assert found["peft"]["max_abs"] == pytest.approx(0.5, abs=0.01)
    assert found["peft"]["mean_abs"] == pytest.approx(0.5 / (len(IDS) - 1), rel=0.02), "the others are as PEFT's"


def test_a_server_that_wants_it_asks_its_engine_and_one_whose_engine_cannot_say_goes_on(
    make_server: Callable[..., Server],
) -> None:
    server = make_server(compare_with_peft=True)
    assert server.pushed("router")["proof"]["shows"] == ["effect"]
    assert server.say("router").status_code == 200
