"""Model ids: one spelling each, and nothing that could be a path."""

from __future__ import annotations

import pytest

from adapters.errors import NameInvalid
from adapters.types import STABLE, AdapterRef, check_name


def test_a_bare_name_means_stable() -> None:
    ref = AdapterRef.parse("support-router")
    assert (ref.name, ref.number, ref.alias, str(ref)) == ("support-router", None, STABLE, "support-router")


def test_a_number_and_an_alias_are_told_apart() -> None:
    assert AdapterRef.parse("router@3").number == 3
    assert AdapterRef.parse("router@canary").alias == "canary"
    assert str(AdapterRef.parse("router@canary")) == "router@canary"


@pytest.mark.parametrize(
    "text",
    [
        *("", "..", "a/../b", "%2e%2e", "a\0b", "a\r\nb", "a‮b", "-lead", ".hidden", "a" * 64, "café", "cafe\u0301"),
        *("router@", "router@0", "router@03", "router@1@2", "@3", "router@../x", "router@٣", "router@²"),
    ],
)
def test_u7_names_that_are_not_names_are_refused(text: str) -> None:
    with pytest.raises(NameInvalid):
        AdapterRef.parse(text)


def test_a_refusal_does_not_echo_without_bound() -> None:
    with pytest.raises(NameInvalid) as caught:
        check_name("x" * 100_000)
    assert len(caught.value.message) < 300
