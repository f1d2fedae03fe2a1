"""The operator's hand on keys and tenants: through a running server, or on its state folder while none runs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from server.cli.client import Client, Unreachable, open_client

if TYPE_CHECKING:
    from adapters.registry import Registry

ACTOR = "operator"
Rows = list[dict[str, Any]]


class Admin(Protocol):
    """What both ways can do; every answer is as the HTTP route gives it."""

    def create_key(self, body: dict[str, Any]) -> dict[str, Any]: ...
    def keys(self, tenant: str | None) -> Rows: ...
    def revoke_key(self, key_id: str) -> dict[str, Any]: ...
    def tenants(self) -> Rows: ...
    def set_tenant(self, tenant: str, limits: dict[str, int] | None) -> dict[str, Any]: ...
    def grants(self, tenant: str) -> Rows: ...
    def share(self, owner: str, name: str, grantee: str) -> dict[str, Any]: ...
    def unshare(self, owner: str, name: str, grantee: str) -> dict[str, Any]: ...
    def usage(self, **query: str | None) -> Rows: ...


class RemoteAdmin:
    """Through a server's routes, with a key that has the scope admin."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def create_key(self, body: dict[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = self.client.post("/v1/keys", json=body)
        return row

    def keys(self, tenant: str | None) -> Rows:
        return self._rows("/v1/keys", tenant=tenant)

    def revoke_key(self, key_id: str) -> dict[str, Any]:
        row: dict[str, Any] = self.client.call("DELETE", f"/v1/keys/{key_id}")
        return row

    def tenants(self) -> Rows:
        return self._rows("/v1/tenants")

    def set_tenant(self, tenant: str, limits: dict[str, int] | None) -> dict[str, Any]:
        row: dict[str, Any] = self.client.call("PUT", f"/v1/tenants/{tenant}", json={"limits": limits})
        return row

    def grants(self, tenant: str) -> Rows:
        return self._rows(f"/v1/tenants/{tenant}/grants")

    def share(self, owner: str, name: str, grantee: str) -> dict[str, Any]:
        row: dict[str, Any] = self.client.call("PUT", f"/v1/tenants/{owner}/grants/{name}/{grantee}")
        return row

    def unshare(self, owner: str, name: str, grantee: str) -> dict[str, Any]:
        row: dict[str, Any] = self.client.call("DELETE", f"/v1/tenants/{owner}/grants/{name}/{grantee}")
        return row

    def usage(self, **query: str | None) -> Rows:
        return self._rows("/v1/usage", **query)

    def _rows(self, path: str, **query: str | None) -> Rows:
        params = {name: value for name, value in query.items() if value is not None}
        rows: Rows = self.client.get(path, params=params)["data"]
        return rows


class OfflineAdmin:
    """On the registry of a state folder that this process holds the lock of."""

    def __init__(self, registry: Registry, pepper: bytes) -> None:
        self.registry = registry
        self.pepper = pepper

    def create_key(self, body: dict[str, Any]) -> dict[str, Any]:
        from server.routes.keys import KeyBody, key_row, new_key

        row, secret = self.registry.add_key(new_key(KeyBody(**body)), self.pepper, actor=ACTOR)
        return {**key_row(row), "key": secret}

    def keys(self, tenant: str | None) -> Rows:
        from server.routes.keys import key_row

        return [key_row(row) for row in self.registry.keys(tenant)]

    def revoke_key(self, key_id: str) -> dict[str, Any]:
        from server.routes.keys import key_row

        return key_row(self.registry.revoke_key(key_id, actor=ACTOR))

    def tenants(self) -> Rows:
        from server.routes.tenants import tenant_row

        return [tenant_row(row) for row in self.registry.tenants()]

    def set_tenant(self, tenant: str, limits: dict[str, int] | None) -> dict[str, Any]:
        from adapters.limits import UseLimits
        from server.routes.tenants import tenant_row

        wanted = None if limits is None else UseLimits.read(limits)
        return tenant_row(self.registry.add_tenant(tenant, wanted, actor=ACTOR))

    def grants(self, tenant: str) -> Rows:
        from server.routes.tenants import grant_row

        self.registry.get_tenant(tenant)
        return [grant_row(row) for row in self.registry.grants(tenant=tenant) + self.registry.grants(grantee=tenant)]

    def share(self, owner: str, name: str, grantee: str) -> dict[str, Any]:
        from server.routes.tenants import grant_row

        return grant_row(self.registry.add_grant(owner, name, grantee, actor=ACTOR))

    def unshare(self, owner: str, name: str, grantee: str) -> dict[str, Any]:
        from server.routes.tenants import removed_grant_row

        self.registry.remove_grant(owner, name, grantee, actor=ACTOR)
        return removed_grant_row(owner, name, grantee)

    def usage(self, **query: str | None) -> Rows:
        tenant = query.pop("tenant", None)
        found = self.registry.usage(None if tenant == "*" else tenant or "default", **query)
        return [{"object": "usage", **row.as_dict()} for row in found]


@contextmanager
def open_admin(home: Path | None) -> Iterator[Admin]:
    """The server at `HOTSHOE_URL`; the state folder when one is named, or when nothing is at the default address.

    Raises AlreadyRunning while a server holds the folder.
    """
    if home is None and (os.environ.get("HOTSHOE_URL") or _answers()):
        with open_client() as client:
            yield RemoteAdmin(client)
        return
    from adapters.registry import Registry
    from server.lifecycle import state_lock
    from server.settings import load_settings, pepper_of

    settings = load_settings(home=home)
    with state_lock(settings.home):
        registry = Registry.open(settings.home)
        try:
            yield OfflineAdmin(registry, pepper_of(settings))
        finally:
            registry.close()


def seconds_of(text: str) -> int:
    """The life of a key: `90s`, `15m`, `12h` or `30d` as seconds; raises InvalidRequest."""
    return duration_seconds(text, "expires", "the life of a key")


def duration_seconds(text: str, param: str, what: str) -> int:
    """`90s`, `15m`, `12h` or `30d` as seconds; raises InvalidRequest."""
    from adapters.errors import InvalidRequest
    from adapters.keys import MAX_LIFE_SECONDS

    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    number, unit = text[:-1], text[-1:]
    is_time = unit in units and number.isascii() and number.isdigit() and len(number) < 10
    seconds = int(number) * units[unit] if is_time else 0
    if not 0 < seconds <= MAX_LIFE_SECONDS:
        raise InvalidRequest(
            f"{text[:40]!r} is not {what}: write 90s, 15m, 12h or 30d, 100 years at most.", param=param
        )
    return seconds


def day_of(seconds: float | None) -> str:
    """A time for people, `-` for none."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def _answers() -> bool:
    try:
        with open_client(timeout_seconds=5.0) as client:
            client.get("/health")
    except Unreachable:
        return False
    return True
