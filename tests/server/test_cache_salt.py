"""On the real engine: a prefix that one tenant's request left in the cache is no other tenant's."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from typing import Any

import pytest

from server.inference import read_request
from tests.fixtures.engines import EngineRig

pytestmark = pytest.mark.model
TEXT = "The lamp in the hall is on, and the one in the kitchen is off. " * 12
MESSAGES = [{"role": "user", "content": TEXT}]
FORMS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 1},
    "/v1/completions": {"prompt": TEXT, "max_tokens": 1},
    "/v1/responses": {"input": TEXT, "max_output_tokens": 1},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 1},
}


def cached_tokens(rig: EngineRig, path: str, model: str, salt: str) -> int:
    """What the engine reports for the bytes that the gateway sends it for a tenant with this salt."""
    raw = json.dumps({"model": model, **FORMS[path]}).encode()
    body = replace(read_request(path, raw, rig.base.id), cache_salt=salt).for_engine(model)
    answer = rig.http.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    if path == "/v1/messages":
        return int(usage.get("cache_read_input_tokens") or 0)
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


@pytest.mark.parametrize("path", FORMS)
def test_i4_no_cached_token_is_reported_across_tenants(vllm_engine: EngineRig, path: str) -> None:
    shared = vllm_engine.load("owner/shared@1", targets=("q_proj",)).engine_name
    try:
        for model in (vllm_engine.base.id, shared):
            acme, other = uuid.uuid4().hex, uuid.uuid4().hex
            first, again, foreign = (cached_tokens(vllm_engine, path, model, salt) for salt in (acme, acme, other))
            assert first == 0 and again > 100, "the cache works within one tenant"
            assert foreign == 0, "and only within it"
    finally:
        vllm_engine.unload_all()
