"""Sentences with known private values in them, and hard ones without: what the privacy rules are measured on.

Values are made here and not by the libraries that look for them: checksums are computed by the formulas of ISO 7812 and
ISO 13616, and Vietnam's citizen numbers by their own digits. `spelled`, `password` and `nine digits` are forms that the
rules do not claim.
"""

from __future__ import annotations

import base64
import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass

SENTENCES = {
    "en": {
        "email_address": ["please write to {}", "my mail is {}.", "contact: {}, thanks", "I sent it from {} yesterday"],
        "phone_number": [
            "call me at {}",
            "my number is {}.",
            "reach us on {} after six",
            "tel {}, ask for the manager",
        ],
        "card_number": ["I paid with {}", "my card {} was refused", "charge it to {}, please"],
        "bank_account": ["transfer it to {}", "my account is {}.", "refund goes to {} by Friday"],
        "national_id": ["my id is {}", "the form asks for {}.", "registered under {} since May"],
        "ip_address": ["the server at {} is down", "blocked {} for an hour", "we see requests from {}"],
        "secret": ["use {} for now", "the key is {}", "I pasted {} into the config"],
        "": ["order {} has not arrived", "see {}", "the value was {} on the last page", "{} is what the label says"],
    },
    "vi": {
        "email_address": ["hãy viết cho {}", "email của tôi là {}.", "liên hệ {}, cảm ơn", "tôi gửi từ {} hôm qua"],
        "phone_number": [
            "gọi cho tôi số {}",
            "số điện thoại của tôi là {}.",
            "liên hệ {} sau sáu giờ",
            "sđt {}, gặp quản lý",
        ],
        "card_number": ["tôi trả bằng thẻ {}", "thẻ {} bị từ chối", "trừ vào thẻ {} nhé"],
        "bank_account": ["chuyển vào {}", "tài khoản của tôi là {}.", "hoàn tiền vào {} trước thứ sáu"],
        "national_id": ["căn cước của tôi là {}", "mẫu đơn cần số {}.", "đăng ký với số {} từ tháng năm"],
        "ip_address": ["máy chủ {} bị sập", "đã chặn {} trong một giờ", "có yêu cầu từ {}"],
        "secret": ["tạm dùng {}", "khóa là {}", "tôi dán {} vào cấu hình"],
        "": ["đơn hàng {} chưa đến", "xem {}", "giá trị là {} ở trang cuối", "nhãn ghi {}"],
    },
}
VIETNAM_ONLY, ELSEWHERE = ("vi",), ("en",)
BOTH = ("en", "vi")


@dataclass(frozen=True)
class Text:
    """One sentence: its language, the kind of value in it, and the value with its rule; "" for a hard negative."""

    language: str
    kind: str
    code: str
    text: str
    value: str


Maker = Callable[[random.Random], str]


def digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice(string.digits) for _ in range(count))


