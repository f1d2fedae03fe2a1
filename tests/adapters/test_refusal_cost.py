"""What a hostile file costs before it is refused: at most 50 ms of processor time and 20 MB."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.bases import BaseModel
from adapters.canonical import check
from adapters.inspect import CONFIG_FILE, WEIGHTS_FILE, inspect_folder
from tests.fixtures.adapters import write_adapter

MAX_SECONDS = 0.05
MAX_BYTES = 20_000_000
PLAIN = b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8, '


def framed(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def tensors(count: int, key: str = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight") -> bytes:
    entry = ',"' + key + '":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    return framed(("{" + "".join(entry.format(i) for i in range(count))[1:] + "}").encode())


def unknown(count: int) -> bytes:
    entry = '"base_model.model.layers.{}.x.lora_A.weight":{{"dtype":"F16","shape":[1,1],"data_offsets":[{},{}]}}'
    entries = ",".join(entry.format(i, 2 * i, 2 * i + 2) for i in range(count))
    return framed(f"{{{entries}}}".encode(), bytes(2 * count))


def patterns(key: str, count: int) -> bytes:
    return (
        PLAIN + b'"rank_pattern": ' + json.dumps({key.replace("{}", str(i)): 1 for i in range(count)}).encode() + b"}"
    )


WEIGHTS: dict[str, Callable[[], bytes]] = {
    "u10 length 0": lambda: bytes(8) + b"x" * 100,
    "u10 length 2^63": lambda: (2**63).to_bytes(8, "little") + b"{}",
    "u10 length 200 MB": lambda: (200 << 20).to_bytes(8, "little") + b"{}",
    "u10 90 MB of spaces": lambda: framed(b'{"a":' + b" " * (90 << 20) + b"1}"),
    "u10 empty": lambda: b"",
    "u10 7 bytes": lambda: b"1234567",
    "u11 300,000 empty tensors": lambda: tensors(300_000),
    "u11 as many as are read": lambda: tensors(2_950),
    "u11 2 MB of numbers": lambda: framed(b'{"a":[' + b"1," * 1_000_000 + b"1]}"),
    "u11 2 MB of lists": lambda: framed(b'{"a":[' + b"[]," * 690_000 + b"1]}"),
    "u11 2 MB in one string": lambda: framed(b'{"a":"' + b"x" * 2_000_000 + b'"}'),
}
CONFIGS: dict[str, Callable[[], bytes]] = {
    "u15 depth 200,000": lambda: b"[" * 200_000 + b"]" * 200_000,
    "u15 depth 10,000": lambda: b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "u15 10^6 digits": lambda: b'{"r":' + b"1" * 1_000_000 + b"}",
    "u15 1 MB of numbers": lambda: b'{"r":[' + b"1," * 520_000 + b"1]}",
    "u15 as many lists as are read": lambda: b'{"r":[' + b"[]," * 16_000 + b"1]}",
    "u15 as many keys as are read": lambda: json.dumps({str(i): 1 for i in range(32_000)}).encode(),
    "u15 50 MB": lambda: b" " * (50 << 20),
    "u16 10,000 names": lambda: patterns("layers.{}.q_proj", 10_000),
    "u16 4,000 regexes": lambda: patterns("(a{}+)+$" * 5, 4_000),
    "u16 a string of regexes": lambda: PLAIN + b'"surprise": 1, "target_modules": "' + b"(a+)+$" * 100_000 + b'"}',
}


def cost(folder: Path, base: BaseModel) -> tuple[float, int, str]:
    """Least processor seconds of five runs, peak bytes, verdict."""

    def run() -> str:
        return str(check(inspect_folder(folder), base, max_rank=64).verdict)

    seconds = []
    for _ in range(5):
        started = time.process_time()
        run()
        seconds.append(time.process_time() - started)
    tracemalloc.start()
    verdict = run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return min(seconds), peak, verdict


@pytest.mark.parametrize("case", WEIGHTS)
def test_u10_u11_hostile_weights_cost_little(tmp_path: Path, tiny: BaseModel, case: str) -> None:
    folder = write_adapter(tmp_path / "adapter", tiny)
    (folder / WEIGHTS_FILE).write_bytes(WEIGHTS[case]())
    seconds, peak, verdict = cost(folder, tiny)
    assert verdict == "refuse"
    assert (seconds < MAX_SECONDS, peak < MAX_BYTES) == (True, True), f"{seconds * 1000:.1f} ms, {peak / 1e6:.1f} MB"


@pytest.mark.parametrize("case", CONFIGS)
def test_u15_u16_hostile_configs_cost_little(tmp_path: Path, tiny: BaseModel, case: str) -> None:
    folder = write_adapter(tmp_path / "adapter", tiny)
    (folder / CONFIG_FILE).write_bytes(CONFIGS[case]())
    seconds, peak, verdict = cost(folder, tiny)
    assert verdict == "refuse"
    assert (seconds < MAX_SECONDS, peak < MAX_BYTES) == (True, True), f"{seconds * 1000:.1f} ms, {peak / 1e6:.1f} MB"


def test_a_whole_header_of_unknown_names_costs_no_more_than_one_that_fits(tmp_path: Path, tiny: BaseModel) -> None:
    folder = write_adapter(tmp_path / "adapter", tiny)
    (folder / WEIGHTS_FILE).write_bytes(unknown(2_950))
    seconds, peak, verdict = cost(folder, tiny)
    assert (verdict, peak < MAX_BYTES) == ("refuse", True)
    assert seconds < 5 * MAX_SECONDS  # every name is looked up, as those of a good file are
    reasons = check(inspect_folder(folder), tiny, max_rank=64).reasons
    assert any("2,950 of their names are of no layer" in reason.message for reason in reasons)
