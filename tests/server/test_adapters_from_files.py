"""An adapter put together from files that were sent before: the same checks and answers as a form's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fixtures.adapters import AdapterSpec, adapter_config
from tests.fixtures.service import Server, error_of


def file_id(server: Server, path: Path, purpose: str = "adapter") -> str:
    return server.openai.files.create(file=path, purpose=purpose).id  # type: ignore[arg-type]


def sent(server: Server, folder: Path) -> dict[str, str]:
    """The folder's two files, as ids."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    return {"config": file_id(server, config), "weights": file_id(server, weights)}


def post(server: Server, order: Any, **params: Any) -> httpx.Response:
    return server.http.post("/v1/adapters", json=order, params={"wait": 20} | params)


def nothing_is_left(server: Server) -> bool:
    return server.services.store.leftovers() == []


def test_an_adapter_from_files_is_the_version_that_a_form_makes(server: Server) -> None:
    folder = server.adapter()
    parts = sent(server, folder)
    answer = post(server, {"name": "filed", **parts})
    assert (answer.status_code, answer.json()["status"]) == (201, "ready"), answer.text
    form = server.push("filed", folder)
    assert (form.status_code, form.json()["version"]) == (200, 1), "the same bytes"
    for one in parts.values():
        server.openai.files.delete(one)
    assert server.say("filed").status_code == 200, "the files are not needed any more"
    assert nothing_is_left(server)


def test_config_and_card_may_stand_in_the_order(server: Server) -> None:
    folder = server.adapter()
    config = json.loads((folder / "adapter_config.json").read_text())
    order = {"name": "inline", "config": config, "card": {"note": "by hand"}}
    answer = post(server, order | {"weights": file_id(server, folder / "adapter_model.safetensors")})
    assert answer.json()["status"] == "ready", answer.text
    assert server.http.get("/v1/adapters/inline/versions/1/card").json() == {"note": "by hand"}


def test_the_least_config_that_says_anything_is_enough(server: Server) -> None:
    folder, spec = server.adapter(), AdapterSpec()
    order = {"name": "least", "config": {"peft_type": "LORA", "r": spec.rank, "lora_alpha": spec.alpha}}
    answer = post(server, order | {"weights": file_id(server, folder / "adapter_model.safetensors")})
    assert answer.json()["status"] == "ready", answer.text


def test_weights_are_linked_and_not_copied_and_the_file_stays_as_it_is(server: Server) -> None:
    folder = server.adapter()
    parts = sent(server, folder)
    path = server.services.files.store.path(parts["weights"])
    before = path.stat()
    assert post(server, {"name": "linked", **parts}).status_code == 201
    assert path.stat().st_ino == before.st_ino and path.stat().st_nlink == 1
    assert path.read_bytes() == (folder / "adapter_model.safetensors").read_bytes()


def test_every_problem_comes_back_as_from_a_form(server: Server) -> None:
    folder = server.adapter(config={"r": "8", "lora_alpha": 0})
    form = server.push("bad", folder)
    answer = post(server, {"name": "bad", **sent(server, folder)})
    assert answer.status_code == form.status_code == 422
    assert answer.json() == form.json()


def test_a_dry_run_stores_nothing(server: Server) -> None:
    folder = server.adapter()
    answer = post(server, {"name": "tried", **sent(server, folder)}, dry_run=True)
    assert answer.status_code == 200 and answer.json()["object"] == "adapter.check"
    assert server.http.get("/v1/adapters/tried").status_code == 404 and nothing_is_left(server)


def test_a_claim_of_another_base_is_settled_by_base_is(server: Server) -> None:
    parts = sent(server, server.adapter(config={"base_model_name_or_path": "somebody/else"}))
    assert error_of(post(server, {"name": "claim", **parts}))["code"] == "base_mismatch"
    assert post(server, {"name": "claim", "base_is": "served", **parts}).status_code == 201


def test_the_initial_adapter_may_be_a_file(server: Server) -> None:
    folder = server.adapter()
    parts = sent(server, folder) | {"initial_adapter": file_id(server, folder / "adapter_model.safetensors")}
    answer = post(server, {"name": "initial", **parts})
    assert answer.status_code == 201
    assert any("initial_adapter" in item for item in answer.json()["dropped"])


def test_the_same_order_with_one_idempotency_key_is_one_answer(server: Server) -> None:
    folder = server.adapter()
    order, headers = {"name": "once", **sent(server, folder)}, {"idempotency-key": "an-order"}
    first, again = (server.http.post("/v1/adapters", json=order, headers=headers) for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 201) and first.json()["digest"] == again.json()["digest"]
    other = server.http.post("/v1/adapters", json=order | {"name": "other"}, headers=headers)
    assert error_of(other)["code"] == "idempotency_key_reused"


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"weights": "file-" + "0" * 24}, 404, "not_found", "file_id"),
        ({"weights": "../../etc/passwd"}, 404, "not_found", "file_id"),
        ({"weights": {"r": 8}}, 400, "invalid_request", "weights"),
        ({"weights": 5}, 400, "invalid_request", "weights"),
        ({"weights": None}, 400, "invalid_request", "weights"),
        ({"config": ["r"]}, 400, "invalid_request", "config"),
        ({"name": ["x"]}, 400, "invalid_request", "name"),
        ({"name": "../x"}, 400, "name_invalid", "name"),
        ({"path": "/etc/passwd"}, 400, "unknown_parameter", "path"),
        ({"base_is": "mine"}, 400, "invalid_request", "base_is"),
        ({"card": [1]}, 400, "invalid_request", "card"),
        ({"config": {"x": "y" * (1 << 20)}}, 413, "payload_too_large", "config"),
    ],
)
def test_an_order_that_cannot_be_is_refused(
    server: Server, change: dict[str, Any], status: int, code: str, param: str
) -> None:
    folder = server.adapter()
    config = adapter_config(server.base, AdapterSpec())
    order = {"name": "refused", "config": config, "weights": file_id(server, folder / "adapter_model.safetensors")}
    answer = post(server, order | change)
    assert (answer.status_code, error_of(answer)["code"], error_of(answer)["param"]) == (status, code, param)
    assert nothing_is_left(server)


def test_a_file_of_another_purpose_is_no_part_of_an_adapter(server: Server) -> None:
    weights = file_id(server, server.adapter() / "adapter_model.safetensors", "user_data")
    answer = post(server, {"name": "purpose", "config": {}, "weights": weights})
    assert answer.status_code == 400 and "adapter" in error_of(answer)["message"]


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"name": "a", "name": "b"}', b"\xff", b'{"name": NaN}'])
def test_u15_an_order_that_is_no_object_is_400(server: Server, body: bytes) -> None:
    answer = server.http.post("/v1/adapters", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, error_of(answer)["code"]) == (400, "json_invalid")


def test_u14_an_order_is_no_way_to_send_bytes(server: Server) -> None:
    body = b'{"name": "' + b"x" * (8 << 20)
    answer = server.http.post("/v1/adapters", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_f12_a_file_that_changed_on_the_disk_becomes_no_version(server: Server) -> None:
    parts = sent(server, server.adapter())
    path = server.services.files.store.path(parts["weights"])
    path.chmod(0o644)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    answer = post(server, {"name": "rotten", **parts})
    assert (answer.status_code, error_of(answer)["code"]) == (500, "storage_damaged")
    assert server.http.get("/v1/adapters/rotten").status_code == 404 and nothing_is_left(server)
    server.openai.files.delete(parts["weights"])
