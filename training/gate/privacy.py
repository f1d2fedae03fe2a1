"""What must not be learned: secrets, card and account numbers, identity numbers, addresses of people and machines.

A pattern proposes, a checksum or a library decides: Luhn and IBAN by python-stdnum, telephone numbers by phonenumbers,
secrets by detect-secrets' detectors of known forms (none asks a network). What is found is never printed whole.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any

from training.data.rows import Row
from training.gate.findings import Finding
from training.gate.subject import Subject, texts

REGIONS = ("US", "GB", "VN")  # whose national numbers are looked for; numbers with + are of all
DIGITS = re.compile(r"\d")
RUN = re.compile(r"(?<![\w.])\d[\d -]{10,22}\d(?![\w.]?\d)")
EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9-]*\.)+[A-Za-z]{2,24}\b")
IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
ADDRESS = re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f:]*:[0-9A-Fa-f:]*:[0-9A-Fa-f:]+)(?![\w.:]*\d)")
INSIDE = re.compile(r"[\w#/-]$")  # before a number: it is the rest of a longer one, as in SO-1234-56789
PHONE_LIKE = re.compile(r"(?:\+|\(?\d)[\d ().-]{6,}\d")
SECRET_LIKE = re.compile(r"[A-Za-z0-9_/+=.:-]{16,}|-----BEGIN|://[^\s/]+:[^\s/]+@")
# Visa, Mastercard, American Express, Diners, Discover, JCB and UnionPay, each with its lengths: a telephone's serial
# number (IMEI) passes Luhn, too, and often begins with 35, but has 15 digits.
CARD = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}"
    r"|6(?:011|4[4-9]\d|5\d\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}"
)
SMALL_OCTET = 32  # four numbers below it are as likely a version, and hardly a person's address
PLACEHOLDERS = ("example.com", "example.org", "example.net")
# Entropy and key words guess; IPs have a rule of their own.
GUESSES = ("Base64 High Entropy String", "Hex High Entropy String", "Secret Keyword", "Public IP (ipv4)")


@dataclass(frozen=True)
class Match:
    """What was found in a text, and where: `text[start:end]`. `kind` says more than the rule's code."""

    code: str
    kind: str
    start: int
    end: int

    def overlaps(self, start: int, end: int) -> bool:
        """Whether it has a letter in common with `text[start:end]`."""
        return self.start < end and start < self.end


Detector = Callable[[str], Iterator[Match]]


def emails(text: str) -> Iterator[Match]:
    if "@" in text:
        for found in EMAIL.finditer(text):
            if not found.group().lower().endswith(PLACEHOLDERS):
                yield Match("email_address", "e-mail", *found.span())


def cards(text: str) -> Iterator[Match]:
    from stdnum import luhn

    for found in RUN.finditer(text):
        digits = re.sub(r"\D", "", found.group())
        if CARD.fullmatch(digits) and len(set(digits)) > 1 and luhn.is_valid(digits):
            yield Match("card_number", "card", *found.span())


def accounts(text: str) -> Iterator[Match]:
    from stdnum import iban

    for found in IBAN.finditer(text):
        if iban.is_valid(found.group(), check_country=False):
            yield Match("bank_account", "IBAN", *found.span())


def addresses(text: str) -> Iterator[Match]:
    for found in ADDRESS.finditer(text):
        try:
            address = ipaddress.ip_address(found.group())
        except ValueError:
            continue
        if address.is_global and not (address.version == 4 and max(address.packed) < SMALL_OCTET):
            yield Match("ip_address", "IP address", *found.span())


def telephones(text: str, regions: Sequence[str] = REGIONS) -> Iterator[Match]:
    if not PHONE_LIKE.search(text):
        return
    import phonenumbers

    seen: set[tuple[int, int]] = set()
    for region in regions:
        for found in phonenumbers.PhoneNumberMatcher(text, region):
            if INSIDE.search(text[: found.start]):
                continue
            if (found.start, found.end) not in seen and not _is_other_number(text, found.start, found.end):
                seen.add((found.start, found.end))
                country = phonenumbers.region_code_for_number(found.number) or region
                yield Match("phone_number", f"telephone ({country})", found.start, found.end)


def _is_other_number(text: str, start: int, end: int) -> bool:
    """What looks like a telephone number and is a card, an identity number or an address of a machine."""
    others = (*cards(text), *addresses(text), *identities(text))
    return any(match.overlaps(start, end) for match in others)


def secrets(text: str) -> Iterator[Match]:
    if not SECRET_LIKE.search(text):
        return
    for line in re.finditer(r"[^\n]+", text):
        for kind, detector in _secret_detectors():
            for value in detector.analyze_string(line.group()):
                start = line.start() + max(0, line.group().find(value))
                yield Match("secret", kind, start, start + len(value))


@cache
def _secret_detectors() -> list[tuple[str, Any]]:
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

    known = get_mapping_from_secret_type_to_class()
    return [(kind, made()) for kind, made in known.items() if kind not in GUESSES]


