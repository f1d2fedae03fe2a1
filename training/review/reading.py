"""A config file as a reading: its dialect told by its keys, every value with its key and line, unknown keys listed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from adapters.errors import ConfigInvalid
from adapters.strict_json import JsonInvalid, parse_json
from adapters.strict_yaml import MAX_BYTES, read_mapping
from training.config import TrainingConfig
from training.review.dialects import DIALECTS, Dialect
from training.review.llama_factory import V1
from training.review.words import Given, Reading, Unknown

MAX_DEPTH = 8
MAX_VALUES = 4_000  # of a JSON file
MOST_COMPARED = 40  # unknown keys that are told the nearest known one
Raw = dict[str, Given]


def read(path: Path, dialect: str | None = None) -> Reading:
    """The file in the neutral vocabulary; raises ConfigInvalid for a file that is none, or of no dialect known here."""
    top = _json(path) if path.suffix.lower() == ".json" else _yaml(path)
    chosen = _named(dialect) if dialect is not None else detect(path, top)
    reading = translate(chosen, top, path.read_text("utf-8", errors="replace").splitlines())
    if chosen.name == "hotshoe":
        try:
            reading.config = our_config(path)
        except ConfigInvalid as error:
            reading.refused = error.message
    return reading


def translate(dialect: Dialect, top: Mapping[str, Given], lines: Sequence[str] = ()) -> Reading:
    """Every key of the file as a neutral value, as one without a rule, as one of old, or as unknown.

    The file's own lines tell where the keys of a section stand; without them they stand where their section does.
    """
    reading = Reading(dialect.name, dialect.title)
    raw: Raw = {}
    for key, given in flat(dialect, top, lines):
        raw[given.key] = given
        _take(reading, dialect, key, given)
    for name, (key, value) in dialect.defaults.items():
        reading.values.setdefault(name, Given(value, key))
    dialect.finish(reading, raw)
    return reading


def flat(dialect: Dialect, top: Mapping[str, Given], lines: Sequence[str] = ()) -> Iterator[tuple[str, Given]]:
    """Key and value of each setting, sections opened; the value's own key has its section before it."""
    for key, given in top.items():
        if key not in dialect.sections or not isinstance(given.value, dict):
            yield key, given
            continue
        for inner, value in given.value.items():
            full = f"{key}.{inner}"
            line = _inner_line(lines, given.line, str(inner))
            if full in dialect.words or full in dialect.known:
                yield full, Given(value, full, line)
            elif isinstance(value, dict) and inner in dialect.sections:
                for last, item in value.items():
                    yield str(last), Given(item, f"{full}.{last}", _inner_line(lines, line, str(last)))
            else:
                yield str(inner), Given(value, full, line)


def detect(path: Path, top: Mapping[str, Given]) -> Dialect:
    """The dialect whose own keys the file has most of; raises ConfigInvalid where that is not clear."""
    if len(V1 & set(top)) > 1:
        raise ConfigInvalid(f"{path} is in LLaMA-Factory's v1 format, which is not read; its examples/train_* are.")
    scores = {name: score(dialect, top) for name, dialect in DIALECTS.items()}
    best = max(scores, key=lambda name: scores[name])
    rivals = [name for name, points in scores.items() if points == scores[best]]
    if not scores[best] or len(rivals) > 1:
        reason = "has no key that tells its trainer" if not scores[best] else f"could be {' or '.join(rivals)}"
        raise ConfigInvalid(f"{path} {reason}: name it with --dialect {'|'.join(DIALECTS)}.", param="dialect")
    return DIALECTS[best]


def score(dialect: Dialect, top: Mapping[str, Given]) -> float:
    """Marks weigh ten times a key that others may have too."""
    keys = {key for key, _ in flat(dialect, top)} | set(top)
    if "peft_type" in keys and dialect.name != "peft":
        keys -= {"r", "lora_alpha"}  # an adapter_config.json, unless the rest of it says otherwise
    return 10 * len(keys & dialect.marks) + len(keys & (dialect.known | set(dialect.words))) / 10


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The known name that is most like a key, where any is."""
    return next(iter(difflib.get_close_matches(key[:80], sorted(known), n=1, cutoff=0.7)), None)


def _named(name: str) -> Dialect:
    if name not in DIALECTS:
        near = difflib.get_close_matches(name, DIALECTS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(DIALECTS)}."
        raise ConfigInvalid(f"There is no dialect {name[:80]!r}; {hint}", param="dialect")
    return DIALECTS[name]


def _take(reading: Reading, dialect: Dialect, key: str, given: Given) -> None:
    if key in dialect.words:
        name, convert = dialect.words[key]
        try:
            value = convert(given.value)
        except ValueError as error:
            reading.unread.append((given, str(error)))
            return
        if value is not None and not (name in reading.values and not value):
            reading.values[name] = Given(value, given.key, given.line)
    elif key in dialect.renamed:
        reading.renamed.append(Unknown(given.key, given.line, dialect.renamed[key], given.value))
    elif key in dialect.known:
        reading.aside.append(given.key)
    else:
        near = nearest(key, dialect.known | set(dialect.words)) if len(reading.unknown) < MOST_COMPARED else None
        reading.unknown.append(Unknown(given.key, given.line, near, given.value))


def _yaml(path: Path) -> Raw:
    found = read_mapping(path, max_depth=MAX_DEPTH, as_text=False)
    return {key: Given(setting.value, key, setting.line) for key, setting in found.items()}


def _json(path: Path) -> Raw:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigInvalid(f"{path} cannot be read: {error.strerror}.", param="config") from error
    if len(data) > MAX_BYTES:
        raise ConfigInvalid(f"{path} has more than {MAX_BYTES:,} bytes, the most a config may have.", param="config")
    try:
        value = parse_json(data, max_values=MAX_VALUES)
    except JsonInvalid as error:
        raise ConfigInvalid(f"{path} {error}.", param="config") from error
    if not isinstance(value, dict):
        raise ConfigInvalid(f"{path} must be one object of settings.", param="config")
    lines = data.decode("utf-8").splitlines()
    return {key: Given(item, key, _line(lines, key)) for key, item in value.items()}


def _line(lines: list[str], key: str) -> int:
    return next((number for number, line in enumerate(lines, 1) if f'"{key}"' in line), 1)


def _inner_line(lines: Sequence[str], section: int, key: str) -> int:
    """The first line from the section's on that begins with the key, the section's own where none does."""
    begins = (f"{key}:", f'"{key}"', f"'{key}'")
    return next((at + 1 for at in range(section - 1, len(lines)) if lines[at].strip(" -{").startswith(begins)), section)


def our_config(path: Path) -> TrainingConfig:
    """The file as `hotshoe train` takes it, data and name apart, which flags may give; raises ConfigInvalid."""
    from training.config_file import FROM, read_config

    given = {key: value for key, value in read_config(path).items() if key != FROM}
    return TrainingConfig(**{"data": Path("data"), "name": "adapter", **given})
