"""Coverage-guided fuzzing of what reads a stranger's adapter: `python -m tests.fuzz.parsers -max_total_time=60`.

Needs atheris, which is not in the lock (it is for CPython on x86-64 Linux). The fixed corpus is in the tests named
`test_u31_*`; what is found here belongs there. Anything but a verdict is a finding: libFuzzer then stops and says so.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["adapters"]):
    from adapters.bases import BaseModel
    from adapters.check import check
    from adapters.inspect import CONFIG_FILE, WEIGHTS_FILE, inspect_folder

SHAPES = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
HEADER = b'{"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight":{"dtype":"F32","shape":[1,16],'
SEEDS = (
    b'{"peft_type":"LORA","r":1,"lora_alpha":2,"rank_pattern":{"q_proj":1}}\0' + HEADER + b'"data_offsets":[0,64]}}',
    b'{"fine_tune_type":"lora","lora_parameters":{"rank":1,"scale":2.0}}\0'
    b'{"model.layers.0.self_attn.q_proj.lora_a":{"dtype":"F16","shape":[16,1],"data_offsets":[0,32]}}',
    b'{"peft_type":"LORA","r":1,"lora_alpha":2,"init_lora_weights":"pissa","use_dora":true}\0{}',
)


class Target:
    """One input is a config, a zero byte and a safetensors header, or a whole weights file after a one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = BaseModel(folder, "tiny", SHAPES, "sha256:0", ("tiny",))

    def __call__(self, data: bytes) -> None:
        config, mark, weights = data.partition(b"\0")
        if not mark:
            config, _, weights = data.partition(b"\1")
        else:
            weights = len(weights).to_bytes(8, "little") + weights + bytes(64)
        (self.folder / CONFIG_FILE).write_bytes(config)
        (self.folder / WEIGHTS_FILE).write_bytes(weights)
        check(inspect_folder(self.folder), self.base, max_rank=64).as_dict()


def main() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        folder, corpus = Path(scratch) / "adapter", Path(scratch) / "corpus"
        folder.mkdir()
        corpus.mkdir()
        for i, seed in enumerate(SEEDS):
            (corpus / str(i)).write_bytes(seed)
        atheris.Setup([*sys.argv, "-max_len=4096", str(corpus)], Target(folder))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
