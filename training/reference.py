"""The reference path: a base, with or without an adapter, through transformers and `PeftModel.from_pretrained`.

The slow second truth that served and merged models are compared with; `hotshoe eval` and `hotshoe chat --local` use it.
Prompts are rendered as serving renders them: with the base's own template, and with `enable_thinking` as the adapter's
card says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from adapters.bases import BaseModel, load_base
from adapters.errors import AdapterRefused, BaseInvalid, BaseMismatch, ConfigInvalid, DataInvalid, Problem
from training.data.jsontext import RowInvalid
from training.data.rows import Row
from training.data.template import IGNORED, Rendered, load_template
from training.evaluate import Prompt
from training.greedy import Decoding, greedy_answers, padded_behind
from training.loss import cross_entropy_sum
from training.model import base_alone, causal_lm, load_weights
from training.quiet import Progress, unwatched

Message = Mapping[str, Any]
CARD_FILE = "card.json"


class Reference:
    """A model of one folder or two, ready to answer. The base keeps the dtype it is stored in."""

    def __init__(self, base: BaseModel, adapter: Path | None = None) -> None:
        card = read_card(adapter or base.folder)
        if adapter is not None:
            refuse_another_base(card, base, adapter)
        self.base = base
        self.template = load_template(base.folder)
        self.enable_thinking: bool | None = _entry(card, "template").get("enable_thinking")
        self.supervise: str = _entry(card, "settings").get("supervise") or "all"
        self.model = _load(base, adapter)

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "disable_adapter")

    def render(self, prompt: Prompt) -> list[int]:
        """The prompt's ids, those of the engine; raises BaseInvalid where the template cannot render it."""
        thinking = prompt.thinking if self.enable_thinking is None else self.enable_thinking
        try:
            return self.template.prompt_ids(prompt.messages, prompt.tools, thinking)
        except RowInvalid as error:
            raise BaseInvalid(f"The base's chat template cannot render a prompt: {error.message}") from error

    def answers(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 128,
        batch_size: int = 32,
        progress: Progress = unwatched,
    ) -> list[str]:
        """Greedy answers in the order of the prompts."""
        decoding = Decoding(self.template.pad, self.template.stops, max_new_tokens, batch_size)
        found = greedy_answers(self.model, [self.render(prompt) for prompt in prompts], decoding, progress)
        return [self.text(new) for new in found]

    def sequences(self, rows: Sequence[Row]) -> list[Rendered]:
        """The rows as training renders them; raises DataInvalid with every row that the template refuses."""
        made: list[Rendered] = []
        problems: list[Problem] = []
        for row in rows:
            try:
                made += self.template.render(row, self.supervise)
            except RowInvalid as error:
                problems.append(error.problem(str(row.place)))
        if problems:
            raise DataInvalid(f"{len(problems)} of {len(rows)} rows cannot be rendered.", problems=tuple(problems))
        return made

    def loss(self, sequences: Sequence[Rendered], batch_size: int = 8) -> float:
        """The mean cross entropy over all supervised tokens, from plain padded batches."""
        total, tokens = 0.0, 0
        for start in range(0, len(sequences), batch_size):
            part, count = self._loss_sum(sequences[start : start + batch_size])
            total, tokens = total + part, tokens + count
        return total / tokens

    def stream(self, prompt: Prompt, say: Callable[[str], None], max_new_tokens: int, temperature: float = 0.0) -> str:
        """One answer, its pieces given to `say` as they come; returned whole."""
        from transformers import TextStreamer

        pieces: list[str] = []

        class Pieces(TextStreamer):  # type: ignore[misc]  # transformers is untyped here
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                pieces.append(text)
                say(text)

        sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
        ids = torch.tensor([self.render(prompt)], device=self.model.device)
        with torch.inference_mode():
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                eos_token_id=list(self.template.stops),
                pad_token_id=self.template.pad,
                streamer=Pieces(self.template.tokenizer, skip_prompt=True, skip_special_tokens=True),
                **{"do_sample": False, **sampling},
            )
        return "".join(pieces)

    def without_adapter(self) -> AbstractContextManager[Any]:
        """A context in which the base answers alone."""
        return base_alone(self.model)

    def text(self, tokens: Sequence[int]) -> str:
        return str(self.template.tokenizer.decode(tokens, skip_special_tokens=True))

    @torch.inference_mode()
    def _loss_sum(self, rows: Sequence[Rendered]) -> tuple[float, int]:
        ids, mask = padded_behind([row.input_ids for row in rows], self.template.pad)
        labels = padded_behind([row.labels for row in rows], IGNORED)[0][:, 1:]
        whole, device = causal_lm(self.model), self.model.device
        hidden = whole.model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state[:, :-1]
        wanted = (labels != IGNORED).to(device)
        targets = labels.to(device)[wanted]
        return float(cross_entropy_sum(hidden[wanted], whole.lm_head.weight, targets)), targets.numel()


def open_reference(model: str | Path, base: str | Path | None = None) -> Reference:
    """What a model's name means here: an adapter folder on `base`, a whole model's folder, or `embedded`.

    Without `base` an adapter's own word for its base is tried, where it is a folder, and the embedded base else.
    Raises ConfigInvalid, BaseInvalid, BaseMismatch, AdapterRefused.
    """
    from adapters.embedded import EMBEDDED, open_base

    folder = Path(model)
    if (folder / "adapter_config.json").is_file():
        return Reference(open_base(base or claimed_base(folder) or EMBEDDED), folder)
    if str(model) == EMBEDDED:
        return Reference(open_base(EMBEDDED))
    if (folder / "config.json").is_file():
        return Reference(load_base(folder))
    raise ConfigInvalid(f"{model} is neither an adapter folder nor a model folder.", param="model")


def read_card(folder: Path) -> dict[str, Any]:
    """The card in a folder; an empty one where there is none that can be read."""
    try:
        card = json.loads((folder / CARD_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return card if isinstance(card, dict) else {}


def _entry(card: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = card.get(key)
    return value if isinstance(value, Mapping) else {}


def refuse_another_base(card: Mapping[str, Any], base: BaseModel, adapter: Path) -> None:
    """Raises BaseMismatch when the card names another base than the one at hand."""
    trained_on = _entry(card, "base")
    digest = trained_on.get("digest")
    if isinstance(digest, str) and digest != base.digest:
        raise BaseMismatch(
            f"{adapter} was trained on {trained_on.get('id')} ({digest[:15]}…), and {base.folder} is {base.id} "
            f"({base.digest[:15]}…): name its base with --base.",
            param="base",
        )


def claimed_base(adapter: Path) -> str | None:
    """The base that an adapter's own config names, where that is a folder here."""
    try:
        claim = json.loads((adapter / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return claim if isinstance(claim, str) and (Path(claim) / "config.json").is_file() else None


def _load(base: BaseModel, adapter: Path | None) -> Any:
    from safetensors import SafetensorError

    model = load_weights(base, dtype="auto")
    if torch.cuda.is_available():
        model = model.to("cuda")
    if adapter is not None:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, str(adapter))
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise AdapterRefused(f"{adapter} does not load on {base.id}: {error}", param="model") from error
    return model.eval()
