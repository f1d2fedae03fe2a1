"""What the gate found, as one document: a verdict, findings by their weight, figures, and a digest over all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.errors import DataBlocked, Problem
from training.gate.findings import Finding
from training.levels import LEVELS

FORMAT = 1
VERDICTS = ("block", "warn", "pass")


@dataclass(frozen=True)
class Report:
    """`findings` as dictionaries with their level, heaviest first; notes change no verdict."""

    about: Mapping[str, Any]
    figures: Mapping[str, Any]
    findings: Sequence[Mapping[str, Any]]

    @classmethod
    def made(
        cls, about: Mapping[str, Any], figures: Mapping[str, Any], found: Sequence[Finding], levels: Mapping[str, str]
    ) -> Report:
        """The findings that are not off: each at the level that was set, else at its own, else at its rule's."""
        rows = [finding.as_dict(levels.get(finding.code) or finding.level or finding.rule.level) for finding in found]
        rows = [row for row in rows if row["level"] != "off"]
        return cls(about, figures, sorted(rows, key=lambda row: LEVELS.index(row["level"])))

    @property
    def verdict(self) -> str:
        """`block`, `warn` or `pass`."""
        return next((level for level in VERDICTS[:-1] if self.count(level)), "pass")

    def count(self, level: str) -> int:
        return sum(finding["level"] == level for finding in self.findings)

    @property
    def digest(self) -> str:
        """sha256 over the report: the same data and rules give the same."""
        text = json.dumps(self._content(), ensure_ascii=False, sort_keys=True)
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "verdict": self.verdict,
            **self.about,
            "findings": list(self.findings),
            "figures": dict(self.figures),
        }

    def as_dict(self) -> dict[str, Any]:
        return {**self._content(), "report_digest": self.digest}

    def summary(self) -> dict[str, Any]:
        """What a run's card keeps of it."""
        counts = {finding["code"]: finding["count"] for finding in self.findings if finding["level"] != "note"}
        return {"verdict": self.verdict, "report_digest": self.digest, "findings": counts}

    def line(self) -> str:
        """The whole of it in one line."""
        found = ", ".join(f"{row['code']} {row['count']:,}" for row in self.findings if row["level"] != "note")
        return f"data check: {self.verdict}{f' ({found})' if found else ''}"

    def error(self) -> DataBlocked:
        """Why nothing is trained on this data."""
        blocking = [finding for finding in self.findings if finding["level"] == "block"]
        listed = "; ".join(f"{row['code']}: {row['title']} ({row['count']:,} of {row['of']:,})" for row in blocking)
        problems = tuple(
            Problem(row["code"], example["place"], example["text"] or row["title"], row["advice"])
            for row in blocking
            for example in row["examples"]
        )
        return DataBlocked(
            f"{self.about['data']} is not fit to train on: {listed}. `hotshoe data check` shows all; a rule that is "
            "wrong for this data is set with --rules CODE=warn.",
            param="data",
            problems=problems,
            report=self.as_dict(),
        )
