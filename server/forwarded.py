"""What named proxies say of a request: its client, scheme and host. From anybody else the same headers say nothing."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Scope

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Headers = Iterable[tuple[bytes, bytes]]

MAX_HOPS = 32  # of X-Forwarded-For, from the right: what lies beyond is nobody's proxy
MAX_ADDRESS_CHARACTERS = 64
HOST = re.compile(rb"(?:[A-Za-z0-9._-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
FORWARDING_HEADERS = frozenset(
    (b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip")
)


@dataclass(frozen=True, slots=True)
class Proxies:
    """The addresses whose forwarding headers are believed; none by default."""

    networks: tuple[Network, ...] = ()

    @classmethod
    def read(cls, names: Iterable[str]) -> Proxies:
        """From addresses and CIDRs; raises ValueError with the one that is neither."""
        return cls(tuple(ipaddress.ip_network(name.strip()) for name in names))

    def holds(self, address: str) -> bool:
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(found in network for network in self.networks)

    def see_through(self, scope: Scope) -> Scope:
        """The scope with client, scheme and Host as the proxy that the request came from says, where it is named."""
        peer = scope.get("client")
        if not self.networks or not peer or not self.holds(plain_address(peer[0]) or ""):
            return scope
        headers = scope["headers"]
        seen = {**scope, "client": (self.client_of(plain_address(peer[0]) or "", headers), 0)}
        scheme = last_of(headers, b"x-forwarded-proto")
        if scheme in (b"http", b"https"):
            seen["scheme"] = scheme.decode()
        host = last_of(headers, b"x-forwarded-host")
        if host is not None and HOST.fullmatch(host):
            seen["headers"] = [(name, value) for name, value in headers if name != b"host"] + [(b"host", host)]
        return seen

    def client_of(self, peer: str, headers: Headers) -> str:
        """The rightmost address that is not a named proxy's.

        Each proxy adds whom it spoke to on the right, so what a client wrote itself is on the left. A word that is no
        address ends the walk: then the proxy that passed it on is the nearest that is known.
        """
        known = peer
        for number, word in enumerate(from_the_right(headers, b"x-forwarded-for")):
            address = plain_address(word.decode("latin-1"))
            if address is None or number == MAX_HOPS:
                break
            known = address
            if not self.holds(address):
                break
        return known


def is_forwarded(headers: Headers) -> bool:
    """Some proxy says that it passed the request on."""
    return any(name in FORWARDING_HEADERS for name, _ in headers)


def plain_address(word: str) -> str | None:
    """An address without port, brackets and zone, in its one spelling; None for a word that is none."""
    word = word.strip().strip('"')
    if len(word) > MAX_ADDRESS_CHARACTERS:
        return None
    if word.startswith("["):
        word = word[1:].partition("]")[0]
    elif word.count(":") == 1:
        word = word.partition(":")[0]
    try:
        address = ipaddress.ip_address(word.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def last_of(headers: Headers, name: bytes) -> bytes | None:
    """The last word of a header: what the nearest proxy wrote."""
    return next(from_the_right(headers, name), None)


def from_the_right(headers: Headers, name: bytes) -> Iterator[bytes]:
    """The comma-separated words of a header, which may be there several times; last first, split as they are asked."""
    for value in reversed([value for found, value in headers if found == name]):
        rest = value
        while rest:
            rest, _, word = rest.rpartition(b",")
            yield word.strip()
