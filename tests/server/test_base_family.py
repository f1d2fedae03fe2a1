"""One model under several names: what the operator declares, and the merge base, may be claimed by an adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters.bases import BaseModel, load_base
from tests.fixtures.adapters import shape_only_base
from tests.fixtures.bases import tiny_qwen2
from tests.fixtures.service import Server, error_of, eventually, running


@pytest.fixture(scope="module")
def merge_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base(tiny_qwen2(tmp_path_factory.mktemp("bases") / "sixteen-bits"))


@pytest.fixture(scope="module")
def server(merge_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """It serves a quantised copy of the merge base, and one more name of it is declared."""
    scratch = tmp_path_factory.mktemp("family")
    config = {**merge_base.config, "quantization_config": {"quant_method": "awq", "bits": 4}}
    served = shape_only_base(scratch / "four-bits", **config)
    with running(
        served, scratch, merge_base=str(merge_base.folder), base_names=("Acme/Tiny-Chat", "/data/tiny")
    ) as one:
        yield one


def pushed(server: Server, claim: str, card: dict[str, Any] | None = None) -> Any:
    folder = server.adapter(config={"base_model_name_or_path": claim})
    if card is not None:
        (folder / "card.json").write_text(json.dumps(card))
    return server.push("router", folder)


@pytest.mark.parametrize(
    "claim", ["Acme/Tiny-Chat", "acme/tiny-chat-bnb-4bit", "/data/tiny/", "{folder}", "{digest}", "sixteen-bits"]
)
def test_every_member_of_the_declared_family_may_be_claimed(server: Server, merge_base: BaseModel, claim: str) -> None:
    answer = pushed(server, claim.format(folder=merge_base.folder, digest=merge_base.digest))
    assert (answer.status_code, answer.json().get("status")) == (201, "ready"), answer.text


def test_a_card_that_names_the_merge_base_by_digest_is_believed(server: Server, merge_base: BaseModel) -> None:
    answer = pushed(server, "/elsewhere/model", {"base": {"id": "tiny", "digest": merge_base.digest}})
    assert (answer.status_code, answer.json().get("status")) == (201, "ready"), answer.text


@pytest.mark.parametrize("claim", ["Acme/Other-Chat", "Somebody/Tiny-Chat", "/data/other"])
def test_what_was_not_declared_is_of_another_base(server: Server, claim: str) -> None:
    answer = pushed(server, claim, {"base": {"digest": "sha256:0"}})
    assert error_of(answer)["code"] == "base_mismatch"


def test_an_adapter_of_the_family_is_merged_into_the_merge_base(
    server: Server, merge_base: BaseModel, tmp_path: Path
) -> None:
    version = pushed(server, str(merge_base.folder)).json()["id"]
    job = server.http.post("/v1/exports", json={"model": version, "parity": False}).json()["id"]
    eventually(lambda: server.http.get(f"/v1/exports/{job}").json()["status"] in ("succeeded", "failed"), 60)
    row = server.http.get(f"/v1/exports/{job}").json()
    assert row["status"] == "succeeded", row
    manifest = server.http.get(f"/v1/exports/{job}/content", params={"file": "manifest.json"}).json()
    assert manifest["base"]["digest"] == merge_base.digest
