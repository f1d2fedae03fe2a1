"""Does what an adapter says of its base mean the base at hand? Decided on the text alone: nothing is opened."""

from __future__ import annotations

import ntpath
import os.path
import re

from adapters.bases import BaseModel

# Publishers of the supported bases and of plain copies of them; another owner's copy must be declared by the operator.
PUBLISHERS = ("qwen", "unsloth", "mlx-community")
QUANTISED = re.compile(
    r"(-unsloth)?(-bnb-4bit|-bnb-8bit|-awq(-int4)?|-gptq-int[48]|-gptq|-fp8(-dynamic)?|-int[48]|-mlx|"
    r"(-mlx)?-[34568]bit(-dwq)?|(-mlx)?-bf16)$",
    re.ASCII,
)
WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|\\\\|\.{1,2}\\", re.ASCII)
HUB_ID = re.compile(r"(?P<owner>[A-Za-z0-9][\w.-]*)/(?P<name>[A-Za-z0-9][\w.-]*)", re.ASCII)


def claim_means(claim: str, base: BaseModel) -> bool:
    """True when the claim is the base's digest, path, id or declared name, or a publisher's (quantised) copy of it."""
    if claim == base.digest:
        return True
    names = {_plain(name) for name in (base.id, *base.names)}
    if _plain(claim) in names:
        return True
    match = HUB_ID.fullmatch(claim)
    if not match:
        return False
    owners = {found["owner"].lower() for name in base.names if (found := HUB_ID.fullmatch(name))}
    if match["owner"].lower() not in {*PUBLISHERS, *owners}:
        return False
    return without_quantisation(match["name"]) in {without_quantisation(_last(name)) for name in names}


def without_quantisation(name: str) -> str:
    """`Qwen2.5-7B-Instruct-bnb-4bit` -> `qwen2.5-7b-instruct`: the 16-bit model a quantised copy was made from."""
    return QUANTISED.sub("", name.lower())


def _plain(name: str) -> str:
    """A path normalised as text (Windows knows no case); a Hub id in lower case, as the Hub compares them."""
    if WINDOWS_PATH.match(name):
        return ntpath.normpath(name).lower()
    if name.startswith(("/", "./", "../", "~")):
        return os.path.normpath(name)
    return name.rstrip("/").lower()


def _last(name: str) -> str:
    return name.rpartition("/")[2]
