"""`make gpu-smoke`: one run of everything that a GPU could break, and a report to paste into an issue.

Starts `hotshoe serve`, pushes made adapters, asks base and adapters in one batch, swaps a version under load, kills the
engine, and exports. With `--device cpu` the same on the embedded base, which is how it is tested.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import psutil

from bench.served import serve
from deploy.smoke_adapter import write_adapter
from deploy.smoke_asked import Asking, apart
from deploy.smoke_report import Found, gpu_bytes_used, gpus

# A small Qwen, so that a run is minutes on any GPU; BASE= names another.
GPU_BASE = "Qwen/Qwen2.5-0.5B-Instruct@7ae557604adf67be50417f59c2c2f167def9a775"
START_SECONDS = 1800.0
SLOTS = 4
TOLERANCE = 0.35  # of a log-probability between a batch of one and a mixed one, in 16 bits; a wrong adapter is nats off
ROUNDS = 8


def run(base: str, device: str, engine_args: Sequence[str]) -> Found:
    """Every step; what a step raises ends the run as a failed check."""
    found = Found(base, device)
    with tempfile.TemporaryDirectory(prefix="hotshoe-smoke-") as scratch:
        try:
            _steps(found, Path(scratch), base, engine_args)
        except Exception as error:  # noqa: BLE001 - a report of what went before is worth more than a traceback alone
            found.check("the run went to its end", False, f"{type(error).__name__}: {error}"[:2000])
    return found


def _steps(found: Found, scratch: Path, base: str, engine_args: Sequence[str]) -> None:
    from adapters.embedded import open_base

    opened = open_base(base)
    made = [write_adapter(scratch / f"adapter-{seed}", opened, seed) for seed in (1, 2, 3)]
    flags = ["--base", base, "--slots", str(SLOTS), *(["--", *engine_args] if engine_args else [])]
    with serve(*flags, timeout_seconds=START_SECONDS) as served:
        asking = Asking(served.gateway.url)
        found.figure("ready", f"{served.ready_seconds:.1f} s")
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in served.start_phases().items())
        found.figure("parts of the start, seconds", phases)
        found.figure("engine", json.dumps(asking.system()["engine"].get("engine_version")))
        _push(found, asking, made)
        _mixed(found, asking, opened.id)
        _latency(found, asking, opened.id)
        _swap(found, asking)
        _memory(found, asking)
        _kill(found, asking)
        _export(found, asking, scratch / "merged")


def hotshoe(asking: Asking, *words: str) -> subprocess.CompletedProcess[str]:
    """The command of this environment, at the server."""
    command = [str(Path(sys.executable).with_name("hotshoe")), *words]
    environment = os.environ | {"HOTSHOE_URL": asking.url}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600, check=False)


def _push(found: Found, asking: Asking, made: Sequence[Path]) -> None:
    for name, folder in zip(("smoke-a", "smoke-b", "smoke-a"), made, strict=True):
        began = time.monotonic()
        done = hotshoe(asking, "push", str(folder), "--name", name)
        note = f"{time.monotonic() - began:.1f} s" if done.returncode == 0 else (done.stdout + done.stderr)[-500:]
        found.check(f"{folder.name} is pushed and proven as {name}", done.returncode == 0, note)
    count, seconds = (sum(asking.metric(f"hotshoe_adapter_load_seconds_{p}").values()) for p in ("count", "sum"))
    found.figure("a load into the engine", f"{1000 * seconds / max(1, count):.0f} ms (mean of {count:.0f})")


def _mixed(found: Found, asking: Asking, base_id: str) -> None:
    models = [base_id, "smoke-a@1", "smoke-b@1", "smoke-a@2"]
    alone = {model: asking.ask(model) for model in models}
    found.check("each model answers under its own name", all(alone[m].model == m for m in models))
    least = min(apart(one, other) for one, other in combinations(alone.values(), 2))
    how = "each with a text of its own" if least == math.inf else f"log-probabilities at least {least:.2g} apart"
    found.check("base and adapters answer differently", least > TOLERANCE, how)
    mixed = asking.together(models * 3)
    worst = max(abs(answer.logprobs[0] - alone[answer.model].logprobs[0]) for answer in mixed)
    found.check("a mixed batch gives each the answer that it gives alone", worst <= TOLERANCE)
    equal = sum(answer.text == alone[answer.model].text for answer in mixed)
    found.figure("first token's log-probability, mixed against alone", f"at most {worst:.2g} apart")
    found.figure("whole greedy answers equal to those given alone", f"{equal} of {len(mixed)}")


def _latency(found: Found, asking: Asking, base_id: str) -> None:
    base, adapter = asking.times(base_id, ROUNDS), asking.times("smoke-a@1", ROUNDS)
    for name, index in (("TTFT", 0), ("TPOT", 1)):
        ratio = adapter[index] / base[index]
        shown = f"base {1000 * base[index]:.1f} ms, adapter {1000 * adapter[index]:.1f} ms ({ratio:.2f} times)"
        found.figure(f"{name}, one stream at a time", shown)


def _swap(found: Found, asking: Asking) -> None:
    with asking.load("smoke-a") as seen:
        _until(lambda: len(seen.answers) >= 8)
        began = time.monotonic()
        done = hotshoe(asking, "promote", "smoke-a@2")
        promoted = time.monotonic()
        _until(lambda: len([1 for started, _ in seen.answers if started > promoted]) >= 8)
    found.check(
        "a promote under load", done.returncode == 0, f"{promoted - began:.2f} s, the command's own start in it"
    )
    found.check("no request failed meanwhile", not seen.failures, "; ".join(seen.failures[:3]))
    before = {model for started, model in seen.answers if started < began}
    after = {model for started, model in seen.answers if started > promoted}
    found.check("the old version before, the new one after", before == {"smoke-a@1"} and after == {"smoke-a@2"})
    found.figure("requests during the swap", f"{len(seen.answers)}, {len(seen.failures)} failed")


def _memory(found: Found, asking: Asking) -> None:
    for name in ("hotshoe_memory_bytes", "hotshoe_process_memory_bytes", "hotshoe_memory_unaccounted_bytes"):
        for labels, value in sorted(asking.metric(name).items()):
            found.figure(f"`{name}{labels}`", f"{value / 2**20:,.0f} MiB")
    used = gpu_bytes_used()
    if used is not None:
        found.figure("VRAM in use, by NVML, all processes", f"{used / 2**20:,.0f} MiB")


def _kill(found: Found, asking: Asking) -> None:
    engine = psutil.Process(asking.system()["pid"]).children()[0]
    with asking.load("smoke-b", threads=2) as seen:
        _until(lambda: len(seen.answers) >= 2)
        killed = time.monotonic()
        with contextlib.suppress(psutil.NoSuchProcess):
            engine.send_signal(signal.SIGKILL)
        noticed = asking.wait(False, 30)
        asking.wait(True, START_SECONDS)
        seconds = time.monotonic() - killed
    found.check("the server notices within two seconds that the engine is gone", noticed <= 2.5, f"{noticed:.1f} s")
    found.figure("engine killed until ready again", f"{seconds:.1f} s, {len(seen.failures)} requests refused meanwhile")
    answers = asking.together(["smoke-a", "smoke-b"])
    expected = ["smoke-a@2", "smoke-b@1"]
    found.check("the adapters are back and answer", [answer.model for answer in answers] == expected)


def _export(found: Found, asking: Asking, out: Path) -> None:
    began = time.monotonic()
    done = hotshoe(asking, "export", "smoke-a@2", "--out", str(out), "--json")
    seconds = time.monotonic() - began
    passed = done.returncode == 0 and (out / "config.json").is_file()
    found.check("the export is merged, read back and compared", passed, "" if passed else done.stderr[-500:])
    if passed:
        parity = json.loads(done.stdout)["parity"]
        found.figure("export", f"{seconds:.0f} s, parity {parity['verdict']} by {parity['level']}")
        for name, value in parity.get("logits", {}).items():
            if isinstance(value, int | float | str):
                found.figure(f"parity of logits: {name}", str(value))


def _until(holds: Callable[[], bool], timeout_seconds: float = 300) -> None:
    """Wait for a claim; raises TimeoutError."""
    deadline = time.monotonic() + timeout_seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_seconds:g} s")
        time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.gpu_smoke", description=__doc__)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--base", help=f"a folder or OWNER/NAME@COMMIT; on a GPU {GPU_BASE}, on a CPU the embedded one")
    parser.add_argument("--out", type=Path, default=Path("build/smoke.md"), help="where the report goes")
    parser.add_argument("engine_args", nargs="*", metavar="-- VLLM FLAGS", help="further flags for vLLM")
    given = parser.parse_args()
    found_gpus = gpus() if given.device == "gpu" else []
    if given.device == "gpu" and not found_gpus:
        sys.exit("no NVIDIA GPU is found here; `--device cpu` runs the same on the embedded base")
    base = given.base or (GPU_BASE if given.device == "gpu" else "embedded")
    found = run(base, "; ".join(found_gpus) or "CPU", given.engine_args)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(found.markdown())
    print(f"\n{'passed' if found.is_good else 'FAILED'}; the report to paste into an issue is {given.out}")
    return 0 if found.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
