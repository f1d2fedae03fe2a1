"""One form of bench.cpu_lora: vLLM's engine in this process, asked over standard input, one JSON object a line."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapters.bases import PROJECTIONS, load_base

ADAPTERS, RANK = 4, 16
MAX_MODEL_TOKENS, PROMPT_TOKENS, VOCABULARY = 2048, 32, 40_000
KV_CACHE_BYTES = 1 << 30
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Engine:
    """vLLM's engine and the adapters of the bench."""

    def __init__(self, asked: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.sampling_params import SamplingParams

        self._clock, self._steps = CLOCKS[asked["clock"]], asked["decode_steps"]
        self._random = random.Random(0)
        slots = {"max_loras": ADAPTERS + 1, "max_lora_rank": RANK, "max_cpu_loras": 2 * (ADAPTERS + 1)}
        lora = {"enable_lora": True, "lora_target_modules": list(PROJECTIONS), **slots} if asked["lora"] else {}
        self._engine = LLM(
            asked["base"],
            dtype=asked["dtype"],
            max_model_len=MAX_MODEL_TOKENS,
            max_num_seqs=16,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=KV_CACHE_BYTES,
            **lora,
        ).llm_engine
        self._sampling = SamplingParams
        self._adapters = self._made_adapters(asked) if lora else {}
        self._count = 0

    def _made_adapters(self, asked: dict[str, Any]) -> dict[str, list[Any]]:
        from vllm.lora.request import LoRARequest

        from tests.fixtures.adapters import write_adapter

        base = load_base(Path(asked["base"]))
        made: dict[str, list[Any]] = {}
        for dtype in ("F32", "BF16"):
            made[dtype] = []
            for seed in range(ADAPTERS):
                folder = Path(asked["folder"]) / f"{dtype}-{seed}"
                if not folder.exists():
                    write_adapter(folder, base, rank=RANK, alpha=2 * RANK, seed=seed, dtype=dtype)
                number = len(made) * 10 + seed
                made[dtype].append(LoRARequest(f"{dtype}-{seed}", number, str(folder)))
        return made

    def measure(self, asked: dict[str, Any]) -> float:
        """Tokens in a second of decoding, or the seconds to a first token."""
        is_decode = asked["kind"] == "decode"
        requests = asked["size"] if is_decode else 1
        prompt = PROMPT_TOKENS if is_decode else asked["size"]
        self._warm(asked)
        begin = self._clock()
        for row in range(requests):
            self._add(prompt, self._steps + 8 if is_decode else 1, asked, row)
        if not is_decode:
            self._run()
            return self._clock() - begin
        started: set[str] = set()
        while len(started) < requests:
            started |= {output.request_id for output in self._engine.step() if output.outputs[0].token_ids}
        begin = self._clock()
        for _ in range(self._steps):
            self._engine.step()
        seconds = self._clock() - begin
        self._run()
        return float(requests * self._steps / seconds)

    def _warm(self, asked: dict[str, Any]) -> None:
        """Have the adapters in their slots."""
        for row in range(asked["adapters"]):
            self._add(4, 2, asked, row)
        self._run()

    def _add(self, prompt: int, tokens: int, asked: dict[str, Any], row: int) -> None:
        self._count += 1
        ids = [self._random.randrange(100, VOCABULARY) for _ in range(prompt)]
        sampling = self._sampling(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        count = asked["adapters"]
        lora = self._adapters[asked["dtype"]][row % count] if count else None
        self._engine.add_request(str(self._count), {"prompt_token_ids": ids}, sampling, lora_request=lora)

    def _run(self) -> None:
        while self._engine.has_unfinished_requests():
            self._engine.step()


def main() -> None:
    out = sys.stdout
    sys.stdout = sys.stderr  # whatever vLLM prints
    begin = time.perf_counter()
    engine = Engine(json.loads(sys.stdin.readline()))
    print(json.dumps({"start_seconds": time.perf_counter() - begin}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps({"value": engine.measure(json.loads(line))}), file=out, flush=True)


if __name__ == "__main__":
    main()
