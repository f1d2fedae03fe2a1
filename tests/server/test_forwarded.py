"""Whom a request is from, as far as named proxies say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from adapters.errors import ConfigInvalid
from server.edge_settings import check_proxies
from server.forwarded import Proxies, plain_address
from server.settings import Settings, load_settings
from tests.fixtures.service import Server, error_of

KEY = "a-key-of-the-proxies"
PROXIES = Proxies.read(["10.0.0.0/8", "fd00::/8", "127.0.0.1"])


def seen(peer: str, *headers: tuple[str, str], proxies: Proxies = PROXIES) -> dict[str, Any]:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    scope = {"type": "http", "client": (peer, 1), "scheme": "http", "headers": raw}
    return dict(proxies.see_through(scope))


def client(peer: str, *forwarded_for: str) -> str:
    found: str = seen(peer, *(("x-forwarded-for", value) for value in forwarded_for))["client"][0]
    return found


@pytest.mark.parametrize(
    ("forwarded_for", "expected"),
    [
        (["203.0.113.9"], "203.0.113.9"),
        (["6.6.6.6, 203.0.113.9"], "203.0.113.9"),  # what a client wrote itself is on the left
        (["6.6.6.6, 203.0.113.9, 10.1.1.1"], "203.0.113.9"),
        (["6.6.6.6", "203.0.113.9, 10.1.1.1"], "203.0.113.9"),  # two headers are one list
        (["10.3.3.3, 10.2.2.2"], "10.3.3.3"),  # all are proxies: the first of them
        (["203.0.113.9:51234"], "203.0.113.9"),
        (["[2001:db8::1]:443"], "2001:db8::1"),
        (["2001:DB8:0::0001"], "2001:db8::1"),
        (["fe80::1%eth0"], "fe80::1"),
        (["::ffff:203.0.113.9"], "203.0.113.9"),
        (['"203.0.113.9"'], "203.0.113.9"),
        ([], "10.0.0.7"),
        ([""], "10.0.0.7"),
        (["unknown"], "10.0.0.7"),
        (["203.0.113.9, unknown"], "10.0.0.7"),
        (["203.0.113.9, unknown, 10.1.1.1"], "10.1.1.1"),
        (["203.0.113.9,"], "10.0.0.7"),
        (["a\r\nb: c"], "10.0.0.7"),
        (["\x1b[31m203.0.113.9"], "10.0.0.7"),
        (["127.1"], "10.0.0.7"),
        (["0x7f.1, 1" + "0" * 100_000], "10.0.0.7"),
    ],
)
def test_the_client_is_the_rightmost_address_that_is_no_named_proxys(forwarded_for: list[str], expected: str) -> None:
    assert client("10.0.0.7", *forwarded_for) == expected


def test_from_anybody_else_the_headers_say_nothing() -> None:
    lies = [
        ("x-forwarded-for", "6.6.6.6"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-host", "evil"),
        ("host", "me"),
    ]
    for proxies, peer in ((PROXIES, "203.0.113.9"), (Proxies(), "10.0.0.7"), (Proxies(), "127.0.0.1")):
        found = seen(peer, *lies, proxies=proxies)
        assert (found["client"], found["scheme"]) == ((peer, 1), "http")
        assert dict(found["headers"])[b"host"] == b"me"


def test_ten_thousand_hops_are_looked_at_from_the_right_and_no_further_than_needed() -> None:
    hops = ", ".join(f"6.{number // 250}.6.{number % 250}" for number in range(10_000))
    assert client("10.0.0.7", f"{hops}, 203.0.113.9, 10.1.1.1") == "203.0.113.9"
    assert client("10.0.0.7", ", ".join(["10.1.1.1"] * 10_000)) == "10.1.1.1"
    assert client("10.0.0.7", "203.0.113.9, " + ", ".join(["10.1.1.1"] * 100)) == "10.1.1.1"


def test_scheme_and_host_are_the_nearest_proxys_and_only_if_they_can_be_such() -> None:
    found = seen(
        "127.0.0.1", ("host", "a"), ("x-forwarded-proto", "http, https"), ("x-forwarded-host", "b, c.example:8443")
    )
    assert found["scheme"] == "https" and dict(found["headers"])[b"host"] == b"c.example:8443"
    for host in ("a b", "a/b", "a\r\nb", "", "a@b", "x" * 300, "[::1", "a?b"):
        found = seen("127.0.0.1", ("host", "kept"), ("x-forwarded-host", host), ("x-forwarded-proto", "gopher"))
        assert dict(found["headers"])[b"host"] == b"kept" and found["scheme"] == "http", host


def test_an_address_has_one_spelling() -> None:
    assert plain_address("::FFFF:10.0.0.1") == "10.0.0.1"
    assert plain_address("[fe80::1%25eth0]:80") == "fe80::1"
    assert plain_address("localhost") is None and plain_address("1.2.3.4.5") is None


@pytest.mark.parametrize("value", ["proxy.example", "10.0.0.0/33", "10.0.0.1/8", "*", "", "0.0.0.0/0", "::/0"])
def test_what_names_no_proxy_or_everybody_is_no_setting(value: str) -> None:
    with pytest.raises(ConfigInvalid, match="trusted_proxies"):
        check_proxies((value,))


def test_proxies_want_a_key_because_they_bring_other_machines_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"HOTSHOE_{name.upper()}", raising=False)
    with pytest.raises(ConfigInvalid, match="no API key is set") as caught:
        load_settings(trusted_proxies=("127.0.0.1",), home=tmp_path)
    assert caught.value.param == "trusted_proxies"
    assert load_settings(trusted_proxies=("127.0.0.1",), api_key=KEY).trusted_proxies == ("127.0.0.1",)


@pytest.mark.parametrize("header", ["Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP"])
def test_without_keys_what_a_proxy_of_this_machine_passes_on_is_not_local(server: Server, header: str) -> None:
    answer = server.http.get("/v1/models", headers={header: "127.0.0.1"})
    assert (answer.status_code, error_of(answer)["code"]) == (403, "forbidden")
    assert "HOTSHOE_TRUSTED_PROXIES" in error_of(answer)["message"]
    assert server.http.get("/v1/models").status_code == 200


def test_with_a_key_forwarding_headers_of_a_stranger_change_nothing(make_server: Callable[..., Server]) -> None:
    server = make_server(api_key=KEY)
    assert server.http.get("/v1/models", headers={"x-forwarded-for": "6.6.6.6", "via": "1.1 x"}).status_code == 200
    assert httpx.get(f"{server.url}/v1/models", headers={"x-forwarded-for": "127.0.0.1"}).status_code == 401
