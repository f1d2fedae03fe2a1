"""U2: a version's own chat template: refused unless the operator allows it, part of what the version is, readable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from adapters.bases import load_base
from adapters.chat_template import MAX_TEMPLATE_BYTES, template_digest
from server.cli.main import build_app
from tests.fixtures.adapters import shape_only_base
from tests.fixtures.service import Server, error_of

TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
runner = CliRunner()
MakeServer = Callable[..., Server]


def push(server: Server, name: str, folder: Path, text: str = TEMPLATE, **card: Any) -> httpx.Response:
    paths = {"config": folder / "adapter_config.json", "weights": folder / "adapter_model.safetensors"}
    files = {part: path.read_bytes() for part, path in paths.items()} | {"chat_template": text.encode()}
    if card:
        files["card"] = json.dumps(card).encode()
    return server.push(name, files=files)


def test_u2_a_template_is_refused_and_the_setting_named_unless_the_operator_allows_it(server: Server) -> None:
    answer = push(server, "own", server.adapter())
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (422, "file_not_allowed")
    assert "HOTSHOE_ALLOW_CHAT_TEMPLATES=true" in error["problems"][0]["advice"]
    assert server.http.get("/v1/adapters/own").status_code == 404


def test_an_allowed_template_is_part_of_what_the_version_is_and_can_be_read(make_server: MakeServer) -> None:
    server = make_server(allow_chat_templates=True)
    folder = server.adapter()
    row = push(server, "own", folder).json()
    assert (row["status"], row["chat_template"]) == ("ready", template_digest(TEMPLATE))
    assert push(server, "own", folder).json()["version"] == 1
    assert push(server, "own", folder, TEMPLATE.replace("\n", "\r\n")).json()["version"] == 1
    assert push(server, "own", folder, TEMPLATE + " ").json()["version"] == 2
    assert server.push("own", folder).json()["version"] == 3
    path = "/v1/adapters/own/versions/{}/files/chat_template.jinja"
    assert server.http.get(path.format(1)).text == TEMPLATE
    assert server.http.get(path.format(3)).status_code == 404
    assert server.say("own").status_code == 200
    for route, body in (
        ("/v1/responses", {"input": "x"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        answer = server.http.post(
            route, json={"model": "own", "max_tokens": 5, **body} if "messages" in body else {"model": "own", **body}
        )
        assert answer.status_code == 409 and "/v1/chat/completions" in answer.text, answer.text
    assert server.http.post("/v1/completions", json={"model": "own", "prompt": "x"}).status_code == 200


def test_a_client_still_sends_no_template(make_server: MakeServer) -> None:
    server = make_server(allow_chat_templates=True)
    for field in ({"chat_template": TEMPLATE}, {"chat_template_kwargs": {"chat_template": TEMPLATE}}):
        assert error_of(server.say(server.base.id, **field))["code"] == "unknown_parameter"


def test_a_template_other_than_the_cards_is_refused_with_both(make_server: MakeServer) -> None:
    server = make_server(allow_chat_templates=True)
    other = template_digest("other")
    error = error_of(push(server, "own", server.adapter(), template={"digest": other}))
    assert error["code"] == "template_mismatch"
    assert other in error["message"] and template_digest(TEMPLATE) in error["message"]
    assert push(server, "own", server.adapter(), template={"digest": template_digest(TEMPLATE)}).status_code == 201


@pytest.mark.parametrize(
    ("template", "status", "code"),
    [
        ("{% for %}", 422, "template_invalid"),
        ("Hello", 422, "template_invalid"),
        ("x" * (MAX_TEMPLATE_BYTES + 1), 413, "payload_too_large"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(
    make_server: MakeServer, template: str, status: int, code: str
) -> None:
    server = make_server(allow_chat_templates=True)
    answer = push(server, "own", server.adapter(), template)
    assert (answer.status_code, error_of(answer)["code"]) == (status, code)


def test_the_bases_own_template_is_dropped_and_listed_and_push_leaves_others_behind(
    make_server: MakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(shape_only_base(tmp_path / "with-template").folder)
    (base.folder / "chat_template.jinja").write_text(TEMPLATE)
    server = make_server(base)
    monkeypatch.setenv("HOTSHOE_URL", server.url)
    row = push(server, "own", server.adapter()).json()
    assert row["chat_template"] is None
    assert "file chat_template.jinja: it is the base's own" in row["dropped"]
    folder = server.adapter()
    for text, reason in ((TEMPLATE, "the base's own"), (TEMPLATE + "x", "HOTSHOE_ALLOW_CHAT_TEMPLATES")):
        (folder / "chat_template.jinja").write_text(text)
        result = runner.invoke(build_app(), ["push", str(folder), "--name", "left"])
        assert result.exit_code == 0 and reason in result.stdout, result.stdout


def test_push_sends_a_template_that_the_server_takes(make_server: MakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server = make_server(allow_chat_templates=True)
    monkeypatch.setenv("HOTSHOE_URL", server.url)
    folder = server.adapter()
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    result = runner.invoke(build_app(), ["push", str(folder), "--name", "own"])
    assert result.exit_code == 0 and f"chat template of its own: {template_digest(TEMPLATE)}" in result.stdout


def test_a_version_with_a_template_is_not_answered_once_the_operator_takes_the_permission_back(
    make_server: MakeServer,
) -> None:
    server = make_server(allow_chat_templates=True)
    push(server, "own", server.adapter())
    home = server.services.settings.home
    server.stop()
    again = make_server(home=home)
    answer = again.say("own")
    assert (answer.status_code, error_of(answer)["code"]) == (409, "not_servable")