def letters(rng: random.Random, count: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    return "".join(rng.choice(alphabet) for _ in range(count))


def luhn(number: str) -> str:
    """The number with its check digit (ISO 7812)."""
    total = sum(sum(divmod(int(digit) * (2 - at % 2), 10)) for at, digit in enumerate(reversed(number)))
    return number + str(-total % 10)


def card(rng: random.Random) -> str:
    number = luhn((rng.choice(("4", "51", "55", "2221")) + digits(rng, 14))[:15])
    separator = rng.choice(("", " ", "-"))
    return separator.join(number[at : at + 4] for at in range(0, 16, 4))


def iban(rng: random.Random) -> str:
    country, size = rng.choice((("DE", 18), ("NL", 0), ("ES", 20), ("BE", 12)))
    body = "ABNA" + digits(rng, 10) if country == "NL" else digits(rng, size)
    numbers = "".join(str(int(letter, 36)) for letter in f"{body}{country}00")
    whole = f"{country}{98 - int(numbers) % 97:02}{body}"
    return whole if rng.random() < 0.5 else " ".join(whole[at : at + 4] for at in range(0, len(whole), 4))


def citizen(rng: random.Random) -> str:
    province = rng.choice(("001", "048", "079", "031", "092", "036", "024"))
    year = rng.randint(1950, 2010)
    return f"{province}{rng.choice((0, 1)) + 2 * (year >= 2000)}{year % 100:02}{digits(rng, 6)}"


def social(rng: random.Random) -> str:
    area = rng.choice([number for number in range(1, 900) if number != 666])
    return f"{area:03}-{rng.randint(1, 99):02}-{rng.randint(1, 9999):04}"


def dni(rng: random.Random) -> str:
    number = rng.randint(10_000_000, 99_999_999)
    return f"{number}{'TRWAGMYFPDXBNJZSQVHLCKE'[number % 23]}"


def mail(rng: random.Random) -> str:
    name = rng.choice(("an.nguyen", "jo", "m.smith", "tran_thu", "support", "le-binh", "k"))
    host = rng.choice(("corp.io", "gmail.com", "fpt.com.vn", "mail.company.co.uk", "uni-koeln.de"))
    return f"{name}{rng.choice(('', '+news', digits(rng, 2)))}@{host}"


def spelled(rng: random.Random) -> str:
    return mail(rng).replace("@", rng.choice((" at ", " (at) "))).replace(".", rng.choice((" dot ", ".")))


def mobile_vn(rng: random.Random) -> str:
    number = rng.choice(("090", "091", "098", "032", "077", "086")) + digits(rng, 7)
    spaced = f"{number[:4]} {number[4:7]} {number[7:]}"
    return rng.choice((number, spaced, spaced.replace(" ", "."), f"+84 {number[1:4]} {number[4:7]} {number[7:]}"))


def phone_us(rng: random.Random) -> str:
    area, middle = rng.choice(("212", "415", "303", "617", "206")), f"{rng.randint(200, 999)}"
    last = digits(rng, 4)
    return rng.choice((f"({area}) {middle}-{last}", f"{area}-{middle}-{last}", f"+1 {area} {middle} {last}"))


def phone_gb(rng: random.Random) -> str:
    last = digits(rng, 4)
    return rng.choice((f"020 7{digits(rng, 3)} {last}", f"+44 20 7{digits(rng, 3)} {last}", f"07400 {digits(rng, 6)}"))


def public_ip(rng: random.Random) -> str:
    if rng.random() < 0.2:
        return f"2a00:1450:{letters(rng, 4, '123456789abcdef')}::{letters(rng, 4, '123456789abcdef')}"
    return ".".join(map(str, (rng.choice((8, 31, 52, 91, 113, 203)), *(rng.randint(1, 254) for _ in range(3)))))


def web_token(rng: random.Random) -> str:
    parts = (json.dumps({"alg": "HS256"}), json.dumps({"sub": letters(rng, 8)}))
    head, body = (base64.urlsafe_b64encode(part.encode()).decode().rstrip("=") for part in parts)
    return f"{head}.{body}.{letters(rng, 43)}"


def key(rng: random.Random) -> str:
    return rng.choice(
        (
            "AKIA" + letters(rng, 16, string.ascii_uppercase + "234567"),
            "ghp_" + letters(rng, 36),
            "sk_live_" + letters(rng, 24),
            "xoxb-" + digits(rng, 12) + "-" + digits(rng, 12) + "-" + letters(rng, 24),
            web_token(rng),
            "-----BEGIN RSA PRIVATE KEY-----",
        )
    )


def password(rng: random.Random) -> str:
    return f"{rng.choice(('Summer', 'Hanoi', 'dragon'))}{digits(rng, 4)}!"


POSITIVE: tuple[tuple[str, str, Maker, tuple[str, ...]], ...] = (
    ("e-mail", "email_address", mail, BOTH),
    ("e-mail, spelled", "email_address", spelled, BOTH),
    ("mobile, Vietnam", "phone_number", mobile_vn, BOTH),
    ("telephone, US", "phone_number", phone_us, ELSEWHERE),
    ("telephone, GB", "phone_number", phone_gb, ELSEWHERE),
    ("card", "card_number", card, BOTH),
    ("IBAN", "bank_account", iban, BOTH),
    ("citizen, Vietnam", "national_id", citizen, BOTH),
    ("nine digits, Vietnam", "national_id", lambda rng: "0" + digits(rng, 8), VIETNAM_ONLY),
    ("social security, US", "national_id", social, ELSEWHERE),
    ("DNI, Spain", "national_id", dni, ELSEWHERE),
    ("public IP", "ip_address", public_ip, BOTH),
    ("key or token", "secret", key, BOTH),
    ("password", "secret", password, BOTH),
)
NEGATIVE: tuple[tuple[str, Maker, tuple[str, ...]], ...] = (
    ("order number, 8 digits", lambda rng: digits(rng, 8), BOTH),
    ("order number, 12 digits", lambda rng: f"2024{rng.randint(1, 12):02}{digits(rng, 6)}", BOTH),
    ("order number, 16 digits", lambda rng: "77" + digits(rng, 14), BOTH),
    ("order with letters", lambda rng: f"SO-{digits(rng, 4)}-{digits(rng, 5)}", BOTH),
    ("ISO date and time", lambda rng: f"20{rng.randint(10, 26)}-0{rng.randint(1, 9)}-1{digits(rng, 1)} 12:45", BOTH),
    ("date", lambda rng: f"{rng.randint(10, 28)}/{rng.randint(10, 12)}/20{rng.randint(10, 26)}", BOTH),
    ("seconds since 1970", lambda rng: f"17{digits(rng, 8)}", BOTH),
    ("version of three", lambda rng: f"v{rng.randint(0, 20)}.{rng.randint(0, 99)}.{rng.randint(0, 999)}", BOTH),
    ("version of four", lambda rng: ".".join(str(rng.randint(1, 20)) for _ in range(4)), BOTH),
    ("price", lambda rng: f"${rng.randint(1, 9)},{digits(rng, 3)}.{digits(rng, 2)}", ELSEWHERE),
    ("price, dong", lambda rng: f"{rng.randint(1, 99)}.{digits(rng, 3)}.000đ", VIETNAM_ONLY),
    ("tax number, Vietnam", lambda rng: f"0{rng.randint(1, 3)}{digits(rng, 8)}", VIETNAM_ONLY),
    ("licence plate, Vietnam", lambda rng: f"{rng.randint(11, 99)}A-{digits(rng, 3)}.{digits(rng, 2)}", VIETNAM_ONLY),
    ("ISBN", lambda rng: f"978-3-{digits(rng, 2)}-{digits(rng, 6)}-{digits(rng, 1)}", BOTH),
    ("IMEI", lambda rng: luhn(f"35{digits(rng, 12)}"), BOTH),
    ("UUID", lambda rng: "-".join(letters(rng, size, "0123456789abcdef") for size in (8, 4, 4, 4, 12)), BOTH),
    ("commit", lambda rng: letters(rng, 40, "0123456789abcdef"), BOTH),
    ("MAC address", lambda rng: ":".join(letters(rng, 2, "0123456789abcdef") for _ in range(6)), BOTH),
    ("private IP", lambda rng: f"192.168.{rng.randint(0, 254)}.{rng.randint(1, 254)}", BOTH),
    ("coordinates", lambda rng: f"{rng.randint(8, 23)}.{digits(rng, 6)}, 10{rng.randint(2, 9)}.{digits(rng, 6)}", BOTH),
    ("placeholder mail", lambda rng: f"user{digits(rng, 2)}@example.com", BOTH),
    ("handle", lambda rng: f"@{rng.choice(('maria', 'thu_ha', 'dev'))}{digits(rng, 2)}", BOTH),
)  # fmt: skip


def make(seed: int, of_each: int = 60) -> list[Text]:
    """So many texts of each kind and language, the same for the same seed."""
    rng = random.Random(seed)
    made = []
    for kind, code, maker, languages in (*POSITIVE, *((kind, "", maker, spoken) for kind, maker, spoken in NEGATIVE)):
        for language in languages:
            for _ in range(of_each):
                value = maker(rng)
                made.append(Text(language, kind, code, rng.choice(SENTENCES[language][code]).format(value), value))
    return made
