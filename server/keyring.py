"""Whom a key lets in, asked at every request. What was read of the registry holds until the registry changes.

A key that was revoked is out from the return of the call that revoked it: this process is the only one that writes the
registry while it runs, and every write of it ends what is remembered here.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable

from adapters.keys import ApiKey, key_digest
from adapters.limits import UseLimits
from adapters.registry import Registry
from server.remembered import Remembered

MAX_KEY_BYTES = 512
SALT_PURPOSE = b"prefix cache of tenant "


class Keyring:
    """The keys of one server: the operator's own, and those in the registry."""

    def __init__(
        self, registry: Registry, pepper: bytes, operator_key: str | None, clock: Callable[[], float] = time.time
    ) -> None:
        self.registry = registry
        self.pepper = pepper
        self._operator_digest = None if operator_key is None else key_digest(pepper, operator_key.encode())
        self._clock = clock
        self._remembered = Remembered(registry)

    async def is_open(self) -> bool:
        """No key is configured and none was ever made: whoever reaches the server is its operator."""
        return self._operator_digest is None and not await self._remembered.get("has keys", self.registry.has_keys)

    def is_operator(self, key: bytes) -> bool:
        """The key is the one that the server was started with."""
        digest = self._operator_digest
        return digest is not None and hmac.compare_digest(key_digest(self.pepper, key), digest)

    async def find(self, key: bytes) -> ApiKey | None:
        """The valid key that these bytes are; None for everything else, whatever is wrong with it."""
        if not 0 < len(key) <= MAX_KEY_BYTES:
            return None
        digest = key_digest(self.pepper, key)
        found = await self._remembered.get(("key", digest), lambda: self.registry.find_key(digest))
        return found if found is not None and found.is_valid(self._clock()) else None

    async def limits_of(self, tenant: str) -> UseLimits:
        """The tenant's limits as they are now."""
        return await self._remembered.get(("limits", tenant), lambda: self.registry.limits_of(tenant))

    def cache_salt(self, tenant: str) -> str:
        """What keeps a tenant's prefix cache apart: the same for ever, and nobody outside can compute it."""
        return hmac.new(self.pepper, SALT_PURPOSE + tenant.encode(), hashlib.sha256).hexdigest()[:32]
