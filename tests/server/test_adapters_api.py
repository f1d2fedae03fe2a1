from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from safetensors.numpy import load as load_tensors

from tests.fixtures.adapters import shape_only_base, write_adapter
from tests.fixtures.service import Server, chunks_of, error_of, eventually


def test_a_push_is_quarantined_then_ready_and_the_first_becomes_stable(server: Server) -> None:
    folder = server.adapter()
    (folder / "card.json").write_text(json.dumps({"parent": "other@4", "note": "mine"}))
    answer = server.push("first", folder, wait=0)
    row = answer.json()
    assert (answer.status_code, row["id"], row["status"]) == (201, "first@1", "quarantined")
    assert (row["parent"], row["has_card"]) == ("other@4", True)
    row = server.http.get("/v1/adapters/first/versions/1", params={"wait": 20}).json()
    assert (row["status"], row["residency"], row["is_warm"], row["aliases"]) == ("ready", "resident", True, ["stable"])
    assert row["proof"]["largest_change"] > row["proof"]["noise"]
    assert row["proof"]["rounding"]["served"] == "F32" and row["proof"]["rounding"]["relative_error"] == 0
    assert row["card"] == server.http.get("/v1/adapters/first/versions/1/card").json()
    assert server.say("first").json()["model"] == "first@1"


def test_a_card_is_shown_as_a_page_and_as_the_hubs_readme_and_nothing_in_it_runs(server: Server) -> None:
    folder = server.adapter()
    claim = {
        "name": "<script>alert(1)</script>",
        "verdict": {"sentence": "Learned: <img src=x>.", "primary": "learned"},
    }
    (folder / "card.json").write_text(json.dumps(claim))
    server.push("shown", folder)
    path = "/v1/adapters/shown/versions/1/card"
    page = server.http.get(path, params={"format": "html"})
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<script" not in page.text and "<img" not in page.text and "&lt;script&gt;" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "sandbox" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    readme = server.http.get(path, params={"format": "readme"})
    assert readme.headers["content-type"].startswith("text/markdown") and "\\<script\\>" in readme.text
    assert server.http.get(path).json() == claim
    assert server.http.get(path, params={"format": "pdf"}).status_code in (400, 422)


def test_a_later_version_waits_for_its_promote_and_rolls_back_in_one_call(server: Server) -> None:
    server.pushed("moves")
    server.pushed("moves")
    assert server.say("moves").json()["model"] == "moves@1"
    assert server.say("moves@2").json()["model"] == "moves@2"
    moved = server.promote("moves", 2)
    assert (moved.status_code, moved.json()["version"], moved.headers["etag"]) == (200, 2, '"2"')
    assert server.say("moves").json()["model"] == "moves@2"
    back = server.http.post("/v1/adapters/moves/rollback")
    assert (back.json()["version"], back.json()["generation"]) == (1, 3)
    assert server.say("moves").json()["model"] == "moves@1"
    assert server.http.post("/v1/adapters/moves/rollback").status_code == 409
    server.promote("moves", 2, "canary")
    assert server.say("moves@canary").json()["model"] == "moves@2"


def test_a_promote_with_an_old_generation_is_412_and_changes_nothing(server: Server) -> None:
    server.pushed("swapped")
    server.pushed("swapped")
    assert server.promote("swapped", 2, **{"if-match": '"1"'}).status_code == 200
    answer = server.promote("swapped", 1, **{"if-match": '"1"'})
    assert (answer.status_code, error_of(answer)["code"]) == (412, "generation_mismatch")
    assert server.promote("swapped", 1, "new", **{"if-match": '"0"'}).status_code == 200
    assert server.promote("swapped", 1, "new", **{"if-match": '"0"'}).status_code == 412
    assert server.promote("swapped", 1, **{"if-match": "x"}).status_code == 400


