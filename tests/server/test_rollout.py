"""A candidate on a share of an alias's requests: who gets it, that a conversation stays, what ends it, roll-back."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from adapters.errors import InvalidRequest
from adapters.types import AdapterRef, VersionStatus
from server.inference import read_request
from server.resolve import resolve_model
from server.services import Caller
from server.session import HEADER, place_of, session_of
from tests.fixtures.service import Server, error_of, eventually

SESSIONS = [f"conversation {number}" for number in range(2000)]


def try_out(server: Server, name: str, number: int | None, share: float | None, **headers: str) -> httpx.Response:
    body = {"candidate": number} | ({} if share is None else {"share": share})
    return server.http.put(f"/v1/adapters/{name}/aliases/stable", json=body, headers=headers)


def two_versions(server: Server, name: str, share: float | None = None) -> None:
    """NAME@1, which is stable, and NAME@2 with the share."""
    for _ in range(2):
        server.pushed(name)
    if share is not None:
        assert try_out(server, name, 2, share).status_code == 200


def resolved(server: Server, model: str, sessions: list[str | None], tenant: str = "default") -> list[str]:
    """The concrete id that a request of each session gets."""

    async def resolve() -> list[str]:
        caller = Caller(tenant)
        return [(await resolve_model(server.services, caller, model, session)).ref for session in sessions]

    return server.call(resolve())


def place(server: Server, name: str, session: str) -> float:
    split = server.services.registry.split(AdapterRef.parse(name))
    return place_of(split, "default", session, server.services.keyring.pepper)


def binomial(count: int, share: float) -> tuple[float, float]:
    """The bounds that a count of hits leaves once in two million runs: five standard deviations."""
    reach = 5 * math.sqrt(count * share * (1 - share))
    return count * share - reach, count * share + reach


def test_a_candidate_is_tried_shown_grown_and_ended(server: Server) -> None:
    two_versions(server, "tried")
    answer = try_out(server, "tried", 2, 0.05, **{"if-match": '"1"'})
    row = answer.json()
    assert (answer.status_code, answer.headers["etag"], row["version"]) == (200, '"2"', 1)
    assert (row["candidate"], row["share"]) == (2, 0.05)
    adapter = server.http.get("/v1/adapters/tried").json()
    assert adapter["aliases"] == [row] and adapter["stable"] == 1
    two, one = adapter["versions"]
    assert (two["candidate_of"], two["aliases"], two["residency"]) == ({"stable": 0.05}, [], "resident")
    assert (one["candidate_of"], one["aliases"]) == ({}, ["stable"])
    assert server.http.get("/v1/models/tried").json()["root"] == "tried@1"
    assert try_out(server, "tried", 2, 0.5, **{"if-match": '"1"'}).status_code == 412
    assert try_out(server, "tried", 2, 0.5).json()["share"] == 0.5
    assert set(resolved(server, "tried", list(SESSIONS))) == {"tried@1", "tried@2"}
    ended = try_out(server, "tried", None, None).json()
    assert (ended["version"], ended["candidate"], ended["share"], ended["generation"]) == (1, None, None, 4)
    assert set(resolved(server, "tried", [*SESSIONS, *[None] * 100])) == {"tried@1"}
    kinds = [
        event["kind"] for event in server.http.get("/v1/adapters/tried/events", params={"limit": 3}).json()["data"]
    ]
    assert kinds == ["candidate_ended", "candidate_set", "candidate_set"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"version": None},
        {"candidate": 2},
        {"share": 0.5},
        {"candidate": None, "share": 0.5},
        {"version": 1, "candidate": 2, "share": 0.5},
        {"version": 1, "share": 0.5},
        {"candidate": 2, "share": 0},
        {"candidate": 2, "share": 1},
        {"candidate": 2, "share": 1.5},
    ],
)
def test_a_change_of_an_alias_is_one_thing_and_a_share_a_part(server: Server, body: dict[str, Any]) -> None:
    answer = server.http.put("/v1/adapters/whichever/aliases/stable", json=body)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_request")


def test_only_another_version_that_is_ready_can_be_tried_and_it_cannot_be_retired_meanwhile(server: Server) -> None:
    two_versions(server, "limits")
    idle = server.push("limits", server.adapter(fill=(1.0, 0.0))).json()
    assert idle["status"] == "rejected"
    for number, status, code in ((1, 409, "conflict"), (3, 409, "not_servable"), (9, 404, "model_not_found")):
        answer = try_out(server, "limits", number, 0.05)
        assert (answer.status_code, error_of(answer)["code"]) == (status, code)
    path = "/v1/adapters/limits/aliases/canary"
    assert server.http.put(path, json={"candidate": 2, "share": 0.1}).status_code == 404
    assert try_out(server, "limits", 2, 0.05).status_code == 200
    for path in ("/v1/adapters/limits/versions/2", "/v1/models/limits@2"):
        answer = server.http.delete(path)
        assert (answer.status_code, error_of(answer)["code"]) == (409, "conflict")
    assert server.promote("limits", 1).json()["candidate"] is None, "the promote of its own version ends the share too"
    assert server.http.delete("/v1/adapters/limits/versions/2").status_code == 200


def test_an_idempotency_key_tells_a_candidate_from_a_promote(server: Server) -> None:
    two_versions(server, "keyed")
    header = {"idempotency-key": "try-2"}
    first = try_out(server, "keyed", 2, 0.05, **header)
    assert try_out(server, "keyed", 2, 0.05, **header).json() == first.json()
    assert try_out(server, "keyed", 2, 0.06, **header).status_code == 409
    assert server.promote("keyed", 2, **header).status_code == 409


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_without_a_session_the_share_of_two_thousand_requests_is_within_its_bound(server: Server, share: float) -> None:
    name = f"chance{share}"
    two_versions(server, name, share)
    counts = Counter(resolved(server, name, [None] * 2000))
    low, high = binomial(2000, share)
    assert low < counts[f"{name}@2"] < high, counts


def test_a_session_stays_on_its_version_and_a_larger_share_only_adds_sessions(server: Server) -> None:
    two_versions(server, "sticky")
    before: set[str] = set()
    for share in (0.05, 0.2, 0.5, 0.95):
        assert try_out(server, "sticky", 2, share).status_code == 200
        refs = resolved(server, "sticky", list(SESSIONS))
        assert refs == resolved(server, "sticky", list(SESSIONS)), "asked twice"
        on_candidate = {session for session, ref in zip(SESSIONS, refs, strict=True) if ref == "sticky@2"}
        low, high = binomial(2000, share)
        assert low < len(on_candidate) < high
        assert before < on_candidate
        before = on_candidate
    assert server.promote("sticky", 2).status_code == 200
    assert set(resolved(server, "sticky", list(SESSIONS))) == {"sticky@2"}


def test_a_session_stays_on_its_version_over_a_restart_and_another_server_deals_anew(
    make_server: Callable[..., Server],
) -> None:
    server = make_server()
    two_versions(server, "kept", 0.5)
    home = server.services.settings.home
    before = resolved(server, "kept", list(SESSIONS))
    server.stop()
    again = make_server(home=home)
    assert again.http.get("/v1/adapters/kept/versions/2").json()["residency"] == "resident", "before the first request"
    assert resolved(again, "kept", list(SESSIONS)) == before
    again.stop()
    elsewhere = make_server(home=home, key_pepper="another pepper of another server")
    low, high = binomial(2000, 0.5)
    same = sum(one == other for one, other in zip(resolved(elsewhere, "kept", list(SESSIONS)), before, strict=True))
    assert low < same < high, "independent of the first"


def test_places_of_tenants_adapters_and_aliases_are_independent(server: Server) -> None:
    two_versions(server, "mine", 0.5)
    two_versions(server, "yours", 0.5)
    server.promote("mine", 1, "canary")
    path = "/v1/adapters/mine/aliases/canary"
    assert server.http.put(path, json={"candidate": 2, "share": 0.5}).status_code == 200
    registry, pepper = server.services.registry, server.services.keyring.pepper
    asked = [("mine", "default"), ("mine", "acme"), ("yours", "default"), ("mine@canary", "default")]
    splits = [(registry.split(AdapterRef.parse(model)), tenant) for model, tenant in asked]
    sides = [[place_of(split, tenant, one, pepper) < 0.5 for one in SESSIONS] for split, tenant in splits]
    low, high = binomial(2000, 0.5)
    for i, one in enumerate(sides):
        for other in sides[i + 1 :]:
            assert low < sum(a == b for a, b in zip(one, other, strict=True)) < high


def sessions_of_both(server: Server, name: str, share: float) -> tuple[str, str]:
    """A session that stays on the alias's own version, and one that gets the candidate."""
    own = next(one for one in SESSIONS if place(server, name, one) >= share)
    return own, next(one for one in SESSIONS if place(server, name, one) < share)


