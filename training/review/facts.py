"""What the rules know beside the config: the base by its name or folder, the data by its rows, and the machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.config import SERVED_RANK
from training.gate.amount import percentile

GPUS_WITHOUT_BF16 = ("t4", "v100", "p100", "p40", "p4", "rtx2080", "2080ti", "k80", "m60", "rtx6000", "titan")
FOREIGN = (
    "llama",
    "mistral",
    "mixtral",
    "gemma",
    "phi-",
    "falcon",
    "deepseek",
    "internlm",
    "glm",
    "gpt",
    "olmo",
    "granite",
)
SIZE = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)(b|m)(?![a-z0-9])", re.IGNORECASE)
ACTIVE = re.compile(r"-a\d+(?:\.\d+)?b", re.IGNORECASE)


@dataclass(frozen=True)
class Base:
    """A base as far as it is known. `id` is what the config names it; what is not known is None."""

    id: str = ""
    parameters: float | None = None
    context_length_tokens: int | None = None
    architecture: str | None = None

    @property
    def name(self) -> str:
        return self.id.rstrip("/").rpartition("/")[2].lower()

    @property
    def is_qwen(self) -> bool | None:
        """None where neither name nor config says."""
        if self.architecture:
            return self.architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
        if "qwen" in self.name:
            return True
        return False if any(family in self.name for family in FOREIGN) else None

    @property
    def is_qwen3(self) -> bool:
        return "qwen3" in self.name or self.architecture == "Qwen3ForCausalLM"

    @property
    def is_qwen2(self) -> bool:
        return "qwen2" in self.name or self.architecture == "Qwen2ForCausalLM"

    @property
    def toggles_thinking(self) -> bool:
        """Qwen3 of April 2025: one template for thinking and not."""
        return "qwen3" in self.name and not any(
            word in self.name for word in ("2507", "base", "coder", "qwen3.", "qwen3-next")
        )


@dataclass(frozen=True)
class Data:
    """Rows as they are counted; lengths in tokens where they could be rendered."""

    rows: int
    tokens: Sequence[int] = ()  # of each row, ascending
    total_tokens: int = 0
    has_reasoning: bool | None = None
    counted_with: str = ""

    @property
    def longest(self) -> int:
        return self.tokens[-1] if self.tokens else 0

    def share(self, percent: int) -> int:
        """The length that so many percent of the rows do not exceed."""
        return percentile(self.tokens, percent) if self.tokens else 0

    def above(self, length: int) -> int:
        return sum(tokens > length for tokens in self.tokens)


@dataclass(frozen=True)
class Known:
    """All of it; what nobody said is None."""

    base: Base = Base()
    data: Data | None = None
    gpu: str | None = None
    is_cpu: bool | None = None
    max_rank: int = SERVED_RANK


def base_named(name: str | None) -> Base:
    """What a base's name tells: its size (its folder's config.json, where that is here, tells more)."""
    if not name:
        return Base()
    folder = Path(name)
    if (folder / "config.json").is_file():
        return base_of_folder(folder, name)
    size = SIZE.search(ACTIVE.sub("", name.rpartition("/")[2]))
    parameters = float(size[1]) * (1e9 if size[2].lower() == "b" else 1e6) if size else None
    return Base(name, parameters)


def base_beside(own: str | None, named: str | None) -> Base:
    """The config's own base, with what is not known of it taken from the one that was named beside it."""
    base, beside = base_named(own), base_named(named)
    if beside.id and not (base.parameters or base.architecture):
        return beside
    if base.is_qwen is False:
        return base  # another family's figures are not those of the one beside it
    return Base(
        base.id,
        base.parameters or beside.parameters,
        base.context_length_tokens or beside.context_length_tokens,
        base.architecture or beside.architecture,
    )


def base_of_folder(folder: Path, name: str) -> Base:
    """Raises BaseInvalid where its config.json is none."""
    from adapters.bases import load_base
    from adapters.errors import BaseInvalid
    from adapters.strict_json import JsonInvalid, parse_json

    try:
        config = parse_json((folder / "config.json").read_bytes()[:1_000_000])
    except (OSError, JsonInvalid) as error:
        raise BaseInvalid(f"{folder}/config.json {error}.", param="base") from error
    architecture = next(iter(config.get("architectures") or ()), None) if isinstance(config, dict) else None
    try:
        base = load_base(folder)
    except BaseInvalid:
        return Base(name, architecture=architecture or "unknown")
    from training.material import parameter_count

    return Base(name, float(parameter_count(base)), base.context_length_tokens, architecture)


def data_of(path: Path, columns: tuple[str, ...], base: str | None) -> Data:
    """The rows of a file, rendered with the base's template where that can be opened, else with the embedded one's."""
    from adapters.embedded import EMBEDDED, open_base
    from adapters.errors import HotshoeError
    from training.data.template import load_template
    from training.gate.amount import measure
    from training.gate.check import read

    subject = read(path, columns)
    try:
        opened = open_base(base or EMBEDDED)
    except HotshoeError:
        if base is None:
            raise
        opened = open_base(EMBEDDED)
    lengths = measure(subject.rows, load_template(opened.folder, None), "all")
    reasons = any(_reasons(message) for row in subject.rows for message in row.messages)
    return Data(len(subject.rows), tuple(sorted(lengths.tokens)), sum(lengths.tokens), reasons, opened.id)


def data_of_facts(facts: Mapping[str, Any]) -> Data | None:
    """A run's own counts: the longest row stands for the lengths."""
    if not facts.get("rows"):
        return None
    longest = int(facts.get("longest_row_tokens") or 0)
    rows = int(facts["rows"])
    return Data(rows, (longest,) if longest else (), int(facts.get("tokens") or 0), facts.get("has_reasoning"))


def _reasons(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and bool(
        message.get("reasoning_content") or "<think>" in str(message.get("content"))
    )


def lacks_bf16(gpu: str) -> bool:
    """Whether a GPU, by its common name, has no bfloat16 units (compute capability below 8.0)."""
    name = gpu.lower().replace(" ", "").replace("-", "").replace("nvidia", "").replace("tesla", "")
    return name in GPUS_WITHOUT_BF16
