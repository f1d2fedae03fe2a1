"""schemathesis over our whole OpenAPI: valid and broken requests to every operation, each answer held to the document.

`make fuzz` runs it alone for as many requests as it is told, and prints how many there were.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import schemathesis
from schemathesis import GenerationMode

from server.logs import configure_logging
from server.source_settings import SourceSettings
from tests.fixtures.adapters import shape_only_base, write_adapter
from tests.fixtures.service import Server, running

KEY = "a-key-of-the-fuzzer"
UNHURRIED = {"suppress_health_check": list(hypothesis.HealthCheck), "deadline": None, "database": None}


@dataclass
class Report:
    """What was sent and answered. `failures` are answers that the document does not declare."""

    requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class Fuzzer:
    """Sends what schemathesis makes up to one server."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.report = Report()
        self.schema = schemathesis.openapi.from_dict(server.http.get("/openapi.json").json())

    def run(self, examples: int, seed: int, ends_at: float = float("inf")) -> Report:
        """So many requests to each operation, half of them broken on purpose; no more after the (monotonic) end."""
        for found in self.schema.get_all_operations():
            operation: Any = found.ok()
            if time.monotonic() > ends_at:
                break
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of hypothesis, on schemas that rule much out
                    self.ask(operation, mode, max(1, examples // 2), seed)
        return self.report

    def ask(self, operation: Any, mode: GenerationMode, examples: int, seed: int) -> None:
        @hypothesis.seed(seed)
        @hypothesis.settings(max_examples=examples, phases=[hypothesis.Phase.generate], **UNHURRIED)
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def one(case: Any) -> None:
            self.send(operation, case)

        try:
            one()
        except hypothesis.errors.Unsatisfiable:  # there is no broken request to an operation without parameters
            return

    def send(self, operation: Any, case: Any) -> None:
        headers = {**self.server.headers, "x-fuzz": "1"}
        try:
            answer = case.call(base_url=self.server.url, headers=headers, timeout=30)
        except (UnicodeError, ValueError):  # what requests itself cannot put on the wire
            return
        self.report.requests += 1
        self.report.statuses[answer.status_code] += 1
        declared = operation.definition.raw["responses"]
        label = f"{operation.method.upper()} {operation.path}: {answer.status_code}"
        if str(answer.status_code) not in declared:
            self.report.failures.append(f"{label} is not declared: {answer.text[:200]}")
        elif answer.status_code >= 400 and operation.method != "head" and not is_error_body(answer.json()):
            self.report.failures.append(f"{label} has another body: {answer.text[:200]}")


def is_error_body(body: Any) -> bool:
    error = body.get("error") if isinstance(body, dict) else None
    return isinstance(error, dict) and isinstance(error.get("message"), str) and isinstance(error.get("type"), str)


def main() -> int:
    """A long run on the scripted engine; exit status 1 where an answer was not declared."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000, help="how many requests, about")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time in any case")
    parser.add_argument("--seed", type=int, default=1)
    wanted = parser.parse_args()
    configure_logging("error")
    started_at = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        base = shape_only_base(Path(scratch) / "base" / "tiny")
        shared = Path(scratch) / "shared"
        write_adapter(shared / "pulled", base, seed=1)
        source = SourceSettings(name="shared", url=f"file://{shared}", every_seconds=None)
        with running(base, Path(scratch), api_key=KEY, sources=(source,)) as server:
            server.pushed("router")
            fuzzer = Fuzzer(server)
            seed = wanted.seed
            ends_at = started_at + wanted.seconds
            while fuzzer.report.requests < wanted.requests and not fuzzer.report.failures:
                fuzzer.run(100, seed, ends_at)
                seed += 1
                if time.monotonic() > ends_at:
                    break
            alive = httpx.get(f"{server.url}/health").status_code == 200
    report = fuzzer.report
    print(f"{report.requests} requests in {time.monotonic() - started_at:.0f} s, seeds {wanted.seed} to {seed - 1}")
    print("answers by status: " + ", ".join(f"{status}: {count}" for status, count in sorted(report.statuses.items())))
    for failure in sorted(set(report.failures)):
        print(failure)
    return 0 if alive and not report.failures else 1


if __name__ == "__main__":
    raise SystemExit(main())