def test_the_header_names_the_session_or_else_the_user_does(server: Server) -> None:
    two_versions(server, "named", 0.5)
    own, candidate = sessions_of_both(server, "named", 0.5)

    def model(header: str | None, user: str | None, **more: Any) -> str:
        body = {"model": "named", "messages": [{"role": "user", "content": "hello"}], **more}
        headers = {HEADER: header} if header is not None else {}
        answer = server.http.post("/v1/chat/completions", json=body | ({"user": user} if user else {}), headers=headers)
        return str(answer.json()["model"])

    for _ in range(5):
        assert [model(one, None) for one in (own, candidate)] == ["named@1", "named@2"]
        assert [model(None, one) for one in (own, candidate)] == ["named@1", "named@2"]
        assert [model(own, candidate), model(candidate, own)] == ["named@1", "named@2"], "the header wins"
    body = {"model": "named", "prompt": "hello", "user": candidate}
    assert server.http.post("/v1/completions", json=body).json()["model"] == "named@2"
    asked = server.openai.chat.completions.create(
        model="named",
        messages=[{"role": "user", "content": "hello"}],
        user=own,
        extra_headers={HEADER: candidate},
    )
    assert asked.model == "named@2"
    assert {model("", None) for _ in range(60)} == {"named@1", "named@2"}, "an empty one names nothing"


