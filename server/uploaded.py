"""What an upload says beside its files of how the version is to be served, checked: defaults and a chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.bases import BaseModel
from adapters.canonical import refused
from adapters.chat_template import base_template, probe_template, special_tokens, template_digest
from adapters.errors import Problem
from adapters.serving import TEMPLATE_FILE, Serving
from server.serving import TEMPLATE_SETTING, read_serving
from server.uploads import Upload


def serving_of(upload: Upload, base: BaseModel, card: Mapping[str, Any] | None, *, allows_templates: bool) -> Serving:
    """Raises AdapterRefused. Blocks while a template is tried out: not for the event loop."""
    defaults = read_serving(upload.serving) if upload.serving is not None else {}
    if upload.chat_template is None:
        return Serving(defaults)
    template = _text(upload.chat_template)
    _check_card(template, card)
    if template == base_template(base.folder):
        return Serving(defaults, dropped=(f"file {TEMPLATE_FILE}: it is the base's own",))
    if not allows_templates:
        message = "is a program that the engine would run, and the operator of this server does not allow that"
        advice = f"Leave it out, or have the operator set {TEMPLATE_SETTING}=true."
        raise refused((Problem("file_not_allowed", TEMPLATE_FILE, message, advice),))
    problem = probe_template(template, special_tokens(base.folder))
    if problem is not None:
        raise refused((problem,))
    return Serving(defaults, template)


def _text(raw: bytes) -> str:
    """The template with the line ends that transformers reads it with, so that its digest is the card's."""
    try:
        return raw.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        problem = Problem("template_invalid", TEMPLATE_FILE, f"is not UTF-8 (byte {error.start})")
        raise refused((problem,)) from None


def _check_card(template: str, card: Mapping[str, Any] | None) -> None:
    """The card of a run names the template that its rows were rendered with."""
    entry = card.get("template") if card else None
    claimed = entry.get("digest") if isinstance(entry, Mapping) else None
    found = template_digest(template)
    if isinstance(claimed, str) and claimed != found:
        message = f"is {found}, and the card says that the run rendered with {claimed[:80]}"
        advice = "Send the template of that run, or leave it out where it is the base's."
        raise refused((Problem("template_mismatch", TEMPLATE_FILE, message, advice),))
