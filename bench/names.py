"""How well installed recognisers find names of people and places: `python -m bench.names`, where there are some.

It needs little of this project's environment, so that it runs in one that has the recognisers.
"""

from __future__ import annotations

import random
import time

from bench.report import Report
from training.gate.names import installed, names_in

GIVEN = {
    "en": ("James", "Maria", "Olivia", "Ahmed", "Wei", "Sofia", "Liam", "Fatima", "Noah", "Priya", "Grace", "Ivan"),
    "vi": ("Văn An", "Thị Bình", "Minh Châu", "Quốc Dũng", "Thu Hà", "Ngọc Lan", "Đức Long", "Hoàng Nam", "Thanh Tú"),
}
FAMILY = {
    "en": ("Smith", "Gonzalez", "O'Brien", "Khan", "Zhang", "Müller", "Johnson", "Okafor", "Patel", "Petrov"),
    "vi": ("Nguyễn", "Trần", "Lê", "Phạm", "Hoàng", "Vũ", "Đặng", "Bùi", "Đỗ"),
}
PLACES = {
    "en": ("Boston", "221B Baker Street, London", "Cape Town", "742 Evergreen Terrace, Springfield", "Lagos"),
    "vi": ("Hà Nội", "số 12 đường Lê Lợi, quận 1", "Đà Nẵng", "Thành phố Hồ Chí Minh", "huyện Củ Chi"),
}
SAID = {
    "en": {
        "person_name": ("my name is {}", "please call {} back", "{} ordered it last week", "ask {} about the invoice"),
        "place_name": ("I live in {}", "send it to {}", "the shop in {} is closed"),
        "": ("turn on the kitchen lamp", "the order has not arrived yet", "Can you reset my password?", "Set it to 21"),
    },
    "vi": {
        "person_name": ("tôi tên là {}", "hãy gọi lại cho {}", "{} đã đặt hàng tuần trước", "hỏi {} về hóa đơn"),
        "place_name": ("tôi sống ở {}", "gửi đến {}", "cửa hàng ở {} đóng cửa"),
        "": ("bật đèn phòng bếp lên", "đơn hàng vẫn chưa đến", "đặt lại mật khẩu giúp tôi", "đặt nhiệt độ 21 độ"),
    },
}
OF_EACH = 120
SEED = 5


def sentences(language: str, rng: random.Random) -> list[tuple[str, str, str]]:
    """Code, value and sentence: full names as they are written, in lower case every third; places; and none."""
    made = []
    for number in range(OF_EACH):
        order = (FAMILY, GIVEN) if language == "vi" else (GIVEN, FAMILY)
        name = " ".join(rng.choice(part[language]) for part in order)
        name = name.lower() if number % 3 == 2 else name
        place = rng.choice(PLACES[language])
        for code, value in (("person_name", name), ("place_name", place), ("", "")):
            made.append((code, value, rng.choice(SAID[language][code]).format(value)))
    return made


def run() -> Report:
    report = Report("Names: precision and recall of the recognisers that are installed")
    recognisers = installed()
    for one in recognisers:
        told = sentences(one.language, random.Random(SEED))
        started = time.process_time()
        found = [(code, value, text, names_in(text, recognisers)) for code, value, text in told]
        seconds = time.process_time() - started
        for code in ("person_name", "place_name"):
            planted = [(value, text, made) for what, value, text, made in found if what == code]
            hits = sum(
                any(m.code == code and text[m.start : m.end] in value for m in made) for value, text, made in planted
            )
            shown = [
                (what, value, text[m.start : m.end])
                for what, value, text, made in found
                for m in made
                if m.code == code
            ]
            right = sum(what == code and (said in value or value in said) for what, value, said in shown)
            report.rows.append(
                {
                    "recogniser": one.title,
                    "language": one.language,
                    "rule": code,
                    "planted": len(planted),
                    "recall": hits / len(planted),
                    "found": len(shown),
                    "precision": right / len(shown) if shown else float("nan"),
                    "texts a CPU second": round(len(told) / seconds),
                }
            )
    if not recognisers:
        report.notes.append("No recogniser is installed.")
    return report


if __name__ == "__main__":
    run().print()
