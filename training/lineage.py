"""The adapter that a run goes on from: a folder, or a version of a server by its canonical files over HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

import httpx

from adapters.errors import EngineUnavailable, InvalidRequest, ModelNotFound
from adapters.types import AdapterRef
from training.evaluate import server_root

FILES = ("adapter_config.json", "adapter_model.safetensors")
DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_SECONDS = 60.0


def fetch_version(ref: str, folder: Path) -> str:
    """Write the canonical files of NAME@N from `HOTSHOE_URL` into `folder`; returns the reference.

    Raises InvalidRequest for a reference without a number (an alias could move meanwhile), ModelNotFound, and
    EngineUnavailable where no server answers.
    """
    parsed = AdapterRef.parse(ref)
    if parsed.number is None:
        raise InvalidRequest(f"--from {ref!r} names no version: write {parsed.name}@N, or a folder.", param="from")
    url = server_root(os.environ.get("HOTSHOE_URL") or DEFAULT_URL)
    key = os.environ.get("HOTSHOE_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_SECONDS) as client:
            for name in FILES:
                _download(
                    client, f"/v1/adapters/{quote(parsed.name)}/versions/{parsed.number}/files/{name}", folder / name
                )
    except httpx.TransportError as error:
        raise EngineUnavailable(f"No server answers at {url} (HOTSHOE_URL): {error}.") from error
    return str(parsed)


def _download(client: httpx.Client, path: str, target: Path) -> None:
    with client.stream("GET", path) as response:
        if response.status_code == httpx.codes.NOT_FOUND:
            raise ModelNotFound(
                f"The server at {client.base_url} has no {path.removeprefix('/v1/adapters/')}.", param="from"
            )
        if response.is_error:
            response.read()
            raise InvalidRequest(
                f"The server answered {response.status_code} for {path}: {response.text[:300]}", param="from"
            )
        with target.open("wb") as file:
            for block in response.iter_bytes():
                file.write(block)
