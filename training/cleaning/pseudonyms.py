"""Pseudonyms: the same for equal values, of the same shape, and reversible by nobody without the map.

Each is derived from its value by HMAC-SHA512 with a random key, so that nobody without the key can try all telephone
numbers. None is a value that exists: digits begin with 999 and fail their checksum, IBANs have the check digits 00,
addresses are of example.com and of nets that are never routed. The map holds the key, and each value beside its own.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import re
import secrets
import string
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import DataInvalid
from training.gate.privacy import matches

FORMAT = 1
TRIES = 200  # of one shape, before a pseudonym is a word in brackets
LEAD = "999"
PREFIX_LETTERS = 4  # by which pseudonyms are looked for in a text
_CLASSES = (string.digits, string.ascii_uppercase, string.ascii_lowercase)


@dataclass
class Pseudonyms:
    """Values and their pseudonyms, both ways. `codes` has the rule that each value was found by."""

    key: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    pseudonyms: dict[tuple[str, str], str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)

    def of(self, code: str, value: str) -> str:
        """The value's pseudonym, made where it has none yet."""
        found = self.pseudonyms.get((code, value))
        return found if found is not None else self._made(code, value)

    def _made(self, code: str, value: str) -> str:
        made = next(made for made in self._tried(code, value) if made not in self.values and not matches(made))
        self.pseudonyms[code, value] = made
        self.values[made] = value
        return made

    def _tried(self, code: str, value: str) -> Iterator[str]:
        for count in range(TRIES):
            made = _SHAPES.get(code, _word)(code, value, self._bytes(code, value, count))
            if made != value:
                yield made
        for count in range(TRIES, 2 * TRIES):
            yield _word(code, value, self._bytes(code, value, count))

    def _bytes(self, code: str, value: str, count: int) -> bytes:
        plain = "".join(filter(str.isalnum, value)) if code in _DIGITS else value
        return hmac.digest(self.key, f"{code}\0{plain}\0{count}".encode(), "sha512")

    def as_dict(self) -> dict[str, Any]:
        entries = [{"rule": code, "value": value, "pseudonym": made} for (code, value), made in self.pseudonyms.items()]
        return {"format": FORMAT, "key": self.key.hex(), "entries": entries}


def load_map(path: Path) -> Pseudonyms:
    """The map in a file; raises DataInvalid for what is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']!r}, not {FORMAT}")
        made = Pseudonyms(bytes.fromhex(found["key"]))
        for entry in found["entries"]:
            made.pseudonyms[entry["rule"], entry["value"]] = entry["pseudonym"]
            made.values[entry["pseudonym"]] = entry["value"]
    except OSError as error:
        raise DataInvalid(f"{path} cannot be read: {error.strerror or error}.", param="map") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataInvalid(f"{path} is no map of pseudonyms: {error}.", param="map") from error
    return made


class Restorer:
    """Finds pseudonyms in texts and puts the values in their place."""

    def __init__(self, values: dict[str, str]) -> None:
        self.count = 0
        self._values = values
        self._lengths: dict[str, list[int]] = {}
        lengths: dict[str, set[int]] = defaultdict(set)
        for pseudonym in values:
            lengths[pseudonym[:PREFIX_LETTERS]].add(len(pseudonym))
        self._lengths = {prefix: sorted(found, reverse=True) for prefix, found in lengths.items()}
        self._prefixes = re.compile("|".join(map(re.escape, self._lengths)) or r"(?!)")

    def text(self, text: str) -> str:
        parts, at = [], 0
        while found := self._prefixes.search(text, at):
            start = found.start()
            sizes = self._lengths[found.group()]
            size = next((size for size in sizes if text[start : start + size] in self._values), 0)
            end = start + size
            parts.append(text[at:start] + (self._values[text[start:end]] if size else text[start]))
            self.count += bool(size)
            at = end if size else start + 1
        return "".join(parts) + text[at:]


def _word(code: str, value: str, drawn: bytes) -> str:
    return f"<{code}-{drawn.hex()[:10]}>"


def _email(code: str, value: str, drawn: bytes) -> str:
    return f"user-{drawn.hex()[:10]}@example.com"


def _address(code: str, value: str, drawn: bytes) -> str:
    """Of 240.0.0.0/4, which is reserved and never routed, or of 2001:db8::/32, which is for documents."""
    if ipaddress.ip_address(value).version == 4:
        return f"240.{drawn[0]}.{drawn[1]}.{drawn[2]}"
    return f"2001:db8:{':'.join(drawn[at : at + 2].hex() for at in range(0, 12, 2))}"


def _digits(code: str, value: str, drawn: bytes) -> str:
    """Every digit and letter another of its kind, the first three digits 999; what is between them stays."""
    made = _shaped(value, drawn)
    places = [at for at, letter in enumerate(made) if letter.isdigit()][: len(LEAD)]
    letters = list(made)
    for at, digit in zip(places, LEAD, strict=False):
        letters[at] = digit
    return "".join(letters)


def _account(code: str, value: str, drawn: bytes) -> str:
    return f"{value[:2]}00{_shaped(value[4:], drawn)}"


def _shaped(value: str, drawn: bytes) -> str:
    """Draws go by the place among digits and letters alone, so that spaces between them change nothing."""
    letters, place = [], 0
    for letter in value:
        kind = next((kind for kind in _CLASSES if letter in kind), None)
        letters.append(kind[drawn[place % len(drawn)] % len(kind)] if kind else letter)
        place += kind is not None
    return "".join(letters)


_DIGITS = ("card_number", "bank_account", "national_id", "phone_number")
_SHAPES = {
    "email_address": _email,
    "ip_address": _address,
    "bank_account": _account,
    "card_number": _digits,
    "national_id": _digits,
    "phone_number": _digits,
}
