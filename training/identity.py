"""What makes a run the one it is: two runs with the same identity take the same steps.

A checkpoint is only gone on from by the run that wrote it, so that what comes out is what one run would have made.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import ConfigInvalid
from adapters.staging import sha256
from training.config import Settings, TrainingConfig

if TYPE_CHECKING:
    from training.data.dataset import Prepared
    from training.material import Material

MOST_SHOWN = 60
STEPS_ALONE = ("checkpoint_steps",)  # of the settings: changes no weight
ROUNDING_ALONE = ("pass_size", "accumulation", "evaluation_pass_size")  # how a step's rows are parted, less or more


def identity(config: TrainingConfig, settings: Settings, material: Material) -> dict[str, Any]:
    """Name, base, settings and data, flat, as values that compare; the data's digest is of the tokens trained on."""
    chosen = {key: value for key, value in settings.as_dict().items() if key not in (*STEPS_ALONE, *ROUNDING_ALONE)}
    return {
        "name": config.name,
        "parent": config.parent,
        "base": material.base.digest,
        "template": material.template.digest,
        "from": _adapter_digest(config.initial_adapter),
        **chosen,
        "data": _data_digest(material.training),
        "validation": None if material.validation is None else _data_digest(material.validation),
    }


def write_identity(file: Path, found: dict[str, Any]) -> None:
    file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def check_identity(file: Path, found: dict[str, Any]) -> None:
    """Raises ConfigInvalid, naming all that differs, where the run that wrote `file` was another one."""
    try:
        before: dict[str, Any] = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigInvalid(
            f"{file} cannot be read, so this run cannot be resumed: {error}.", param="resume"
        ) from error
    named = [key for key in {**before, **found} if key not in (*STEPS_ALONE, *ROUNDING_ALONE)]
    differ = [key for key in named if before.get(key) != found.get(key)]
    if differ:
        raise ConfigInvalid(
            f"The run that was cut off had {'; '.join(_difference(key, before, found) for key in differ)}. "
            f"Resume with what it had, or remove {file.parent} to begin again.",
            param=differ[0],
        )


def _difference(key: str, before: dict[str, Any], found: dict[str, Any]) -> str:
    if key in ("data", "validation"):
        return f"other {'validation ' if key == 'validation' else ''}data (or another rendering of it)"
    was, now = (str(side.get(key, "nothing"))[:MOST_SHOWN] for side in (before, found))
    return f"{key} {was}, not {now}"


def _data_digest(prepared: Prepared) -> str:
    """sha256 of every sequence's tokens and labels, in their order."""
    digest = hashlib.sha256()
    for sequence in prepared.sequences:
        for values in (sequence.input_ids, sequence.labels):
            digest.update(array("q", (len(values), *values)).tobytes())
    return f"sha256:{digest.hexdigest()}"


def _adapter_digest(folder: Path | None) -> str | None:
    return None if folder is None else f"sha256:{sha256(folder / 'adapter_model.safetensors')}"