# Country -> form, and the module of stdnum that checks its digits. Only numbers whose form or checksum says much: nine
# bare digits with a check digit, as in the Netherlands, would be every eleventh number.
NATIONAL = (
    ("US social security", re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])"), "stdnum.us.ssn"),
    ("ES DNI", re.compile(r"(?<!\w)\d{8}-?[A-Z](?!\w)"), "stdnum.es.dni"),
    ("ES NIE", re.compile(r"(?<!\w)[XYZ]-?\d{7}-?[A-Z](?!\w)"), "stdnum.es.nie"),
    ("IT codice fiscale", re.compile(r"(?<!\w)[A-Z]{6}\d\d[A-Z]\d\d[A-Z]\d{3}[A-Z](?!\w)"), "stdnum.it.codicefiscale"),
    (
        "FR sécurité sociale",
        re.compile(r"(?<![\w-])[12]( ?\d\d){2} ?\d[\dAB]( ?\d{3}){2} ?\d\d(?![\w-])"),
        "stdnum.fr.nir",
    ),
    ("BR CPF", re.compile(r"(?<![\w.-])\d{3}\.\d{3}\.\d{3}-\d{2}(?![\w.-])"), "stdnum.br.cpf"),
    ("CN resident identity", re.compile(r"(?<!\w)\d{17}[\dXx](?!\w)"), "stdnum.cn.ric"),
    ("KR resident registration", re.compile(r"(?<![\w-])\d{6}-\d{7}(?![\w-])"), "stdnum.kr.rrn"),
    ("IN Aadhaar", re.compile(r"(?<![\w-])\d{4}[ -]\d{4}[ -]\d{4}(?![\w-])"), "stdnum.in_.aadhaar"),
)
CITIZEN = re.compile(r"(?<![\w.-])\d{12}(?![\w.-]?\d)")
# Provinces as the Ministry of Public Security numbers them (Circular 59/2021/TT-BCA, annex).
_PROVINCES = """
001 002 004 006 008 010 011 012 014 015 017 019 020 022 024 025 026 027 030 031 033 034 035 036 037 038 040 042 044 045
046 048 049 051 052 054 056 058 060 062 064 066 067 068 070 072 074 075 077 079 080 082 083 084 086 087 089 091 092 093
094 095 096
"""
PROVINCES = frozenset(_PROVINCES.split())
OLDEST_YEARS = 115


def identities(text: str) -> Iterator[Match]:
    if not DIGITS.search(text):
        return
    for kind, form, module in NATIONAL:
        for found in form.finditer(text):
            if _check(module)(found.group()):
                yield Match("national_id", kind, *found.span())
    for found in CITIZEN.finditer(text):
        if is_citizen_id(found.group()):
            yield Match("national_id", "VN citizen identity", *found.span())


@cache
def _check(module: str) -> Callable[[str], bool]:
    from importlib import import_module

    checked: Callable[[str], bool] = import_module(module).is_valid
    return checked


def is_citizen_id(digits: str) -> bool:
    """Vietnam's twelve digits: a province, then sex and century of birth in one digit, then the year's last two."""
    year = 1900 + 100 * (int(digits[3]) // 2) + int(digits[4:6])
    return digits[:3] in PROVINCES and 0 <= datetime.now(UTC).year - year <= OLDEST_YEARS


DETECTORS: tuple[Detector, ...] = (secrets, cards, accounts, identities, emails, telephones, addresses)


MASKABLE = (
    *("email_address", "phone_number", "card_number", "bank_account", "national_id", "ip_address", "secret"),
)  # codes of what has a place in a text, so that something else can be put there


def matches(text: str) -> list[Match]:
    """Everything that is found in the text, in its order; of two that overlap, the one whose detector comes first."""
    if not _is_worth_a_look(text):
        return []
    found: list[Match] = []
    for detect in DETECTORS:
        for match in detect(text):
            if not any(other.overlaps(match.start, match.end) for other in found):
                found.append(match)
    return sorted(found, key=lambda match: match.start)


ByRule = dict[str, tuple[dict[int, str], Counter[str]]]  # of each row what is shown of it; how often each kind is there


def private(subject: Subject, found_by_rule: ByRule) -> Iterator[Finding]:
    """Rows with anything of the kind, by rule; shown is what kind it is and how it begins."""
    for code, (found, kinds) in found_by_rule.items():
        detail = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(5))
        yield subject.finding(code, list(found), detail, list(found.values()))


def by_rule(rows: Iterable[tuple[int, Row]], look: Callable[[str], Iterable[Match]]) -> ByRule:
    """By rule what `look` finds in these rows, each with its number."""
    made: ByRule = {}
    for index, row in rows:
        for text in texts(row):
            for match in look(text):
                found, kinds = made.setdefault(match.code, ({}, Counter()))
                kinds[match.kind] += 1
                found.setdefault(index, f"{match.kind}: {hidden(text[match.start : match.end])}")
    return made


def joined(parts: Iterable[ByRule]) -> ByRule:
    """Of ranges of rows, in their order."""
    made: ByRule = {}
    for part in parts:
        for code, (found, kinds) in part.items():
            all_found, all_kinds = made.setdefault(code, ({}, Counter()))
            all_found.update(found)
            all_kinds.update(kinds)
    return made


def _is_worth_a_look(text: str) -> bool:
    return bool(DIGITS.search(text) or "@" in text or SECRET_LIKE.search(text))


def hidden(text: str) -> str:
    """How a found text is shown: its first two letters and its length."""
    return f"{text[:2]}… ({len(text)} letters)"
