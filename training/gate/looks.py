"""What takes long and each row is asked by itself: its length in tokens, and what is private in it.

Many rows are looked at in a process beside this one, so that two cores are used. It loads the tokenizer without torch,
whose import takes seconds and half a gigabyte, and of which a tokenizer needs nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from adapters.errors import DataInvalid
from training.data.rows import Row
from training.data.template import ChatTemplate, load_template
from training.gate import amount, privacy

ROWS_AT_A_TIME = 1_000  # travel to the other process together
ROWS_FOR_A_PROCESS = 5_000  # below, starting one takes longer than it saves, unless this one had to load a tokenizer
THINKING = ("reasoning_content", "<think>")


@dataclass(frozen=True)
class Rendered:
    """Which base's template renders the rows, and how."""

    folder: Path
    thinking: bool | None = None
    supervise: str = "all"


@dataclass(frozen=True)
class Seen:
    """What was found. Without a template no length is known, and `template` is empty."""

    private: privacy.ByRule = field(default_factory=dict)
    lengths: amount.Lengths = amount.NO_LENGTHS
    template: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence[Seen]) -> Seen:
        """Of ranges of rows, in their order."""
        template = parts[0].template if parts else {}
        private, lengths = privacy.joined([part.private for part in parts]), [part.lengths for part in parts]
        return cls(private, amount.Lengths.joined(lengths), template)


def facts_of(template: ChatTemplate) -> dict[str, Any]:
    """What a report says of a template."""
    return {"template": template.digest, "renders_thought": any(word in template.text for word in THINKING)}


def seen(rows: Sequence[Row], rendered: Rendered | None, first: int = 0) -> Seen:
    """Look at rows, `first` being the number of the first of them; raises BaseInvalid."""
    private = privacy.by_rule(enumerate(rows, start=first), privacy.matches)
    if rendered is None:
        return Seen(private)
    template = _template(rendered.folder, rendered.thinking)
    return Seen(private, amount.measure(rows, template, rendered.supervise, first), facts_of(template))


@contextmanager
def looking(rows: Sequence[Row], rendered: Rendered | None) -> Iterator[Callable[[], Seen]]:
    """Look at rows while the block does other things; what it is given waits for the end and says what was seen."""
    if len(rows) < ROWS_FOR_A_PROCESS and (rendered is None or "transformers" in sys.modules):
        yield cache(lambda: seen(rows, rendered))
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_settle) as pool:
        starts = range(0, len(rows), ROWS_AT_A_TIME)
        parts = [pool.submit(seen, rows[start : start + ROWS_AT_A_TIME], rendered, start) for start in starts]
        try:
            yield cache(lambda: Seen.joined([part.result() for part in parts]))
        except BrokenProcessPool as error:
            raise DataInvalid(
                f"The process that looked at {len(rows):,} rows was killed, most likely because memory ran out: free "
                "some, or check a part of the data.",
                param="data",
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@cache
def _template(folder: Path, thinking: bool | None) -> ChatTemplate:
    return load_template(folder, thinking)


def _settle() -> None:
    """In the process beside: no torch, no signals from the keyboard, and no life longer than the parent's."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # which is how Python spells "not installed"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
