"""transformers + peft without a server: the loop that a person would write, `python -m bench.many.peft_side FOLDERS`.

The requests that have arrived wait in a row. The adapter of the oldest is switched on, up to `BATCH` of its waiting
requests are padded to one batch and generated to the end; then the next. There is no HTTP in its times. A load comes as
one JSON line over standard input, and what was seen goes back as one.
"""

from __future__ import annotations

import heapq
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from bench.many.drive import Flight, Window
from bench.many.plan import BASE, Lengths, Load, Popularity, Shot
from bench.many.stats import Seen

BATCH = 16
Generate = Callable[[list[Flight], Callable[[], float], float], None]


def asked(load: Load, seed: int, window: Window) -> dict[str, Any]:
    """A load as a JSON object; `parsed` is its inverse."""
    return {"load": asdict(load), "seed": seed, "window": asdict(window)}


def parsed(given: dict[str, Any]) -> tuple[Load, int, Window]:
    fields = dict(given["load"])
    parts: dict[str, Any] = {
        "popularity": Popularity(**fields.pop("popularity")),
        "prompt": Lengths(**fields.pop("prompt")),
        "output": Lengths(**fields.pop("output")),
    }
    return Load(**fields, **parts), given["seed"], Window(**given["window"])


class Row:
    """The requests of a load as they arrive: by the plan's clock, or as one of the clients becomes free."""

    def __init__(self, load: Load, seed: int, window: Window) -> None:
        self._is_open = load.rate is not None
        self._window = window
        self._order = 0
        self.flights: list[Flight] = []
        self._ahead: list[tuple[float, int, Flight]] = []
        self.waiting: list[Flight] = []
        shots = load.arrivals(seed, window.warm_seconds + window.seconds) if self._is_open else load.shots(seed)
        self._shots: Iterator[Shot] = iter(shots)
        for shot in self._shots if self._is_open else ():
            self._come(shot.at_seconds - window.warm_seconds, shot)
        for _ in range(load.clients):
            self._come(-window.warm_seconds, next(self._shots))

    @property
    def end(self) -> float:
        return self._window.seconds + (self._window.drain_seconds if self._is_open else 0.0)

    def arrive(self, now: float) -> float | None:
        """Put what has come by now into `waiting`; answers with the time of the next that has not, None without one."""
        while self._ahead and self._ahead[0][0] <= now:
            self.waiting.append(heapq.heappop(self._ahead)[2])
        return self._ahead[0][0] if self._ahead else None

    def batch(self) -> list[Flight]:
        """Take the oldest that waits and those of the same adapter with it."""
        model = self.waiting[0].shot.model
        taken = [one for one in self.waiting if one.shot.model == model][:BATCH]
        self.waiting = [one for one in self.waiting if not any(one is other for other in taken)]
        return taken

    def answered(self, flights: list[Flight]) -> None:
        """Each client of a closed load asks its next question when its answer was whole."""
        for flight in flights if not self._is_open else ():
            if flight.tokens is not None and not (0 < self._window.requests <= len(self.flights)):
                self._come(flight.times[-1], next(self._shots))

    def seen(self) -> list[Seen]:
        counted = (one for one in self.flights if one.intended >= 0 or (not self._is_open and self._lies_in(one)))
        return [one.seen(self._window) for one in counted if one.intended <= self._window.seconds]

    def _lies_in(self, flight: Flight) -> bool:
        return flight.tokens is None or flight.times[-1] >= 0

    def _come(self, at: float, shot: Shot) -> None:
        flight = Flight(shot, at, sent=at)
        self.flights.append(flight)
        heapq.heappush(self._ahead, (at, self._order, flight))
        self._order += 1


def serve(load: Load, seed: int, window: Window, generate: Generate) -> list[Seen]:
    """One window of the load by this `generate`, which answers a batch and stops at the end of the window."""
    row = Row(load, seed, window)
    start = time.perf_counter() + window.warm_seconds

    def clock() -> float:
        return time.perf_counter() - start

    while clock() < row.end:
        coming = row.arrive(clock())
        if row.waiting:
            batch = row.batch()
            generate(batch, clock, row.end)
            row.answered(batch)
        elif coming is None:
            break
        else:
            time.sleep(max(0.0, min(coming, row.end) - clock()))
    return row.seen()


class Model:
    """The base with all adapters in it, in float32."""

    def __init__(self, base: str, adapters: list[str]) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        self._torch = torch
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        for number, folder in enumerate(adapters):
            if number:
                model.load_adapter(folder, adapter_name=str(number))
            else:
                model = PeftModel.from_pretrained(model, folder, adapter_name="0")
        self._model: Any = model.eval()

    def generate(self, batch: list[Flight], clock: Callable[[], float], end: float) -> None:
        """Answer the batch, noting the time of each token; it ends early when the clock says so."""
        torch, longest = self._torch, max(one.shot.prompt_tokens for one in batch)
        rows = [[0] * (longest - one.shot.prompt_tokens) + one.shot.prompt() for one in batch]
        mask = [[0] * (longest - one.shot.prompt_tokens) + [1] * one.shot.prompt_tokens for one in batch]
        model = batch[0].shot.model
        if model != BASE:
            self._model.set_adapter(str(model))
        most = max(one.shot.output_tokens for one in batch)

        def note(ids: Any, scores: Any, **more: Any) -> Any:
            now = clock()
            for one in batch:
                if len(one.times) < one.shot.output_tokens:
                    one.times.append(now)
            return torch.full((len(batch),), now >= end)

        with torch.inference_mode(), self._model.disable_adapter() if model == BASE else nullcontext():
            self._model.generate(
                input_ids=torch.tensor(rows),
                attention_mask=torch.tensor(mask),
                do_sample=False,
                max_new_tokens=most,
                min_new_tokens=most,
                pad_token_id=0,
                stopping_criteria=[note],
            )
        for one in batch:
            if len(one.times) == one.shot.output_tokens:
                one.tokens = one.shot.output_tokens


def main(folders: list[str]) -> None:
    out = sys.stdout
    sys.stdout = sys.stderr  # whatever the libraries print
    begin = time.monotonic()
    model = Model(folders[0], folders[1:])
    print(json.dumps({"start_seconds": time.monotonic() - begin}), file=out, flush=True)
    for line in sys.stdin:
        found = serve(*parsed(json.loads(line)), model.generate)
        print(json.dumps({"seen": [asdict(one) for one in found]}), file=out, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
