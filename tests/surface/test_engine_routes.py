"""A4: each route that vLLM brings is either one of ours, with a scope, or is not there at all."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from server.access import ROUTES, Kind
from tests.fixtures.engines import EngineRig
from tests.fixtures.service import Server, error_of

KNOWN = Path(__file__).with_name("vllm_routes.txt")
PROXIED = {(route.method, route.path) for route in ROUTES if route.kind is Kind.PROXIED}


def known() -> list[tuple[str, str]]:
    """What vLLM 0.32 serves: a line `METHOD PATH` each."""
    return [(method, path) for method, path in map(str.split, KNOWN.read_text().splitlines())]


def is_ours(method: str, path: str) -> bool:
    """A request for it finds a route of our table."""
    return any(route.method == method and route.pattern.fullmatch(path) for route in ROUTES)


def concrete(path: str) -> str:
    return re.sub(r"\{\w+(:path)?\}", "x", path)


HIDDEN = [(method, path) for method, path in known() if not is_ours(method, concrete(path))]


@pytest.mark.model
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
def test_a4_a_route_that_vllm_gains_or_loses_is_noticed(vllm_engine: EngineRig) -> None:
    """Of the app as it is built for our flags, and of the running one's own document."""
    flags = vllm_engine.engine.flags  # type: ignore[attr-defined]
    quiet = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": ""}
    script = [sys.executable, str(KNOWN.with_suffix(".py")), *flags]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, env=quiet)
    assert done.returncode == 0, done.stderr[-2000:]
    built = {(method, path) for method, path in json.loads(done.stdout.splitlines()[-1])}
    document = vllm_engine.http.get("/openapi.json").json()["paths"]
    running = {(method.upper(), path) for path, methods in document.items() for method in methods}
    assert built | running - OURS == set(known())


OURS = {("GET", f"/hotshoe/{call}") for call in ("loaded", "usage", "capacity")} | {
    ("POST", f"/hotshoe/{call}") for call in ("load", "unload")
}


def test_a4_each_of_vllms_routes_is_forwarded_answered_by_us_or_hidden() -> None:
    assert set(known()) >= PROXIED
    assert len(HIDDEN) > 20 and not set(HIDDEN) & PROXIED
    assert {("POST", "/invocations"), ("POST", "/scale_elastic_ep"), ("GET", "/load")} <= set(HIDDEN)


@pytest.mark.parametrize(("method", "path"), [*HIDDEN, *sorted(OURS)], ids=lambda one: str(one))
def test_a4_what_is_hidden_is_not_there_with_a_key_and_tells_nothing_without(
    server: Server, keyed: Server, method: str, path: str
) -> None:
    """404 for whoever may ask; 405 where another method of the path is ours; without the key 401 whatever the path."""
    path = concrete(path)
    body = None if method in ("GET", "HEAD") else b"{}"
    expected = 405 if any(route.pattern.fullmatch(path) for route in ROUTES) else 404
    for answer in (keyed.http.request(method, path, content=body), server.http.request(method, path, content=body)):
        assert answer.status_code == expected, answer.text
        if path.startswith("/v1/messages"):
            assert answer.json()["error"]["type"] == "not_found_error"
        elif method != "HEAD":
            assert error_of(answer)["code"] in ("route_not_found", "method_not_allowed")
    assert httpx.request(method, f"{keyed.url}{path}", content=body).status_code == 401
