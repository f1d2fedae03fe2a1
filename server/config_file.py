"""`hotshoe serve --config FILE`: the settings as YAML, by the names of `Settings`, and vLLM's flags under `engine:`.

`engine:` is a mapping of vLLM's flags without dashes; `engine: scripted` chooses the double, as the variable does.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from adapters.errors import ConfigInvalid
from adapters.strict_yaml import read_mapping

MAX_DEPTH = 6  # a speculative config in the engine section is three deep
SECRETS = ("api_key", "key_pepper")
READABLE_BY_OTHERS = 0o004


def read_settings_file(path: Path, known: Collection[str]) -> dict[str, Any]:
    """Values by setting, vLLM's flags as `engine_args`; an empty value leaves one open. Raises ConfigInvalid."""
    values: dict[str, Any] = {}
    for key, (value, line) in read_mapping(path, max_depth=MAX_DEPTH, as_text=False).items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "docs/operations.md lists them; vLLM's stand under engine."
            raise ConfigInvalid(f"{path}:{line}: there is no setting {key[:80]!r}; {hint}", param=key[:80])
        flags = name == "engine" and isinstance(value, Mapping)
        name, value = ("engine_args", tuple(flags_of(value, f"{path}:{line}"))) if flags else (name, value)
        if name in values:
            raise ConfigInvalid(f"{path}:{line}: {name} is set twice, with vLLM's flags under engine.", param=name)
        if value is not None:
            values[name] = value
    warn_of_readers(path, values)
    return values


def flags_of(section: Mapping[Any, Any], where: str) -> Iterator[str]:
    """A mapping as vLLM's words: `true` a switch, `false` its `--no-` form, a mapping JSON; raises ConfigInvalid."""
    for key, value in section.items():
        name = str(key)
        if not name or name.startswith("-") or any(not letter.isprintable() or letter in " =" for letter in name):
            raise ConfigInvalid(
                f"{where}: engine has {name[:80]!r}: write vLLM's flag without its dashes.", param="engine"
            )
        if value is None:
            continue
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}"
        elif isinstance(value, list):
            yield f"--{name}"
            yield from (word(item) for item in value)
        else:
            yield f"--{name}={word(value)}"


def word(value: Any) -> str:
    """One value as it stands on a command line."""
    return json.dumps(value, default=str) if isinstance(value, dict | list | bool) else str(value)


def warn_of_readers(path: Path, values: Mapping[str, Any]) -> None:
    """A secret in a file that everybody on the machine may read is worth a word; it is not ours to forbid."""
    secrets = [name for name in SECRETS if name in values]
    if secrets and path.stat().st_mode & READABLE_BY_OTHERS:
        sys.stderr.write(f"warning: {path} holds {' and '.join(secrets)} and everybody may read it: chmod 600 {path}\n")