def test_f10_of_two_promoters_with_one_generation_exactly_one_wins(server: Server) -> None:
    server.pushed("race")
    server.pushed("race")
    for generation in range(1, 21):
        with ThreadPoolExecutor(2) as pool:
            header = {"if-match": f'"{generation}"'}
            codes = sorted(pool.map(lambda n, h=header: server.promote("race", n, **h).status_code, (1, 2)))
        assert codes == [200, 412]


def test_a_stream_ends_on_the_version_it_began_on_and_the_next_request_has_the_new_one(server: Server) -> None:
    server.pushed("pinned")
    server.pushed("pinned")
    server.script.seconds_per_token = 0.03
    found: list[list[str]] = []
    thread = threading.Thread(target=lambda: found.append(server.events("pinned", "w " * 30)))
    try:
        thread.start()
        eventually(lambda: server.services.door.admission.running == 1)
        assert server.promote("pinned", 2).status_code == 200
        assert server.say("pinned", max_tokens=1).json()["model"] == "pinned@2"
        assert thread.is_alive()
        thread.join()
    finally:
        server.script.seconds_per_token = 0.0
    chunks = chunks_of(found[0])
    assert {chunk["model"] for chunk in chunks} == {"pinned@1"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_retired_version_answers_no_more_drains_and_leaves_engine_and_disk(server: Server) -> None:
    row = server.pushed("old")
    server.pushed("old")
    assert server.http.delete("/v1/adapters/old/versions/1").status_code == 409
    server.promote("old", 2)
    server.script.seconds_per_token = 0.03
    found: list[list[str]] = []
    thread = threading.Thread(target=lambda: found.append(server.events("old@1", "w " * 20)))
    try:
        thread.start()
        eventually(lambda: server.services.door.admission.running == 1)
        retired = server.http.delete("/v1/adapters/old/versions/1").json()
        assert (retired["status"], retired["residency"]) == ("retired", "draining")
        answer = server.say("old@1")
        assert (answer.status_code, error_of(answer)["code"]) == (409, "not_servable")
        thread.join()
    finally:
        server.script.seconds_per_token = 0.0
    assert chunks_of(found[0])[-1]["choices"][0]["finish_reason"] == "stop"
    eventually(lambda: "old@1" not in {one.engine_name for one in server.call(server.engine.loaded())})
    eventually(lambda: not server.services.store.has(row["digest"]))
    assert server.http.get("/v1/adapters/old/versions/1/files/adapter_config.json").status_code == 404
    assert server.http.delete("/v1/adapters/old/versions/2").status_code == 409
    server.pushed("old")
    assert server.http.delete("/v1/models/old@2").status_code == 409  # there is another to promote first
    assert server.http.delete("/v1/models/old@3").json() == {"id": "old@3", "object": "model", "deleted": True}
    server.promote("old", 2, "also")
    assert server.http.delete("/v1/models/old@2").json()["deleted"]  # the last one goes with its aliases
    assert server.http.get("/v1/adapters/old").json()["aliases"] == []
    assert error_of(server.say("old"))["code"] in ("model_not_found", "not_servable")


def test_an_adapter_that_changes_nothing_is_rejected_and_leaves(server: Server) -> None:
    answer = server.push("nothing", server.adapter(fill=(1.0, 0.0)))
    row = answer.json()
    assert (row["status"], row["reasons"][0]["code"], row["residency"]) == ("rejected", "no_effect", "absent")
    assert not server.services.store.has(row["digest"])
    answer = server.say("nothing@1")
    assert (answer.status_code, error_of(answer)["code"]) == (409, "not_servable")
    assert server.say("nothing").status_code == 404


def test_files_of_another_base_are_refused_with_every_reason_and_leave_a_row(server: Server) -> None:
    other = shape_only_base(server.scratch / "other", hidden_size=32)
    answer = server.push("misfit", write_adapter(server.scratch / "misfit", other))
    error = error_of(answer)
    assert answer.status_code == 422 and len(error["problems"]) > 1
    row = server.http.get("/v1/adapters/misfit/versions/1").json()
    assert row["status"] == "rejected" and len(row["reasons"]) == len(error["problems"])


def test_u4b_an_export_only_version_says_why_it_cannot_be_served(server: Server) -> None:
    folder = server.adapter()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "bias": "all"}))
    row = server.push("whole", folder).json()
    if row.get("status") == "export_only":
        answer = server.say("whole@1")
        assert (answer.status_code, error_of(answer)["code"]) == (409, "not_servable")
        assert "bias" in error_of(answer)["message"]
    else:
        assert row["error"]["problems"]


