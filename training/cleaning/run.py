"""Masks what is private in data or drops its rows, proves that this can be undone, writes the map and then the file."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from adapters.errors import ConfigInvalid, DataInvalid, OutputExists
from adapters.staging import sha256
from training.cleaning.files import whole_file
from training.cleaning.pseudonyms import Pseudonyms, Restorer, load_map
from training.cleaning.values import alike, changed
from training.data.columns import Columns
from training.data.formats import read_rows
from training.data.jsontext import decode
from training.data.records import as_line, kept_records
from training.gate.check import Asked, Looked, findings
from training.gate.findings import RULES
from training.gate.names import CODES, Recogniser, installed, names_in
from training.gate.privacy import MASKABLE, Match, matches
from training.gate.subject import Subject

MASKED = tuple(code for code in MASKABLE if code != "secret")
DROPPED = ("secret",)
NAMES = tuple(dict.fromkeys(CODES.values()))
UNREADABLE = ("row_unreadable", "nothing_learned")
_OF_A_BASE = "which is seen in rows rendered for a base, and cleaning renders none"
_OF_OTHER_DATA = "which is about test or validation data; `hotshoe data split` makes data without leaks"
_OF_ALL = "which is about the data as a whole and names no single rows"
UNDROPPED = {  # rules of the data check that give no row to drop, and why
    **dict.fromkeys(("row_unrendered", "row_too_long", "learned_share", "thought_unrendered"), _OF_A_BASE),
    **dict.fromkeys(("leak_exact", "leak_template", "leak_near", "validation_leak"), _OF_OTHER_DATA),
    **dict.fromkeys(("rows_few", "rows_many", "labels_unbalanced"), _OF_ALL),
    **dict.fromkeys(("names_unchecked", "toxicity_unchecked"), _OF_ALL),
}
NAMED_ROWS = 20  # of those dropped; all are counted


@dataclass(frozen=True)
class CleanAsked:
    """What is cleaned and how. Without a `map` it is written beside `out`; with `forget` there is none."""

    data: Path
    out: Path
    mask: tuple[str, ...] = MASKED
    drop: tuple[str, ...] = DROPPED
    map: Path | None = None
    forget: bool = False
    columns: tuple[str, ...] = ()
    recognisers: tuple[Recogniser, ...] = field(default_factory=lambda: tuple(installed()))

    @property
    def asks_for_names(self) -> bool:
        return bool(set(NAMES) & {*self.mask, *self.drop})

    @property
    def map_path(self) -> Path:
        return self.map or self.out.with_name(f"{self.out.name}.map")


@dataclass
class _Done:
    """What was done so far: by rule, how often masked, in which values and rows; which rows were dropped."""

    masked: Counter[str] = field(default_factory=Counter)
    values: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    rows: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    unreadable: int = 0
    kept: int = 0
    changed: int = 0

    def masks(self, found: Sequence[tuple[str, str]]) -> None:
        """Count a row that was kept with what was masked in it."""
        self.kept += 1
        self.changed += bool(found)
        self.masked.update(code for code, _ in found)
        self.rows.update({code for code, _ in found})
        for code, value in found:
            self.values[code].add(value)


def clean(asked: CleanAsked) -> dict[str, Any]:
    """Write the cleaned file and its map, and return the report; raises ConfigInvalid, DataInvalid, OutputExists."""
    _check(asked)
    columns = Columns(asked.columns)
    reading = read_rows(asked.data, columns)
    if reading.bad and not set(UNREADABLE) & set(asked.drop):
        raise reading.error()
    subject = Subject(reading.file, reading.problems, reading.bad)
    pseudonyms = load_map(asked.map_path) if not asked.forget and asked.map_path.exists() else Pseudonyms()
    known = len(pseudonyms.values)
    done = _Done()
    with whole_file(asked.out) as file:
        for value in _cleaned(subject, columns, asked, pseudonyms, done):
            file.write(as_line(value))
        file.flush()
        left = _proven(subject, columns, asked, file, pseudonyms, done)
        if not asked.forget:
            with whole_file(asked.map_path, private=True, replaces=True) as kept:
                kept.write(as_line(pseudonyms.as_dict()))
    made = {"masked": _table(done), "dropped": _dropped(done, subject), "left": left}
    return {**_counts(asked, subject, done), **made, **_map(asked, pseudonyms, known)}


def _check(asked: CleanAsked) -> None:
    for code in asked.mask:
        if code not in (*MASKABLE, *NAMES):
            known = ", ".join((*MASKABLE, *NAMES))
            raise ConfigInvalid(f"--mask has {code[:80]!r}; it takes {known}.", param="mask")
    for code in asked.drop:
        if code not in RULES:
            raise ConfigInvalid(f"--drop has {code[:80]!r}, which is no rule; docs/data.md lists them.", param="drop")
        if code in UNDROPPED:
            raise ConfigInvalid(f"--drop has {code}, {UNDROPPED[code]}.", param="drop")
    if asked.asks_for_names and not asked.recognisers:
        raise ConfigInvalid(
            "Names of people and places are found by a recogniser, and none is installed: presidio-analyzer with a "
            "spaCy model, or underthesea for Vietnamese. See docs/data.md.",
            param="mask",
        )
    both = sorted(set(asked.mask) & set(asked.drop))
    if both:
        raise ConfigInvalid(f"{', '.join(both)} is in --mask and in --drop: choose one.", param="drop")
    if asked.data.is_dir() and asked.out.resolve().is_relative_to(asked.data.resolve()):
        raise ConfigInvalid(f"--out {asked.out} lies inside of the data; choose a place beside it.", param="out")
    if asked.out.exists():
        raise OutputExists(f"{asked.out} exists: choose another --out, or remove it.", param="out")


def _cleaned(
    subject: Subject, columns: Columns, asked: CleanAsked, pseudonyms: Pseudonyms, done: _Done
) -> Iterator[Any]:
    """The records that are kept, masked. Of those dropped nothing comes into the map."""
    unwanted = _unwanted(subject, asked)
    for index, value in kept_records(subject.file, columns):
        if index is None:
            done.unreadable += 1
            continue
        found = _found(value, asked)
        reasons = unwanted[index] or [m.code for ms in found.values() for m in ms if m.code in asked.drop]
        if reasons:
            done.dropped[reasons[0]].append(index)
            continue
        masking = _Masking(asked.mask, found, pseudonyms)
        yield changed(value, masking.text)
        done.masks(masking.done)


def _unwanted(subject: Subject, asked: CleanAsked) -> dict[int, list[str]]:
    """The rows to drop by what the data check finds; what a text itself shows is seen while masking."""
    codes = set(asked.drop) - {*MASKABLE, *NAMES, *UNREADABLE}
    found: dict[int, list[str]] = defaultdict(list)
    if codes:
        for finding in findings(subject, {}, lambda: Looked(None, {}), Asked(asked.data), {}):
            if finding.code in codes:
                for index in finding.rows:
                    found[index].append(finding.code)
    return found


def _found(value: Any, asked: CleanAsked) -> dict[str, list[Match]]:
    """What is private in each text of a record; names only where they are asked for."""
    found: dict[str, list[Match]] = {}

    def look(text: str) -> str:
        known = matches(text)
        names = names_in(text, asked.recognisers) if asked.asks_for_names else []
        names = [one for one in names if not any(other.overlaps(one.start, one.end) for other in known)]
        found[text] = sorted([*known, *names], key=lambda match: match.start)
        return text

    changed(value, look)
    return found


class _Masking:
    """Puts pseudonyms into the texts of one record."""

    def __init__(self, mask: Sequence[str], found: Mapping[str, Sequence[Match]], pseudonyms: Pseudonyms) -> None:
        self.done: list[tuple[str, str]] = []
        self._mask = mask
        self._found = found
        self._pseudonyms = pseudonyms

    def text(self, text: str) -> str:
        parts, at = [], 0
        for match in self._found[text]:
            if match.code in self._mask:
                value = text[match.start : match.end]
                parts += [text[at : match.start], self._pseudonyms.of(match.code, value)]
                at = match.end
                self.done.append((match.code, value))
        return "".join(parts) + text[at:]


def _proven(
    subject: Subject, columns: Columns, asked: CleanAsked, file: TextIO, pseudonyms: Pseudonyms, done: _Done
) -> dict[str, int]:
    """What was written is restored and compared with the data, row by row; and what private things it still has."""
    dropped = {index for found in done.dropped.values() for index in found}
    restorer = Restorer(pseudonyms.values)
    left: Counter[str] = Counter()
    with Path(file.name).open(encoding="utf-8") as lines:
        for index, value in kept_records(subject.file, columns):
            if index is None or index in dropped:
                continue
            written = decode(next(lines))
            left.update(match.code for found in _found(written, asked).values() for match in found)
            if not alike(changed(written, restorer.text), decode(as_line(value))):
                raise DataInvalid(
                    f"{subject.rows[index].place} could not be restored from what was made of it: a pseudonym is like "
                    "a text of the data. Nothing was written; run it again with a new map.",
                    param="map",
                )
    return dict(left)


def _table(done: _Done) -> dict[str, dict[str, int]]:
    return {
        code: {"times": times, "values": len(done.values[code]), "rows": done.rows[code]}
        for code, times in done.masked.most_common()
    }


def _dropped(done: _Done, subject: Subject) -> dict[str, dict[str, Any]]:
    made = {
        code: {"rows": len(found), "places": [str(subject.rows[index].place) for index in found[:NAMED_ROWS]]}
        for code, found in done.dropped.items()
    }
    if done.unreadable:
        places = [problem.path for problem in subject.bad[:NAMED_ROWS]]
        made["row_unreadable"] = {"rows": done.unreadable, "places": places}
    return made


def _counts(asked: CleanAsked, subject: Subject, done: _Done) -> dict[str, Any]:
    return {
        "data": asked.data.name,
        "digest": subject.file.digest,
        "out": str(asked.out),
        "out_digest": f"sha256:{sha256(asked.out)}",
        "rows": subject.of,
        "kept_rows": done.kept,
        "changed_rows": done.changed,
        "dropped_rows": subject.of - done.kept,
        "mask": list(asked.mask),
        "drop": list(asked.drop),
    }


def _map(asked: CleanAsked, pseudonyms: Pseudonyms, known: int) -> Mapping[str, Any]:
    if asked.forget:
        return {"map": None}
    return {"map": str(asked.map_path), "map_values": len(pseudonyms.values), "map_values_before": known}


def restore(data: Path, mapped: Path, out: Path) -> dict[str, Any]:
    """Write the data with the values in the place of their pseudonyms; only the map's owner can."""
    restorer = Restorer(load_map(mapped).values)
    columns = Columns()
    reading = read_rows(data, columns)
    if reading.bad:
        raise reading.error()
    with whole_file(out, private=True) as file:
        for index, value in kept_records(reading.file, columns):
            if index is not None:
                file.write(as_line(changed(value, restorer.text)))
    return {"data": data.name, "out": str(out), "rows": len(reading.file.rows), "restored": restorer.count}
