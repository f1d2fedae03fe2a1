"""How far an engine's answers are from PEFT's, in a process of its own: `python -m adapters.agreement`.

Reads one JSON document on stdin, with the folders `base` and `adapter` and what the engine said as `served`, and writes
the comparison on stdout: one forward of base + adapter in PEFT, in float32, for each text that the engine was asked.
"""

from __future__ import annotations

import json
import os
import sys

from adapters.parity_logits import THREADS, against_served, load

NICE = 10


def main() -> None:
    import torch
    from peft import PeftModel

    os.nice(NICE)
    torch.set_num_threads(THREADS)
    spec = json.load(sys.stdin)
    adapted = PeftModel.from_pretrained(load(spec["base"]), spec["adapter"])
    print(json.dumps(against_served(adapted, spec["served"])))


if __name__ == "__main__":
    main()
