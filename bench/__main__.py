"""`python -m bench [startup] [gateway] [training] [side_channel] [--rounds N] [--out FILE]`: measure, print, write."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench import gateway, side_channel, startup, training
from bench.report import Report, machine, write

BENCHES = {"startup": startup.run, "gateway": gateway.run, "training": training.run, "side_channel": side_channel.run}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*BENCHES, []], help="which to run; all without a name")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each measurement (default 5)")
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"), help="where the figures go as JSON")
    given = parser.parse_args()
    print(json.dumps(machine(), indent=2))
    reports: list[Report] = []
    for name in given.names or BENCHES:
        for report in BENCHES[name](given.rounds):
            report.print()
            reports.append(report)
    write(reports, given.out)


if __name__ == "__main__":
    main()
