"""What the best prompt and the adapter cost when they are served: tokens of the prompt, and seconds to the first token.

The two are asked in alternation, a few rows at a time and one request at a time, so that what else the machine does
falls on both. A prompt of examples that never change is mostly found in the engine's prefix cache, as it would be.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from adapters.errors import EngineUnavailable, InvalidRequest
from training.baseline.asking import Served
from training.compare import evenly
from training.evaluate import Prompt, generate_http

ROWS_TIMED = 24
ROWS_AT_A_TIME = 4
TIMEOUT_SECONDS = 60.0


def base_id(url: str, api_key: str = "") -> str:
    """The id of the base that a server serves; raises EngineUnavailable where none answers."""
    import httpx

    try:
        with _client(url, api_key) as client:
            response = client.get("/v1/models")
    except httpx.HTTPError as error:
        raise EngineUnavailable(f"No server answers at {url} ({error}): start one with `hotshoe serve`.") from error
    if response.is_error:
        raise InvalidRequest(f"The server at {url} answered {response.status_code} for its models.", param="url")
    return str(response.json()["data"][0]["id"])


def enable_thinking(url: str, model: str, api_key: str = "") -> bool | None:
    """What the card of a served NAME or NAME@N says of thinking; None where it has none, or says nothing."""
    import httpx

    name, _, wanted = model.partition("@")
    path = f"/v1/adapters/{quote(name, safe='')}"
    try:
        with _client(url, api_key) as client:
            aliases = {row["alias"]: row["version"] for row in client.get(path).json().get("aliases", ())}
            number = int(wanted) if wanted.isdigit() else aliases.get(wanted or "stable")
            card = client.get(f"{path}/versions/{number}").json().get("card")
    except (httpx.HTTPError, ValueError):  # the questions that follow say what is wrong with the server
        return None
    template = card.get("template") if isinstance(card, dict) else None
    thinking = template.get("enable_thinking") if isinstance(template, dict) else None
    return thinking if isinstance(thinking, bool) else None


def _client(url: str, api_key: str) -> Any:
    import httpx

    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.Client(base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=TIMEOUT_SECONDS)


def timed(base: Served, adapter: Served, prompts: Sequence[Prompt], plain: Sequence[Prompt]) -> dict[str, Any]:
    """Median seconds to the first token of both, over the same rows."""
    chosen = evenly(range(len(plain)), ROWS_TIMED)
    first: dict[str, list[float]] = {"prompt": [], "adapter": []}
    for start in range(0, len(chosen), ROWS_AT_A_TIME):
        rows = chosen[start : start + ROWS_AT_A_TIME]
        for name, model, asked in (("prompt", base, prompts), ("adapter", adapter, plain)):
            found = generate_http(
                model.url,
                model.model,
                [asked[row] for row in rows],
                api_key=model.api_key,
                max_tokens=1,
                concurrency=1,
            )
            first[name] += [answer.ttft_seconds for answer in found]
    medians = {name: round(statistics.median(values), 4) for name, values in first.items()}
    return {"rows": len(chosen), "ttft_p50_seconds": medians}
