"""The models that are asked: opened here or named on a server, and what the ledger calls an adapter."""

from __future__ import annotations

from pathlib import Path

from adapters.errors import ConfigInvalid, DataInvalid
from adapters.staging import sha256
from training.baseline import forms
from training.baseline.asking import Asker, Local, Served
from training.baseline.ground import Ground
from training.data.columns import Columns
from training.data.formats import read_data
from training.evaluation import answering
from training.reference import Reference, open_reference, read_card, refuse_another_base


def served_base(ground: Ground) -> Served | None:
    """The base of the server that was named; raises EngineUnavailable where none answers."""
    asked = ground.asked
    if asked.url is None:
        return None
    return Served(asked.url, answering.served_base(asked.url, asked.api_key), asked.api_key)


def base_of(ground: Ground, served: Served | None) -> tuple[Asker, Reference | None]:
    """Who answers as the base: the `served` one, or the base opened here. It is opened for the probe, too."""
    if served is not None:
        return served, Reference(ground.base) if ground.wants_probe else None
    reference = Reference(ground.base)
    return _local(ground, reference), reference


def served_adapter(ground: Ground) -> Served | None:
    """The adapter on a server; None for one that has to be opened here, which waits until the base is out of memory."""
    asked = ground.asked
    if asked.served is None:
        return None
    if asked.url is None:
        raise ConfigInvalid(f"{asked.served} is asked of a server: give its --url.", param="url")
    return Served(asked.url, asked.served, asked.api_key, asked.thinking)


def opened_adapter(ground: Ground) -> Local:
    """The adapter on the base here, or the whole model that full fine-tuning left."""
    folder = ground.asked.adapter
    if folder is None:
        raise ValueError("an adapter that is not served needs its folder")
    is_adapter = (folder / "adapter_config.json").is_file()
    reference = Reference(ground.base, folder) if is_adapter else open_reference(folder)
    return _local(ground, reference)


def _local(ground: Ground, reference: Reference) -> Local:
    return Local(reference, f"on the reference path in {forms.stored_form(ground.base)}")


def trained_on(folder: Path) -> dict[str, str]:
    """The digests of the files that an adapter's card says it learned from and was stopped by."""
    data = read_card(folder).get("data")
    parts = data if isinstance(data, dict) else {}
    return {
        name: str(part["digest"])
        for name in ("training", "validation")
        if isinstance(part := parts.get(name), dict) and "digest" in part
    }


def _refuse_seen(ground: Ground, folder: Path) -> None:
    """Raises DataInvalid where the adapter learned from the test file, or was stopped by it."""
    test, learned = ground.asked.test, trained_on(folder)
    if test is None or not learned:
        return
    asked = read_data(test, Columns(ground.asked.columns)).digest
    seen = [name for name, digest in learned.items() if digest == asked]
    if seen:
        raise DataInvalid(
            f"{folder} had {test} as its {seen[0]} data, as its card says, so a score on it proves nothing: give the "
            "verdict test rows of its own.",
            param="test",
        )


def identity(ground: Ground) -> str:
    """What the ledger calls the adapter: its weights, or its name on a server. Raises for a folder of another base."""
    folder = ground.asked.adapter
    if folder is None:
        return f"served {ground.asked.served}"
    if (folder / "adapter_config.json").is_file():
        refuse_another_base(read_card(folder), ground.base, folder)
    _refuse_seen(ground, folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ConfigInvalid(f"{folder} holds no safetensors: it is neither an adapter nor a model.", param="adapter")
    return " ".join(f"sha256:{sha256(path)}" for path in weights)