def test_u26_the_same_files_again_are_the_same_version(server: Server) -> None:
    folder = server.adapter()
    first, again = server.push("same", folder), server.push("same", folder)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"] == "same@1"


def test_the_canonical_files_can_be_fetched_and_nothing_else(server: Server) -> None:
    server.pushed("files")
    path = "/v1/adapters/files/versions/1/files"
    tensors = load_tensors(server.http.get(f"{path}/adapter_model.safetensors").content)
    assert all(name.startswith("base_model.model.model.layers.") for name in tensors)
    assert server.http.get(f"{path}/adapter_config.json").json()["peft_type"] == "LORA"
    for file in ("card.json", "..%2F..%2Fregistry.sqlite3", "%2e%2e", "adapter_config.json%00"):
        assert server.http.get(f"{path}/{file}").status_code == 404


def test_the_models_list_begins_with_the_base_and_names_what_can_answer(make_server: Callable[..., Server]) -> None:
    server = make_server()
    server.pushed("beta")
    server.pushed("Alpha")
    server.push("zero", server.adapter(fill=(1.0, 0.0)))
    rows = server.http.get("/v1/models").json()["data"]
    assert [row["id"] for row in rows] == ["tiny", "Alpha", "beta"]
    everything = server.http.get("/v1/models", params={"view": "all"}).json()["data"]
    assert [row["id"] for row in everything] == ["tiny", "Alpha", "beta", "zero"]
    assert everything[1]["versions"][0]["residency"] == "resident"
    assert everything[3]["versions"][0]["status"] == "rejected"
    one = server.http.get("/v1/models/beta").json()
    assert (one["id"], one["root"], one["parent"]) == ("beta", "beta@1", "tiny")
    assert server.http.get("/v1/models/zero").status_code == 404
    assert [row["id"] for row in server.http.get("/v1/adapters").json()["data"]] == ["Alpha", "beta", "zero"]


def test_an_idempotency_key_repeats_the_answer_and_refuses_another_request(server: Server) -> None:
    folder, header = server.adapter(), {"idempotency-key": "push-1"}
    first = server.push("idem", folder, headers=header)
    again = server.push("idem", folder, headers=header)
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json()["id"] == again.json()["id"]
    other = server.push("idem", server.adapter(), headers=header)
    assert (other.status_code, error_of(other)["code"]) == (409, "idempotency_key_reused")
    server.pushed("idem")
    moved = server.promote("idem", 2, **{"idempotency-key": "promote-1"})
    server.promote("idem", 1)
    assert server.promote("idem", 2, **{"idempotency-key": "promote-1"}).json() == moved.json()
    assert server.say("idem").json()["model"] == "idem@1"


@pytest.mark.parametrize(
    "name", ["..", "a/b", "%2e%2e", "a\x00b", "a\r\nb", "\u202eabc", "x" * 300, "-x", "e\u0301", ""]
)
def test_u7_names_that_are_no_names_are_refused(server: Server, name: str) -> None:
    answer = server.push(name, data={"name": name})
    assert (answer.status_code, error_of(answer)["code"]) == (400, "name_invalid"), answer.text


def test_the_bases_name_is_no_adapters_name(server: Server) -> None:
    assert server.push("Tiny").status_code == 400


def test_a_push_survives_a_restart_before_it_was_proven(make_server: Callable[..., Server]) -> None:
    server = make_server()
    settings = server.services.settings
    server.script.seconds_to_first_token = 30.0
    row = server.push("resumed", wait=0).json()
    assert row["status"] == "quarantined"
    server.stop()
    again = make_server(home=settings.home)
    row = again.http.get("/v1/adapters/resumed/versions/1", params={"wait": 20}).json()
    assert row["status"] == "ready"


