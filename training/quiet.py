"""Libraries that talk while they work, told to be quiet: what a run says, it says itself."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

Progress = Callable[[int, int], None]  # rows done, rows in all


def unwatched(done: int, total: int) -> None:
    """Progress that nobody watches."""


def quieten() -> None:
    """For a command of ours: no progress bars and no chatter from transformers and its friends, errors excepted."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|bitsandbytes|tensorboard)\b.*")
