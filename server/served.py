"""What this server's own engine says to the parity probe: for an export's report, and for the comparison with PEFT."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import structlog

from adapters.errors import HotshoeError
from adapters.parity_served import questions, read_answer
from adapters.types import AdapterVersion, VersionStatus
from server.proxy import EngineProxy
from server.residency import Residents

log = structlog.get_logger("hotshoe.served")
ASK_SECONDS = 120.0


class ServedProbe:
    """Asks the engine about one version, loading it when it is absent."""

    def __init__(self, residents: Residents, proxy: EngineProxy, base_digest: str) -> None:
        self.residents = residents
        self.proxy = proxy
        self.base_digest = base_digest

    async def __call__(self, version: AdapterVersion) -> list[dict[str, Any]]:
        """Its answers; none, with a line in the log, where the engine cannot serve it or is not there."""
        if version.status is not VersionStatus.READY or version.base_digest != self.base_digest:
            return []
        try:
            async with asyncio.timeout(ASK_SECONDS), self.residents.holding(version) as resident:
                replies = [await self.proxy.complete(body) for body in questions(resident.engine_name)]
        except (HotshoeError, TimeoutError) as error:
            log.warning("the engine said nothing to compare with", model=version.ref, reason=str(error)[:300])
            return []
        answers = [read_answer(json.loads(raw)) for status, raw in replies if status == 200]
        return [answer for answer in answers if answer is not None]
