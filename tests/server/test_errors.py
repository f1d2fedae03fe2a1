from __future__ import annotations

import importlib
import json
import pkgutil

import pytest

import adapters
import server
from adapters.errors import EngineBusy, HotshoeError, NotServable
from server.errors import STATUS, from_engine, to_wire, unexpected


def every_class(root: type[HotshoeError] = HotshoeError) -> set[type[HotshoeError]]:
    return {root}.union(*(every_class(child) for child in root.__subclasses__()))


def test_every_error_class_has_a_status_of_its_own() -> None:
    for package in (adapters, server):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if "vllm_plugin" not in module.name and "migrations" not in module.name:
                importlib.import_module(module.name)
    served = {kind for kind in every_class() if not kind.__module__.startswith(("server.cli", "tests"))}
    assert served - set(STATUS) == set()


def test_an_error_becomes_openais_body_with_problems_and_retry_after() -> None:
    wire = to_wire(EngineBusy("no slot", retry_after=2.2))
    assert (wire.status, wire.headers["retry-after"]) == (503, "3")
    assert json.loads(wire.as_json())["error"] == {
        "code": "engine_busy",
        "message": "no slot",
        "param": None,
        "type": "overloaded_error",
    }
    assert to_wire(NotServable("x", param="model")).error["param"] == "model"


def test_a_bug_of_ours_says_nothing_but_that_it_happened() -> None:
    assert unexpected().status == 500
    assert "request id" in unexpected().error["message"]


@pytest.mark.parametrize(
    ("status", "message", "code", "kind"),
    [
        (400, "This model's maximum context length is 8 tokens.", "context_length_exceeded", "invalid_request_error"),
        (400, "bad temperature", "invalid_request", "invalid_request_error"),
        (404, "no", "not_found", "not_found_error"),
        (500, "boom", "engine_failed", "server_error"),
    ],
)
def test_the_engines_errors_get_a_string_code_and_a_type(status: int, message: str, code: str, kind: str) -> None:
    raw = json.dumps({"error": {"message": message, "type": "X", "param": None, "code": status}}).encode()
    wire = from_engine(status, raw)
    assert (wire.status, wire.error["code"], wire.error["type"]) == (status, code, kind)


def test_an_engines_error_that_is_no_json_still_becomes_a_body() -> None:
    assert from_engine(502, b"<html>").error["message"] == "The engine answered 502."


def test_what_a_validator_quotes_of_the_request_does_not_leave() -> None:
    raw = json.dumps({"error": {"message": "[{'type': 'x', 'msg': 'bad', 'input': 'my secret prompt'}]"}}).encode()
    assert "secret" not in from_engine(400, raw).error["message"]
