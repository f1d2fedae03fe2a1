"""What a version is served with: checked like a request, filled into requests, part of its identity."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from adapters.errors import AdapterRefused, NotServable
from adapters.serving import Serving
from adapters.types import AdapterVersion, VersionStatus
from server.cli.main import build_app
from server.fields import FIELDS
from server.serving import TAKEN, read_serving, served_as, with_defaults
from tests.fixtures.service import Server, error_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES, TOKENIZE = "/v1/responses", "/v1/messages", "/tokenize"
DEFAULTS: dict[str, Any] = {
    "temperature": 0.2,
    "top_p": 0.9,
    "max_tokens": 64,
    "stop": ["END"],
    "chat_template_kwargs": {"enable_thinking": False, "tone": "dry"},
}
runner = CliRunner()


def problems_of(value: Any) -> list[tuple[str, str]]:
    with pytest.raises(AdapterRefused) as caught:
        read_serving(value if isinstance(value, bytes) else json.dumps(value).encode())
    return [(problem.code, problem.path) for problem in caught.value.problems]


def push(server: Server, name: str, folder: Path, serving: Any = None, **more: bytes) -> httpx.Response:
    parts = {"config": folder / "adapter_config.json", "weights": folder / "adapter_model.safetensors"}
    files = {part: path.read_bytes() for part, path in parts.items()} | more
    if serving is not None:
        files["serving"] = json.dumps(serving).encode()
    return server.push(name, files=files)


def test_every_default_is_a_field_of_the_chat_route() -> None:
    assert FIELDS[CHAT].taken >= TAKEN


def test_defaults_are_held_to_the_bounds_of_a_request_and_all_that_is_wrong_is_said() -> None:
    wrong = {
        "temperature": -1,
        "temprature": 1,
        "stop": "x" * 2000,
        "chat_template_kwargs": {"chat_template": "{{ x }}"},
    }
    assert problems_of(wrong) == [
        ("invalid_request", "serving.json.temperature"),
        ("unknown_parameter", "serving.json.temprature"),
        ("invalid_request", "serving.json.stop"),
        ("unknown_parameter", "serving.json.chat_template_kwargs"),
    ]


@pytest.mark.parametrize(
    "value",
    [
        {"max_tokens": 0}, {"max_tokens": 1.5}, {"top_k": 2.5}, {"top_p": 0}, {"repetition_penalty": 0}, {"stop": ""},
        {"stop": ["a", 1]}, {"stop": 7}, {"chat_template_kwargs": []}, {"temperature": "0.1"}, {"temperature": True},
        {"messages": []}, {"n": 2}, {"chat_template": "x"}, {"cache_salt": "x"},
    ],
)  # fmt: skip
def test_a_default_that_the_engine_would_refuse_in_every_request_is_refused_at_upload(value: dict[str, Any]) -> None:
    assert [path for _, path in problems_of(value)] == [f"serving.json.{next(iter(value))}"]


@pytest.mark.parametrize("raw", [b"[]", b"{", b'{"a": NaN}', b'{"top_p": 1, "top_p": 1}', b"\xff", b"[" * 5000])
def test_a_serving_part_that_is_no_object_is_refused(raw: bytes) -> None:
    assert problems_of(raw)[0][1] == "serving.json"


def test_null_and_empty_say_nothing_and_one_point_nought_is_one() -> None:
    assert read_serving(b'{"temperature": 1.0, "top_p": null, "chat_template_kwargs": {}}') == {"temperature": 1}


def test_a_request_overrides_field_by_field_and_null_leaves_the_default() -> None:
    body = {"messages": [], "temperature": 0, "top_p": None, "stop": []}
    assert with_defaults(CHAT, body, DEFAULTS) == {**DEFAULTS, "messages": [], "temperature": 0, "stop": []}


def test_template_arguments_are_filled_up_key_by_key() -> None:
    body = {"chat_template_kwargs": {"enable_thinking": True, "tone": None, "x": 1}}
    filled = with_defaults(CHAT, body, DEFAULTS)["chat_template_kwargs"]
    assert filled == {"enable_thinking": True, "tone": "dry", "x": 1}


def test_a_limit_under_its_newer_name_is_the_clients_limit() -> None:
    assert "max_tokens" not in with_defaults(CHAT, {"max_completion_tokens": 5}, DEFAULTS)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"reasoning_effort": "high"}),
        (RESPONSES, {"reasoning": {"effort": "high"}}),
        (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
    ],
)
def test_a_client_that_says_whether_to_think_in_another_field_is_not_overruled(path: str, body: dict[str, Any]) -> None:
    assert with_defaults(path, body, DEFAULTS)["chat_template_kwargs"] == {"tone": "dry"}


def test_each_route_gets_the_defaults_it_has_fields_for_under_its_own_names() -> None:
    assert set(with_defaults(COMPLETIONS, {}, DEFAULTS)) == {"temperature", "top_p", "max_tokens", "stop"}
    responses = with_defaults(RESPONSES, {}, DEFAULTS)
    assert responses["max_output_tokens"] == 64 and "max_tokens" not in responses
    messages = with_defaults(MESSAGES, {"max_tokens": 9}, DEFAULTS)
    assert (messages["stop_sequences"], messages["max_tokens"]) == (["END"], 9) and "stop" not in messages
    assert with_defaults(TOKENIZE, {"prompt": "x"}, DEFAULTS) == {"prompt": "x"}
    assert set(with_defaults(TOKENIZE, {"messages": []}, DEFAULTS)) == {"messages", "chat_template_kwargs"}
    assert with_defaults("/detokenize", {"tokens": []}, DEFAULTS) == {"tokens": []}
    for path, fields in FIELDS.items():
        assert set(with_defaults(path, {"messages": []}, DEFAULTS)) - {"messages"} <= fields.taken


def version(**more: Any) -> AdapterVersion:
    return AdapterVersion("default", "x", 1, VersionStatus.READY, None, None, 8, 0, None, 0.0, **more)


def test_a_template_goes_where_the_engine_takes_one_and_is_refused_where_it_would_be_ignored() -> None:
    own = version(chat_template="{{ messages }}", serving={"temperature": 0})
    for path in (CHAT, TOKENIZE):
        assert served_as(path, {"messages": []}, own, is_allowed=True)["chat_template"] == "{{ messages }}"
        with pytest.raises(NotServable, match="HOTSHOE_ALLOW_CHAT_TEMPLATES=true"):
            served_as(path, {"messages": []}, own, is_allowed=False)
    for path in (RESPONSES, MESSAGES):
        with pytest.raises(NotServable, match="use /v1/chat/completions"):
            served_as(path, {}, own, is_allowed=True)
    assert served_as(COMPLETIONS, {"prompt": "x"}, own, is_allowed=False) == {"prompt": "x", "temperature": 0}
    assert served_as(TOKENIZE, {"prompt": "x"}, own, is_allowed=False) == {"prompt": "x"}


@pytest.mark.parametrize("thinking", [True, False])
def test_a_card_says_whether_to_think_where_the_uploader_does_not(thinking: bool) -> None:
    card = {"template": {"enable_thinking": thinking}}
    assert Serving().with_card(card).defaults == {"chat_template_kwargs": {"enable_thinking": thinking}}
    said = {"chat_template_kwargs": {"enable_thinking": not thinking}}
    assert Serving(said).with_card(card).defaults == said
    for nothing in (None, {}, {"template": None}, {"template": {"enable_thinking": None}}, {"template": "x"}):
        assert Serving().with_card(nothing) == Serving()


def test_defaults_reach_the_engine_with_the_version_that_answers(server: Server) -> None:
    row = push(server, "short", server.adapter(), {"max_tokens": 2}).json()
    assert (row["status"], row["serving"], row["chat_template"]) == ("ready", {"max_tokens": 2}, None)
    said = server.say("short", "one two three four").json()
    assert (said["usage"]["completion_tokens"], said["choices"][0]["finish_reason"]) == (2, "length")
    assert server.say("short", "one two three four", max_tokens=3).json()["usage"]["completion_tokens"] == 3
    assert server.say("short", "one two three four", max_tokens=None).json()["usage"]["completion_tokens"] == 2
    row = push(server, "short", server.adapter(), {"max_tokens": 1}).json()
    assert row["version"] == 2
    assert server.say("short@1").json()["usage"]["completion_tokens"] == 2  # pinned with its version
    assert server.say("short@2").json()["usage"]["completion_tokens"] == 1


def test_u26_the_same_files_are_one_version_for_each_way_to_serve_them(server: Server) -> None:
    folder = server.adapter()
    ways = [
        None,
        {"top_p": 0.5},
        {"top_p": 0.6},
        {"chat_template_kwargs": {"x": True}},
        {"chat_template_kwargs": {"x": 1}},
    ]
    first = [push(server, "ways", folder, way) for way in ways]
    assert [answer.status_code for answer in first] == [201] * 5
    again = [push(server, "ways", folder, way) for way in [{"top_p": None}, *ways[1:]]]
    assert [answer.status_code for answer in again] == [200] * 5
    assert [answer.json()["version"] for answer in again] == [1, 2, 3, 4, 5]
    assert len({answer.json()["digest"] for answer in again}) == 1


def test_a_version_whose_card_says_that_it_was_trained_without_thinking_is_served_without(server: Server) -> None:
    card = json.dumps({"template": {"enable_thinking": False}}).encode()
    row = push(server, "plain", server.adapter(), card=card).json()
    assert row["serving"] == {"chat_template_kwargs": {"enable_thinking": False}}


def test_wrong_defaults_are_422_and_leave_no_version(server: Server) -> None:
    answer = push(server, "wrong", server.adapter(), {"temprature": 1})
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (422, "unknown_parameter", "serving")
    assert error["problems"][0]["advice"] == "Did you mean temperature?"
    assert server.http.get("/v1/adapters/wrong").status_code == 404


def test_push_sends_the_folders_serving_json_or_the_named_file_and_says_what_it_is(
    make_server: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server()
    monkeypatch.setenv("HOTSHOE_URL", server.url)
    folder = server.adapter()
    (folder / "serving.json").write_text('{"temperature": 0.5}')
    result = runner.invoke(build_app(), ["push", str(folder), "--name", "told", "--check"])
    assert result.exit_code == 0 and 'served with: {"temperature": 0.5}' in result.stdout
    assert runner.invoke(build_app(), ["push", str(folder), "--name", "told"]).exit_code == 0
    other = tmp_path / "other.json"
    other.write_text('{"temperature": 0.7}')
    result = runner.invoke(build_app(), ["push", str(folder), "--name", "told", "--serving", str(other)])
    assert result.exit_code == 0 and 'served with: {"temperature": 0.7}' in result.stdout
    shown = runner.invoke(build_app(), ["show", "told@2"])
    assert 'serving: {"temperature": 0.7}' in shown.stdout
    assert runner.invoke(build_app(), ["push", str(folder), "--name", "told", "--serving", "none"]).exit_code != 0