def test_what_was_warm_is_back_before_ready_after_a_restart(make_server: Callable[..., Server]) -> None:
    server = make_server()
    server.pushed("kept")
    server.pushed("kept")
    home = server.services.settings.home
    server.stop()
    again = make_server(home=home)
    loaded = {one.engine_name for one in again.call(again.engine.loaded())}
    assert loaded == {"kept@1", "kept@2"}


def test_a_version_of_another_base_is_listed_and_not_servable(make_server: Callable[..., Server]) -> None:
    server = make_server()
    server.pushed("foreign")
    home = server.services.settings.home
    server.stop()
    other = shape_only_base(server.scratch / "bigger", hidden_size=32)
    again = make_server(other, home=home)
    row = again.http.get("/v1/adapters/foreign").json()["versions"][0]
    assert (row["is_for_served_base"], row["residency"]) == (False, "absent")
    answer = again.say("foreign")
    assert (answer.status_code, error_of(answer)["code"]) == (409, "not_servable")
    assert [row["id"] for row in again.http.get("/v1/models").json()["data"]] == ["bigger"]


def test_events_tell_what_happened(server: Server) -> None:
    server.pushed("told")
    server.pushed("told")
    server.promote("told", 2)
    kinds = [event["kind"] for event in server.http.get("/v1/adapters/told/events").json()["data"]]
    assert kinds.count("version_added") == 2 and kinds.count("promoted") == 2


def test_events_tell_who_when_and_from_where(make_server: Callable[..., Server]) -> None:
    server = make_server(api_key="a-key-of-16-chars", trusted_proxies=["127.0.0.1"])
    before = time.time()
    server.pushed("told")
    server.http.headers["x-forwarded-for"] = "203.0.113.9"
    assert server.promote("told", 1, "canary").status_code == 200
    events = server.http.get("/v1/adapters/told/events").json()["data"]
    assert all(before - 1 <= event["at"] <= time.time() + 1 for event in events)
    who = {event["kind"]: (event["actor"], event["detail"].get("client")) for event in events}
    assert who["version_added"] == ("api-key", "127.0.0.1")
    assert who["status_changed"] == ("prover", None), "no request's own doing"
    canary = next(event for event in events if event["alias"] == "canary")
    assert (canary["actor"], canary["detail"]["client"]) == ("api-key", "203.0.113.9")


def test_an_upload_leaves_nothing_in_the_staging_folder(server: Server) -> None:
    server.pushed("tidy")
    server.push("tidy", write_adapter(server.scratch / "bad", server.base, rank=500))
    assert server.services.store.leftovers() == []


def test_f12_a_flipped_byte_is_found_by_the_digest_and_others_are_served(make_server: Callable[..., Server]) -> None:
    server = make_server()
    row = server.pushed("flipped")
    server.pushed("fine")
    home = server.services.settings.home
    server.stop()
    path = server.services.store.folder(row["digest"]) / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    again = make_server(home=home)
    answer = again.say("flipped")
    assert (answer.status_code, error_of(answer)["code"]) == (500, "storage_damaged")
    assert again.say("fine").status_code == 200


def test_a_version_that_the_engine_dies_of_twice_is_rejected_for_good(make_server: Callable[..., Server]) -> None:
    server = make_server()
    server.script.seconds_to_first_token = 5.0
    server.push("deadly", wait=0)
    for _ in range(2):
        eventually(lambda: server.call(server.engine.usage()).running > 0)
        server.call(server.engine.crash())
        eventually(lambda: server.http.get("/ready").status_code == 200)
    row = server.http.get("/v1/adapters/deadly/versions/1", params={"wait": 10}).json()
    assert (row["status"], row["reasons"][0]["code"]) == ("rejected", "engine_died")
    server.script.seconds_to_first_token = 0.0
    assert server.say(server.base.id).status_code == 200
