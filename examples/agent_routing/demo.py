"""`make demo`: from an empty folder to a trained, served, swapped and exported adapter, and a table of what happened.

Eight steps, each with its time; docs/demo.md says how long it takes. Exit code 0 when every step reached its bar, 1
with a plain sentence when one did not, 130 when it was interrupted. No process is left in any case.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

from adapters.errors import HotshoeError
from examples.agent_routing.console import Console, StepFailed, clock
from examples.agent_routing.exporting import export_and_compare
from examples.agent_routing.learn import Results, Schedule, baseline, make_data, prepare_base, train_adapters
from examples.agent_routing.serving import serve_both
from examples.agent_routing.summary import as_report, collect, summary
from examples.agent_routing.swapping import swap, train_second
from examples.agent_routing.workshop import Workshop


def run(shop: Workshop, seed: int, schedule: Schedule) -> Results:
    """All steps in order; raises StepFailed at the first that misses its bar."""
    console, results = shop.console, Results()
    shop.clear()
    with console.step(1, "Prepare the embedded base"):
        prepare_base(shop, results)
    with console.step(2, "Make the data from sentence templates"):
        make_data(shop, results, seed)
    with console.step(3, "Baseline: the base with its best prompt"):
        baseline(shop, results)
    with console.step(4, "Train router-en by QLoRA and router-vi by LoRA"):
        train_adapters(shop, schedule)
    with contextlib.ExitStack() as running:
        with console.step(5, "Serve one base with two adapters, ask them, score them"):
            results.facts["ready_seconds"] = running.enter_context(shop.server())
            console.lines(f"ready after {results.facts['ready_seconds']:.1f} s")
            serve_both(shop, results)
        with console.step(6, "A second version: train, push, promote, roll back, promote"):
            train_second(shop, results, schedule)
            swap(shop, results)
        with console.step(7, "Export router-en@2 merged and answer without peft"):
            export_and_compare(shop, results)
        with console.step(8, "What happened"):
            collect(shop, results)
            console.say()
            console.lines(summary(results, console.seconds))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for everything; emptied first")
    parser.add_argument("--seed", type=int, default=0, help="which templates are in which split")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console()
    shop = Workshop(given.out, console)
    code = 1
    try:
        results = run(shop, given.seed, Schedule())
        report = shop.folder / "report.json"
        report.write_text(json.dumps(as_report(results, console.seconds), indent=2, default=str) + "\n", "utf-8")
        console.say(f"\nDone in {clock(sum(console.seconds.values()))}. Everything is in {shop.folder}.")
        code = 0
    except StepFailed as failure:
        console.say(f"\nThe demo stops here: {failure}")
    except HotshoeError as error:
        console.say(f"\nThe demo stops here: {error.message}")
    except KeyboardInterrupt:
        console.say("\nInterrupted.")
        code = 130
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        left = shop.sweep()
    if left and code == 0:
        console.say(f"Processes {left} outlived the commands that started them; they were ended.")
        return 1
    return code


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