def test_anthropics_clients_name_the_user_in_metadata() -> None:
    body = {"model": "x", "max_tokens": 1, "messages": [], "metadata": {"user_id": "me"}}
    assert read_request("/v1/messages", json.dumps(body).encode(), "base").user == "me"
    body = {"model": "x", "input": "hi", "user": "me", "metadata": {"user_id": "no"}}
    assert read_request("/v1/responses", json.dumps(body).encode(), "base").user == "me"


def test_a_session_is_one_short_header(server: Server) -> None:
    for headers in ([(HEADER, "a"), (HEADER, "b")], [(HEADER, "x" * 513)]):
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
        answer = server.http.post("/v1/chat/completions", json=body, headers=headers)
        assert (answer.status_code, error_of(answer)["param"]) == (400, HEADER)
    assert session_of([(HEADER.encode(), "é\udcff".encode("utf-8", "surrogateescape"))]) == "é\udcff"
    assert session_of([]) is None
    with pytest.raises(InvalidRequest, match="513 bytes; at most 512"):
        session_of([(HEADER.encode(), b"x" * 513)])


def test_the_metrics_show_the_split_by_version(server: Server) -> None:
    two_versions(server, "counted", 0.3)
    users = SESSIONS[:150]
    expected = sum(place(server, "counted", user) < 0.3 for user in users)
    answers = [server.say("counted", user=user, max_tokens=3).json()["model"] for user in users]
    assert answers.count("counted@2") == expected > 0
    for model, count in (("counted@1", len(users) - expected), ("counted@2", expected)):
        eventually(lambda m=model, n=count: server.metric("hotshoe_requests_total", model=m, outcome="completed") == n)
        assert server.metric("hotshoe_completion_tokens_total", model=model, counted="usage") == 3 * count
        assert server.metric("hotshoe_request_seconds_count", model=model) == count
    shown = server.http.get("/metrics").text
    assert f'hotshoe_requests_total{{model="counted@2",outcome="completed"}} {float(expected)}' in shown


def test_a_candidate_is_loaded_before_it_gets_its_first_request(make_server: Callable[..., Server]) -> None:
    server = make_server(staged_limit=2)
    two_versions(server, "ahead")
    server.pushed("other")
    server.say("ahead@1")
    server.say("other")
    assert server.http.get("/v1/adapters/ahead/versions/2").json()["residency"] == "absent"
    assert try_out(server, "ahead", 2, 0.5).status_code == 200
    row = server.http.get("/v1/adapters/ahead/versions/2").json()
    assert (row["residency"], row["is_warm"]) == ("resident", True)
    loads = server.metric("hotshoe_adapter_loads_total", outcome="loaded")
    _, candidate = sessions_of_both(server, "ahead", 0.5)
    assert server.say("ahead", user=candidate).json()["model"] == "ahead@2"
    assert server.metric("hotshoe_adapter_loads_total", outcome="loaded") == loads


def test_a_candidate_that_is_no_longer_ready_leaves_its_requests_to_the_aliass_own_version(server: Server) -> None:
    two_versions(server, "fallen", 0.5)
    _, candidate = sessions_of_both(server, "fallen", 0.5)
    registry, where = server.services.registry, ("default", "fallen", 2)
    assert server.say("fallen", user=candidate).json()["model"] == "fallen@2"
    registry.set_status(*where, VersionStatus.QUARANTINED)
    assert server.say("fallen", user=candidate).json()["model"] == "fallen@1"
    assert set(resolved(server, "fallen", [None] * 200)) == {"fallen@1"}
    registry.set_status(*where, VersionStatus.READY)
    assert server.say("fallen", user=candidate).json()["model"] == "fallen@2"


def test_a_roll_back_is_one_call_under_a_second_without_a_load(server: Server) -> None:
    two_versions(server, "back")
    server.pushed("back")
    assert server.promote("back", 2).status_code == 200
    assert try_out(server, "back", 3, 0.5).status_code == 200
    loads = server.metric("hotshoe_adapter_loads_total", outcome="loaded")
    started = time.monotonic()
    answer = server.http.post("/v1/adapters/back/rollback")
    seconds = time.monotonic() - started
    row = answer.json()
    assert (answer.status_code, row["version"], row["candidate"], row["share"]) == (200, 1, None, None)
    assert seconds < 1
    assert {server.say("back").json()["model"] for _ in range(20)} == {"back@1"}
    assert server.metric("hotshoe_adapter_loads_total", outcome="loaded") == loads
    assert server.http.get("/v1/adapters/back/versions/2").json()["residency"] == "resident", "and forward again"
