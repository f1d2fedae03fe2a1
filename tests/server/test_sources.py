"""Sources of a running server: what is new becomes a version by itself, what is wrong is refused once."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import httpx
import pytest

from adapters.bases import BaseModel
from server.settings import load_settings
from server.source_settings import SourceSettings
from server.source_sync import look_at
from tests.fixtures.adapters import CONFIG_FILE, WEIGHTS_FILE, shape_only_base, write_adapter
from tests.fixtures.processes import Served
from tests.fixtures.remotes import S3, Hub, Remote, remote
from tests.fixtures.service import Server, error_of, eventually

Maker = Callable[..., Server]
COMMIT = "a09a35458c702b33eeacc393d103063234e8bc28"
EVERY = 1.0


def folder_source(root: Path, **more: Any) -> SourceSettings:
    root.mkdir(exist_ok=True)
    return SourceSettings(**{"name": "shared", "url": f"file://{root}", "every_seconds": None, **more})


def look(server: Server) -> dict[str, str]:
    """Have the first source looked at now, with a short pause between the two looks; the states afterwards."""
    watched = server.services.sources[0]
    watched.source.settle_seconds = 0.3
    server.call(look_at(server.services, watched))
    return states(server)


def row_of(server: Server, name: str = "shared") -> dict[str, Any]:
    rows = {row["id"]: row for row in server.http.get("/v1/sources").json()["data"]}
    return rows[name]


def states(server: Server) -> dict[str, str]:
    return {one["name"]: one["state"] for one in row_of(server)["adapters"]}


def events(server: Server, name: str) -> list[dict[str, Any]]:
    return [
        one for one in server.http.get(f"/v1/adapters/{name}/events").json()["data"] if one["kind"] == "version_added"
    ]


def pull(server: Server, name: str, source: str, **body: Any) -> Any:
    return server.http.post("/v1/sources/pull", json={"name": name, "source": source, **body}, params={"wait": 20})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


def test_a_folder_that_appears_and_changes_becomes_version_after_version(make_server: Maker, root: Path) -> None:
    server = make_server(sources=(folder_source(root, every_seconds=EVERY),))
    write_adapter(root / "router", server.base, seed=1)
    eventually(lambda: server.say("router").status_code == 200, 20)
    assert server.say("router").json()["model"] == "router@1"
    write_adapter(root / "router", server.base, seed=2)
    eventually(lambda: server.say("router@2").status_code == 200, 20)
    assert server.say("router").json()["model"] == "router@1", "a later version waits for its promote"
    [second, first] = events(server, "router")
    assert first["actor"] == second["actor"] == "source:shared"
    assert first["detail"]["source"]["location"] == f"file://{root}/router"
    assert first["detail"]["source"]["fingerprint"] != second["detail"]["source"]["fingerprint"]
    assert look(server) == {"router": "taken"}
    assert len(events(server, "router")) == 2
    assert server.services.store.leftovers() == []


def test_a_folder_that_is_being_written_is_left_alone_until_it_is_whole(make_server: Maker, root: Path) -> None:
    server = make_server(sources=(folder_source(root),))
    made = write_adapter(server.scratch / "made", server.base)
    whole = (made / WEIGHTS_FILE).read_bytes()
    (root / "slow").mkdir()
    (root / "slow" / CONFIG_FILE).write_bytes((made / CONFIG_FILE).read_bytes())
    with (root / "slow" / WEIGHTS_FILE).open("wb") as file:
        writer = threading.Thread(target=lambda: write_slowly(file, whole[:-1]))
        writer.start()
        while writer.is_alive():
            assert look(server) == {"slow": "waiting"}
        writer.join()
        for _ in range(2):
            assert look(server) == {"slow": "waiting"}, "a writer that pauses has not finished"
        assert server.http.get("/v1/adapters/slow").status_code == 404
        file.write(whole[-1:])
    assert look(server) == {"slow": "taken"}
    assert [one["number"] for one in events(server, "slow")] == [1]


def test_a_folder_that_changes_between_two_looks_waits_however_whole_it_is(make_server: Maker, root: Path) -> None:
    server = make_server(sources=(folder_source(root),))
    config = write_adapter(root / "restless", server.base) / CONFIG_FILE
    is_over = threading.Event()

    def keep_writing() -> None:
        while not is_over.wait(0.02):
            config.write_bytes(config.read_bytes() + b" ")

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        assert look(server) == {"restless": "waiting"}
        assert server.metric("hotshoe_source_pulls_total", source="shared", outcome="waiting") == 0, "not even fetched"
    finally:
        is_over.set()
        writer.join()
    assert look(server) == {"restless": "taken"}


def write_slowly(file: BinaryIO, content: bytes) -> None:
    for start in range(0, len(content), 1 + len(content) // 15):
        file.write(content[start : start + 1 + len(content) // 15])
        file.flush()
        time.sleep(0.1)


def test_a_bad_adapter_is_refused_once_until_it_changes_also_over_a_restart(make_server: Maker, root: Path) -> None:
    server = make_server(sources=(folder_source(root),))
    bad = write_adapter(root / "bad", server.base, config={"peft_type": "IA3"})
    write_adapter(root / "good", server.base)
    write_adapter(root / "no name!", server.base)
    expected = {"bad": "refused", "good": "taken", "no name!": "refused"}
    assert look(server) == look(server) == expected
    refused = {one["name"]: one["reason"]["code"] for one in row_of(server)["adapters"] if one["reason"]}
    assert refused == {"bad": "feature_not_supported", "no name!": "name_invalid"}
    assert len(events(server, "bad")) == 1
    assert server.metric("hotshoe_source_pulls_total", source="shared", outcome="refused") == 2
    home = server.services.settings.home
    server.stop()
    again = make_server(home=home, sources=(folder_source(root),))
    assert look(again) == expected
    assert len(events(again, "bad")) == len(events(again, "good")) == 1
    assert again.metric("hotshoe_source_pulls_total", source="shared", outcome="same") == 0, "not even fetched"
    write_adapter(bad, server.base)
    assert look(again)["bad"] == "taken"
    assert [one["number"] for one in events(again, "bad")] == [2, 1]


def test_an_adapter_refused_for_one_base_is_looked_at_again_on_another(make_server: Maker, root: Path) -> None:
    server = make_server(sources=(folder_source(root, base_is="served"),))
    other = shape_only_base(server.scratch / "other", hidden_size=32)
    write_adapter(root / "router", other)
    assert look(server) == {"router": "refused"}
    home = server.services.settings.home
    server.stop()
    again = make_server(other, home=home, sources=(folder_source(root),))
    assert look(again) == {"router": "taken"}


def test_the_same_bytes_under_another_time_are_the_same_version(make_server: Maker, root: Path) -> None:
    server = make_server(sources=(folder_source(root),))
    folder = write_adapter(root / "router", server.base)
    look(server)
    os.utime(folder / WEIGHTS_FILE, (1, 1))
    assert look(server) == {"router": "taken"}
    assert server.metric("hotshoe_source_pulls_total", source="shared", outcome="same") == 1
    assert len(events(server, "router")) == 1


def test_an_adapter_of_a_source_belongs_to_its_tenant_whose_quota_holds(make_server: Maker, root: Path) -> None:
    server = make_server(api_key="the-operators-own-key", sources=(folder_source(root, tenant="acme"),))
    limits = {"limits": {"versions": 1}}
    assert server.http.put("/v1/tenants/acme", json=limits).status_code == 200
    write_adapter(root / "a", server.base, seed=1)
    write_adapter(root / "b", server.base, seed=2)
    assert look(server) == {"a": "taken", "b": "failed"}
    reasons = {one["name"]: one["reason"] for one in row_of(server)["adapters"]}
    assert reasons["b"]["code"] == "quota_exceeded"
    assert server.http.get("/v1/adapters").json()["data"] == []
    [row] = [one for one in server.http.get("/v1/tenants").json()["data"] if one["id"] == "acme"]
    assert row["versions"] == 1 and server.services.store.leftovers() == []
    assert server.http.put("/v1/tenants/acme", json={"limits": {"versions": 2}}).status_code == 200
    server.services.sources[0].seen[f"file://{root}/b"].retry_at = 0
    assert look(server) == {"a": "taken", "b": "taken"}, "tried again"


def test_a_source_that_fails_is_told_of_and_counted_and_nothing_waits_for_it(
    make_server: Maker, tmp_path: Path
) -> None:
    gone = SourceSettings(name="shared", url=f"file://{tmp_path}/unmounted", every_seconds=EVERY)
    server = make_server(sources=(gone,))
    assert server.say(server.base.id).status_code == 200
    eventually(lambda: row_of(server)["failures"] >= 2, 20)
    assert row_of(server)["error"]["code"] == "source_unavailable"
    assert server.metric("hotshoe_source_looks_total", source="shared", outcome="failed") >= 2
    write_adapter(tmp_path / "unmounted" / "router", server.base)
    assert look(server) == {"router": "taken"}
    assert row_of(server)["error"] is None and row_of(server)["failures"] == 0


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
    with remote(S3) as one:
        yield one


def bucket_source(s3: Remote, **more: Any) -> SourceSettings:
    options = {"endpoint": s3.url, "region": "us-east-1"}
    return SourceSettings(name="bucket", url="s3://team/adapters", options=options, **more)


def test_a_bucket_is_watched_and_a_refusal_of_it_is_shown_without_a_key(
    make_server: Maker, s3: Remote, tmp_path: Path
) -> None:
    server = make_server(sources=(bucket_source(s3, every_seconds=None),))
    s3.put("adapters/router", write_adapter(tmp_path / "made", server.base))
    server.services.sources[0].source.settle_seconds = 0.1
    server.call(look_at(server.services, server.services.sources[0]))
    eventually(lambda: server.say("router").status_code == 200, 20)
    assert events(server, "router")[0]["detail"]["source"]["location"] == "s3://team/adapters/router"
    s3.status = 403
    server.call(look_at(server.services, server.services.sources[0]))
    text = json.dumps(row_of(server, "bucket"))
    assert "check the credentials" in text and "an-id" not in text and "the-secret" not in text
    assert server.say("router").status_code == 200


def test_one_adapter_is_pulled_when_it_is_asked_for(make_server: Maker, s3: Remote, tmp_path: Path) -> None:
    server = make_server(sources=(bucket_source(s3, every_seconds=None),))
    s3.put("adapters/router", write_adapter(tmp_path / "made", server.base))
    answer = pull(server, "mine", "s3://team/adapters/router")
    assert (answer.status_code, answer.json()["id"], answer.json()["status"]) == (201, "mine@1", "ready")
    again = pull(server, "mine", "s3://team/adapters/router")
    assert (again.status_code, again.json()["id"]) == (200, "mine@1")
    [event] = events(server, "mine")
    assert event["actor"] == "operator" and event["detail"]["source"]["source"] == "bucket"
    assert row_of(server, "bucket")["looked_at"] is None, "every_seconds is null"


def test_what_is_not_allowed_looks_the_same_whether_it_is_there_or_not(make_server: Maker, root: Path) -> None:
    server = make_server(sources=(folder_source(root, every_seconds=None),))
    outside = write_adapter(server.scratch / "outside", server.base)
    answers = [
        pull(server, "mine", source)
        for source in (str(outside), "/no/such/folder", "s3://team/adapters/router", f"{root}/../outside")
    ]
    assert {answer.status_code for answer in answers} == {403}
    assert len({answer.text for answer in answers}) == 1 and "HOTSHOE_SOURCES" in answers[0].text
    assert pull(server, "mine", f"{root}/absent").status_code == 404
    (root / "linked").symlink_to(outside)
    answer = pull(server, "mine", f"{root}/linked")
    assert answer.status_code == 422 and error_of(answer)["problems"][0]["code"] == "file_not_allowed"
    assert pull(server, "tiny", f"{root}/linked").status_code == 400
    assert pull(server, "../x", f"{root}/linked").status_code == 400


def test_another_tenants_source_is_not_there_for_a_key(make_server: Maker, root: Path) -> None:
    server = make_server(
        api_key="the-operators-own-key", sources=(folder_source(root, tenant="acme", every_seconds=None),)
    )
    write_adapter(root / "router", server.base)
    keys = {}
    for tenant in ("acme", "other"):
        body = {"tenant": tenant, "scopes": ["upload"], "adapters": ["router"]}
        keys[tenant] = {"authorization": f"Bearer {server.http.post('/v1/keys', json=body).json()['key']}"}
    body = {"name": "router", "source": f"{root}/router"}
    assert server.http.post("/v1/sources/pull", json=body, headers=keys["other"]).status_code == 403
    assert server.http.post("/v1/sources/pull", json=body).status_code == 403, "the operator's key is of default"
    answer = server.http.post("/v1/sources/pull", json={**body, "name": "else"}, headers=keys["acme"])
    assert answer.status_code == 403, "a key that is limited to other names"
    assert server.http.post("/v1/sources/pull", json=body, headers=keys["acme"]).status_code == 201
    assert server.http.get("/v1/sources", headers=keys["acme"]).status_code == 403


def test_an_adapter_of_the_hub_is_pulled_at_its_commit_and_a_branch_is_refused(
    make_server: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as in the container: it is about the base
    with remote(Hub) as hub:
        hub.commit = COMMIT
        sources = (
            SourceSettings(name="hub", url="hf://acme", endpoint=hub.url, every_seconds=None),
            SourceSettings(name="pinned", url=f"hf://other/router@{COMMIT}", endpoint=hub.url, every_seconds=EVERY),
        )
        server = make_server(sources=sources)
        hub.put("acme/router-lora", write_adapter(tmp_path / "made", server.base, seed=1))
        hub.put("other/router", write_adapter(tmp_path / "pinned", server.base, seed=2))
        answer = pull(server, "mine", f"hf://acme/router-lora@{COMMIT}")
        assert (answer.status_code, answer.json()["status"]) == (201, "ready"), answer.text
        answer = pull(server, "mine", "hf://acme/router-lora@main")
        assert answer.status_code == 400 and "moves" in error_of(answer)["message"]
        eventually(lambda: server.say("router").status_code == 200, 20)
        eventually(lambda: server.metric("hotshoe_source_looks_total", source="pinned", outcome="done") >= 3, 20)
        assert len(hub.gets("/other/router/resolve")) == 2, "once: config and weights"


def test_a_download_that_hangs_does_not_hold_up_answers_or_the_end(
    tiny_base: BaseModel, s3: Remote, tmp_path: Path
) -> None:
    s3.delay = threading.Event()
    s3.put("adapters/router", write_adapter(tmp_path / "made", tiny_base))
    sources = json.dumps([bucket_source(s3, every_seconds=EVERY).model_dump()])
    keys = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    flags = ("--engine", "scripted", "--base", str(tiny_base.folder))
    served = Served(tmp_path / "home", *flags, HOTSHOE_SOURCES=sources, **keys)
    try:
        eventually(lambda: bool(s3.gets(CONFIG_FILE)), 20)
        body = {"model": tiny_base.id, "messages": [{"role": "user", "content": "hello"}]}
        assert httpx.post(f"{served.url}/v1/chat/completions", json=body).status_code == 200
        started = time.monotonic()
        assert served.stop() == 0
        assert time.monotonic() - started < 10
        assert list((tmp_path / "home" / "blobs" / ".staging").iterdir()) == []
    finally:
        s3.delay.set()
        served.end()


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"name": "a", "url": "/srv"}, "must begin with"),
        ({"name": "a", "url": "https://example.org/x"}, "must begin with"),
        ({"name": "a", "url": "file:///"}, "not the whole disk"),
        ({"name": "a", "url": "s3://key:secret@bucket/x"}, "secrets belong in the environment"),
        ({"name": "a", "url": "file:///srv", "every_seconds": 0}, "greater than or equal to 1"),
        ({"name": "a b", "url": "file:///srv"}, "not allowed"),
        ({"name": "a", "url": "file:///srv", "watch": True}, "Extra inputs"),
        ({"name": "a", "url": "file:///srv", "options": {"region": "x"}}, "for buckets"),
    ],
)
def test_an_entry_that_cannot_be_right_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, entry: dict[str, Any], says: str
) -> None:
    monkeypatch.setenv("HOTSHOE_SOURCES", json.dumps([entry]))
    with pytest.raises(Exception, match=says) as caught:
        load_settings()
    assert "HOTSHOE_SOURCES" in str(caught.value)


def test_two_sources_of_one_name_and_a_list_that_is_no_json_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, says in (
        (json.dumps([{"name": "a", "url": "file:///srv"}] * 2), "twice"),
        ("[{", "must be JSON"),
    ):
        monkeypatch.setenv("HOTSHOE_SOURCES", text)
        with pytest.raises(Exception, match=says):
            load_settings()


def test_every_field_of_a_source_is_in_the_docs_with_its_default() -> None:
    page = (Path(__file__).parents[2] / "docs" / "sources.md").read_text()
    for name, field in SourceSettings.model_fields.items():
        default = "-" if field.is_required() or field.default_factory else json.dumps(field.default)
        assert f"| `{name}` | `{default}` | {field.description} |".replace("`-`", "-") in page, name
