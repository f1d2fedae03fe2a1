"""`python -m bench [many] [NAME ...] [--rounds N] [--out FILE]`.

Without a name, or with `many` as the first one: serving many adapters beside peers, which has options of its own
(`python -m bench many --help`). Others: startup, gateway, training, side_channel, restarts (`--kills N`), interference,
export-interference, load-stall, merged, overload, planner; exports, cpu_lora, soak, simulator, simulated (with choices:
`python -m bench.exports` and so on); of the data check gate_speed, privacy, profanity, doubtful.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench import (
    cpu_lora,
    doubtful,
    export_interference,
    exports,
    gate_speed,
    gateway,
    interference,
    load_stall,
    merged,
    overload,
    planner,
    privacy,
    profanity,
    restarts,
    side_channel,
    simulator,
    startup,
    training,
)
from bench.many import run as many
from bench.report import Report, machine, write

BENCHES = {
    "startup": startup.run,
    "gateway": gateway.run,
    "training": training.run,
    "side_channel": side_channel.run,
    "gate_speed": gate_speed.run,
    "privacy": privacy.run,
    "profanity": profanity.run,
    "doubtful": doubtful.run,
    "planner": planner.run,
    "interference": interference.run,
    "export-interference": export_interference.run,
    "exports": exports.run,
    "cpu_lora": cpu_lora.run,
    "load-stall": load_stall.run,
    "merged": merged.run,
    "overload": overload.run,
    "simulator": simulator.run,
}


def main() -> None:
    if sys.argv[1:2] in ([], ["many"]):
        many.main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="+", choices=[*BENCHES, "restarts"], help="which")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each measurement (default 5)")
    parser.add_argument("--kills", type=int, default=20, help="of the engine, by `restarts` (default 20)")
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"), help="where the figures go as JSON")
    given = parser.parse_args()
    print(json.dumps(machine(), indent=2))
    reports: list[Report] = []
    for name in given.names:
        found = restarts.run(given.kills) if name == "restarts" else BENCHES[name](given.rounds)
        for report in found:
            report.print()
            reports.append(report)
    write(reports, given.out)


if __name__ == "__main__":
    main()
