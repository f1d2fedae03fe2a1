"""How long the data check takes for 100,000 rows, and how much memory: of three kinds of rows."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from bench.report import Report
from examples.agent_routing.data import ENGLISH
from examples.agent_routing.templates import Language, function_call

ROWS = 100_000
SECONDS_BETWEEN = 0.25
CHECK = "from server.cli.main import run; run()"
SYLLABLES = ("ba", "co", "di", "fu", "ge", "ha", "ki", "lo", "mu", "ne", "po", "ra", "si", "tu", "ve", "wo", "xa", "zi")
TOPICS = ("refund", "delivery", "invoice", "login", "damage", "warranty", "exchange", "cancellation")


def run(rounds: int) -> Iterator[Report]:
    """Three kinds of rows: prose with labels, prose with free answers, and few templates."""
    report = Report("The data check on 100,000 rows")
    with tempfile.TemporaryDirectory() as folder:
        for name, lines in (("prose, eight labels", labelled), ("prose, free answers", free), ("templates", templates)):
            path = Path(folder) / "rows.jsonl"
            path.write_text("".join(lines(random.Random(1))), "utf-8")
            report.rows.append({"rows": name, "MB": path.stat().st_size / 1e6, **measured(path)})
    report.notes.append("Memory is of both processes together, what they share counted once.")
    yield report


def measured(path: Path) -> dict[str, float]:
    started = time.perf_counter()
    words = [sys.executable, "-c", CHECK, "data", "check", str(path), "--json"]
    with tempfile.TemporaryFile() as said:
        child = psutil.Popen(words, stdout=subprocess.DEVNULL, stderr=said)
        peak = 0
        while child.poll() is None:
            peak = max(peak, memory_of(child))
            time.sleep(SECONDS_BETWEEN)
        if child.returncode not in (0, 3):
            said.seek(0)
            raise RuntimeError(said.read().decode())
    return {"wall seconds": time.perf_counter() - started, "peak GB": peak / 1e9}


def memory_of(process: psutil.Process) -> int:
    """Bytes of a process and all that it started, what they share counted once."""
    found = 0
    with contextlib.suppress(psutil.Error):  # it has ended meanwhile
        for one in [process, *process.children(recursive=True)]:
            found += one.memory_full_info().pss
    return found


def labelled(rng: random.Random) -> Iterator[str]:
    words = vocabulary(rng)
    own = {topic: rng.sample(words, 40) for topic in TOPICS}
    for number in range(ROWS):
        topic = rng.choice(TOPICS)
        yield chat(sentence(rng, words, own[topic], number), topic)


def free(rng: random.Random) -> Iterator[str]:
    words = vocabulary(rng)
    for number in range(ROWS):
        yield chat(sentence(rng, words, words, number), " ".join(rng.choices(words, k=25)).capitalize() + ".")


def templates(rng: random.Random) -> Iterator[str]:
    """Home Assistant's sentences: few templates, names and numbers in their slots."""
    language = Language.load("en")
    known = [template for label in language.labels(ENGLISH.least_templates) for template in language.templates[label]]
    for number in range(ROWS):
        said, slots = language.sample(known[number % len(known)], rng)
        yield chat(said, function_call(known[number % len(known)].intent, slots))


def vocabulary(rng: random.Random) -> list[str]:
    return list({"".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(20_000)})


def sentence(rng: random.Random, words: list[str], own: list[str], number: int) -> str:
    """About 30 words, the commoner the more often, some of the topic; now and then a mail address or a number."""
    chosen = [words[int(len(words) * rng.random() ** 3)] for _ in range(rng.randint(10, 40))] + rng.choices(own, k=5)
    rng.shuffle(chosen)
    if number % 20 == 0:
        chosen.append(f"{rng.choice(words)}@{rng.choice(words)}.com")
    if number % 5 == 0:
        chosen.append(str(rng.randint(10_000, 99_999_999)))
    return " ".join(chosen).capitalize() + "?"


def chat(said: str, answer: str) -> str:
    messages = [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}) + "\n"
