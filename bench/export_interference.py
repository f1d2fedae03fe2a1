"""What an export costs those who are served: the same requests while the server exports and while it does not.

All in one run on one server, in turn. Beside a busy round exports are made one after the other for as long as its
requests last; each result is deleted, so that the next order is work again.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from bench.interference import CONCURRENCY, TOKENS, measured
from bench.report import Report
from bench.restarts import embedded_shapes, write_adapter
from bench.served import Served, publish, serve

EXPORTS, NAME = "/v1/exports", "exported"
QUIET = "no export"
PARITY = {"an export of weights alone": False, "an export with logits": True}  # whether they are compared
BEGIN_SECONDS = 300.0
PAUSE_SECONDS = 0.2


def run(rounds: int) -> Iterator[Report]:
    """Time between tokens and to the first one, p50 and p95 over requests; medians over the rounds."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (QUIET, *PARITY)}
    with serve() as served, httpx.Client(base_url=served.gateway.url, timeout=300) as http:
        with tempfile.TemporaryDirectory() as folder:
            publish(served.gateway.url, NAME, write_adapter(Path(folder) / NAME, embedded_shapes(), seed=1))
        for turn in range(rounds):
            for name in found if turn % 2 == 0 else reversed(found):
                found[name].append(one_round(served, http, name))
    report = Report(f"Serving beside an export: {CONCURRENCY} streams of {TOKENS} tokens")
    for name, seen in found.items():
        report.rows.append({"": name, **{key: statistics.median(one[key] for one in seen) for key in seen[0]}})
    quiet, *busy = (row["p95 ms a token"] for row in report.rows)
    times = ", ".join(f"{name} {value / quiet:.2f} times" for name, value in zip(PARITY, busy, strict=True))
    report.notes.append(f"p95 time a token beside {times}; {rounds} rounds in turn.")
    yield report


def one_round(served: Served, http: httpx.Client, name: str) -> dict[str, float]:
    """One round of requests, beside what the name says."""
    if name == QUIET:
        return measured(served)
    with exporting(http, parity=PARITY[name]):
        return measured(served)


@contextmanager
def exporting(http: httpx.Client, *, parity: bool) -> Iterator[None]:
    """Exports one after the other; the block begins when the first one is at work. Raises where one fails."""
    is_over, has_begun = threading.Event(), threading.Event()
    failures: list[str] = []

    def work() -> None:
        try:
            make_exports()
        except httpx.HTTPError as error:
            failures.append(str(error))

    def make_exports() -> None:
        while not is_over.is_set() and not failures:
            row = http.post(EXPORTS, json={"model": NAME, "parity": parity}).raise_for_status().json()
            path = f"{EXPORTS}/{row['id']}"
            while row["status"] in ("queued", "running"):
                if row["stage"]:
                    has_begun.set()
                if is_over.is_set():
                    http.post(f"{path}/cancel")
                time.sleep(PAUSE_SECONDS)
                row = http.get(path).raise_for_status().json()
            if row["status"] == "failed":
                failures.append(str(row["error"]))
            http.delete(path).raise_for_status()

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        if not has_begun.wait(BEGIN_SECONDS):
            raise RuntimeError(f"no export began: {failures or 'none was ordered'}")
        yield
    finally:
        is_over.set()
        worker.join(BEGIN_SECONDS)
    if failures:
        raise RuntimeError(f"an export failed: {failures[0]}")
