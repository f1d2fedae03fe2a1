"""Settings of the edge that must fit each other, checked before anything starts: origins, root path, proxies."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from adapters.errors import ConfigInvalid
from server.forwarded import Proxies

if TYPE_CHECKING:
    from server.settings import Settings

MAX_HEAD_BYTES = 64 * 1024  # of a request: its line and its headers
ANY_ORIGIN = "*"
# Any scheme: desktop programs and browser extensions have origins of their own, such as app://obsidian.md.
ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?:[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(?::(?P<port>[1-9][0-9]{0,4}))?"
)
DEFAULT_PORTS = {"http": "80", "https": "443"}
ROOT_PATH = re.compile(r"(?:/[A-Za-z0-9._~-]+)+")
OWN_FIRST_SEGMENTS = frozenset(["v1", "health", "ready", "metrics", "tokenize", "detokenize", "openapi.json"])


def check_edge(settings: Settings, has_keys: Callable[[], bool]) -> None:
    """Raises ConfigInvalid. `has_keys`: a key was given or made, so that no request is served without one."""
    for origin in settings.cors_origins:
        check_origin(origin)
    if ANY_ORIGIN in settings.cors_origins and not has_keys():
        raise _needs_key("cors_origins", "lets every web page ask this server", "or name the origins of your pages")
    check_root_path(settings.root_path or "")
    check_proxies(settings.trusted_proxies)
    if settings.trusted_proxies and not has_keys():
        raise _needs_key("trusted_proxies", "brings in requests of other machines", "or leave it out")


def check_origin(origin: str) -> None:
    """Raises ConfigInvalid for what a browser would never send as `Origin`: then nothing would match it."""
    if origin == ANY_ORIGIN:
        return
    found = ORIGIN.fullmatch(origin)
    if found is None:
        raise ConfigInvalid(
            f"cors_origins has {origin[:100]!r}: an origin is scheme://host or scheme://host:port in lower case, as in "
            '["https://chat.example.org", "http://localhost:3000"].',
            param="cors_origins",
        )
    if found["port"] is not None and found["port"] == DEFAULT_PORTS.get(found["scheme"]):
        raise ConfigInvalid(
            f"cors_origins has {origin}: browsers leave out the port {found['port']} of {found['scheme']}: do so too.",
            param="cors_origins",
        )


def check_root_path(root_path: str) -> None:
    """Raises ConfigInvalid for a prefix that cannot be told from the routes behind it."""
    if not root_path:
        return
    if not ROOT_PATH.fullmatch(root_path) or {".", ".."} & set(root_path.split("/")):
        raise ConfigInvalid(
            f"root_path is {root_path[:100]!r}: it is a path such as /llm, with a slash in front and none at the end.",
            param="root_path",
        )
    first = root_path.split("/")[1]
    if first in OWN_FIRST_SEGMENTS:
        raise ConfigInvalid(
            f"root_path {root_path} begins as routes of this server do (/{first}): choose another prefix.",
            param="root_path",
        )


def check_proxies(names: tuple[str, ...]) -> Proxies:
    """The proxies of the setting; raises ConfigInvalid."""
    try:
        proxies = Proxies.read(names)
    except ValueError as error:
        raise ConfigInvalid(
            f'trusted_proxies: {error}. Give addresses and networks, as in ["10.0.0.7", "192.168.8.0/24"].',
            param="trusted_proxies",
        ) from None
    if any(network.prefixlen == 0 for network in proxies.networks):
        raise ConfigInvalid(
            "trusted_proxies names every address: anybody could then say who he is. Name the proxies.",
            param="trusted_proxies",
        )
    return proxies


def _needs_key(name: str, why: str, otherwise: str) -> ConfigInvalid:
    return ConfigInvalid(
        f"{name} {why}, and no API key is set: give --api-key (or HOTSHOE_API_KEY), make one with "
        f"`hotshoe keys create --scope admin`, {otherwise}.",
        param=name,
    )
