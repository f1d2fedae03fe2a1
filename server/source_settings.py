"""One entry of HOTSHOE_SOURCES: where adapters may be pulled from, for which tenant, how often."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from adapters.errors import ConfigInvalid, HotshoeError
from adapters.sources import HUB_ENDPOINT
from adapters.types import DEFAULT_TENANT, check_name

if TYPE_CHECKING:
    from adapters.sources.found import Source

BUCKETS = ("s3", "gs", "az")
HUB = "hf"
TOKEN_FILE_VARIABLE = "HF_TOKEN_PATH"  # noqa: S105 - a name


class SourceSettings(BaseModel):
    """Its fields are what docs/sources.md lists; a test holds the two equal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="What events, metrics and the list of sources call it.")
    url: str = Field(description="`file:///FOLDER`, `s3://`, `gs://` or `az://` with a prefix, `hf://ORG`.")
    tenant: str = Field(DEFAULT_TENANT, description="Whose adapters they become, and whose keys may pull from it.")
    every_seconds: float | None = Field(
        60.0, ge=1, description="Pause between two looks, in seconds; null: only when it is asked."
    )
    base_is: Literal["served"] | None = Field(
        None, description="`served`: what lies there was made for the served base, whatever its configs claim."
    )
    options: dict[str, str] = Field(
        default_factory=dict, description="For a bucket: obstore's own, such as `endpoint` and `region`; no secrets."
    )
    endpoint: str = Field(HUB_ENDPOINT, description="For the Hub: where it is.")
    token_env: str = Field(
        "HF_TOKEN",
        description="For the Hub: the variable that holds the token; without it `HF_TOKEN_PATH` may name its file.",
    )

    @property
    def scheme(self) -> str:
        return self.url.partition("://")[0]

    @field_validator("name", "tenant")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        return checked(value)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        parts = urlsplit(self.url)
        if self.scheme not in ("file", HUB, *BUCKETS) or "://" not in self.url:
            raise ValueError("url must begin with file://, s3://, gs://, az:// or hf://")
        if parts.query or parts.fragment or "@" in parts.netloc:
            raise ValueError("url must hold no key, user or query: secrets belong in the environment")
        if self.scheme == "file" and (parts.netloc or parts.path in ("", "/")):
            raise ValueError("url must name a folder, as in file:///srv/adapters, and not the whole disk")
        if not self.endpoint.startswith(("https://", "http://")):
            raise ValueError("endpoint must begin with https:// or http://")
        if self.options and self.scheme not in BUCKETS:
            raise ValueError("options are for buckets")
        return self


def checked(name: str) -> str:
    try:
        return check_name(name)
    except HotshoeError as error:
        raise ValueError(error.message) from None


def open_source(settings: SourceSettings) -> Source:
    """The source itself; nothing is asked of it yet. Raises ConfigInvalid, InvalidRequest."""
    if settings.scheme == "file":
        from adapters.sources.folder import WatchedFolder

        return WatchedFolder(Path(unquote(urlsplit(settings.url).path)))
    if settings.scheme == HUB:
        from adapters.sources.hub import HubOrganisation

        return HubOrganisation(settings.url, settings.endpoint, hub_token(settings))
    from adapters.sources.bucket import BucketPrefix

    return BucketPrefix.open(settings.url, settings.options)


def hub_token(settings: SourceSettings) -> str | None:
    """The Hub's token: what the variable holds that the entry names, else the file that HF_TOKEN_PATH names.

    The Hub's own library reads the same file for a base. Raises ConfigInvalid when it cannot be read.
    """
    if token := os.environ.get(settings.token_env):
        return token
    named = os.environ.get(TOKEN_FILE_VARIABLE)
    if not named:
        return None
    try:
        return Path(named).read_text("utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(
            f"{TOKEN_FILE_VARIABLE} names {named}, which cannot be read ({type(error).__name__}).", param="sources"
        ) from error
