"""A merged export against `cp -r` of the base and against PEFT's merge, each ended by its own fsync, with peak memory.

Every measurement is a process of its own; they take turns, round by round, and their output is removed between. The
checkpoint is made here: the shape of Qwen2.5-1.5B with random weights, 3.1 GB of bf16 in four shards, and a rank-16
adapter of all 196 projections.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from adapters.embedded import EMBEDDED, open_base
from bench.exports_side import COPY, PEFT, SIDES
from bench.report import Report, spread

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
SHARDS, RANK = 4, 16


def run(rounds: int, place: Path | None = None, sides: tuple[str, ...] = SIDES) -> list[Report]:
    """The embedded base and the made one, in a folder under `place`, which decides the disk."""
    with tempfile.TemporaryDirectory(prefix="hotshoe-bench-", dir=place) as scratch:
        folder = Path(scratch)
        embedded = folder / "embedded"
        shutil.copytree(open_base(EMBEDDED).folder, embedded, ignore=shutil.ignore_patterns(".*"))
        cases = {
            "embedded base": (embedded, "float32"),
            "Qwen2.5-1.5B's shape": (make_base(folder / "made"), "bfloat16"),
        }
        return [
            _compare(f"{name}, {_kind_of(folder)}", base, dtype, rounds, sides) for name, (base, dtype) in cases.items()
        ]


def _compare(name: str, base: Path, dtype: str, rounds: int, sides: tuple[str, ...]) -> Report:
    adapter = make_adapter(base.parent / f"{base.name}-adapter", base)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            found[side].append(_measure(side, {"base": str(base), "adapter": str(adapter), "dtype": dtype}))
    report = Report(f"Exports, {name}: {size / 1e9:.2f} GB of weights ({rounds} rounds)")
    for side in sides:
        others = {"of cp": COPY, "of peft": PEFT}
        ratios = {
            label: spread([one["seconds"] / two["seconds"] for one, two in zip(found[side], found[other], strict=True)])
            for label, other in others.items()
            if other in found
        }
        seconds = spread([one["seconds"] for one in found[side]])
        report.rows.append(
            {
                "side": side,
                "seconds": seconds["median"],
                "min..max": f"{seconds['min']:.2f}..{seconds['max']:.2f}",
                **{label: ratio["median"] for label, ratio in ratios.items()},
                "peak MB above torch": spread([one["peak_bytes"] / 1e6 for one in found[side]])["median"],
            }
        )
    return report


def _measure(side: str, spec: dict[str, str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=Path(spec["base"]).parent) as scratch:
        path = Path(scratch) / "spec.json"
        path.write_text(json.dumps({**spec, "out": str(Path(scratch) / "out")}))
        command = [sys.executable, "-m", "bench.exports_side", side, str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _kind_of(folder: Path) -> str:
    done = subprocess.run(["stat", "-f", "-c", "%T", folder], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def make_base(folder: Path) -> Path:
    """A checkpoint in the shape of Qwen2.5-1.5B with random weights: bf16, four shards and their index."""
    import torch
    from safetensors.torch import save_file

    from adapters.checkpoint import expected_tensors

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    required, _ = expected_tensors(CONFIG)
    total, shard = 2 * sum(map(math.prod, required.values())), 0
    weight_map: dict[str, str] = {}
    held: dict[str, Any] = {}
    made = 0
    torch.manual_seed(0)
    for name, shape in required.items():
        held[name] = (torch.randn(shape) * 0.02).bfloat16()
        made += 2 * math.prod(shape)
        if made >= total * (shard + 1) // SHARDS:
            file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
            save_file(held, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(held, file)
            held, shard = {}, shard + 1
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def make_adapter(folder: Path, base: Path) -> Path:
    """A PEFT folder of random weights, float32, rank 16, of every projection of the base."""
    import torch
    from safetensors.torch import save_file

    from adapters.bases import load_base

    folder.mkdir()
    shapes = load_base(base).shapes
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"}
    targets = sorted({name.rpartition(".")[2] for name in shapes})
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": targets}))
    torch.manual_seed(1)
    tensors = {}
    for name, shape in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, shape.in_features) * 0.02
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(shape.out_features, RANK) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.exports", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--place", type=Path, help="the folder whose disk is measured")
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=SIDES)
    given = parser.parse_args()
    for report in run(given.rounds, given.place, tuple(given.sides)):
        report.print()


if __name__ == "__main__":
    main()
