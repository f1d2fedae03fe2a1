"""Conversations as token ids with a label mask, both derived from the base's own chat template.

For a supervised turn i two renderings are compared: what the engine renders to ask for it, `messages[:i]` with the
generation prompt, and the conversation up to and with it, `messages[:i+1]`. The first must be a prefix of the second;
what the second adds, up to and with its end-of-turn token, is what the model has to write, and only that gets labels.
So an empty `<think>` block is learned exactly where serving does not inject it, and what follows the end of turn never.

Both parts are tokenised apart, as they are in serving: the prompt's ids are the engine's. Turns of one row share one
rendering where the next turn's prompt ids go on from the last turn's ids; where the template renders history otherwise
(Qwen3 drops earlier thinking), a turn gets a rendering of its own. https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import BaseInvalid
from training.data.jsontext import RowInvalid
from training.data.rows import Place, Row, is_thought

ROWS_AT_A_TIME = 512
IGNORED = -100  # the label of a position that is not learned, as torch's cross entropy has it


@dataclass(frozen=True)
class Rendered:
    """One sequence: `input_ids` and `labels` of equal length, labels[i] being input_ids[i] or -100."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    turns: tuple[int, ...]  # indices of the messages that are learned in it

    @property
    def supervised_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels)

    @property
    def used_tokens(self) -> int:
        """How many leading tokens the last learned one is predicted from; what follows them has no say in the loss."""
        return max(place for place, label in enumerate(self.labels) if label != IGNORED)


class ChatTemplate:
    """A base's tokenizer with its chat template, and the tokens that end a turn when it is served."""

    def __init__(self, tokenizer: Any, stop_ids: frozenset[int], thinking: bool | None = None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise BaseInvalid(
                "The base's tokenizer has no chat template, so there is no rendering to train on that serving would "
                "use. Take the base's Instruct form, or put its chat_template.jinja into the folder."
            )
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.thinking = thinking
        template = tokenizer.chat_template
        self.text = template if isinstance(template, str) else template["default"]
        self.has_thinking_switch = "enable_thinking" in self.text
        self._blank: dict[tuple[int, ...], bool] = {}
        self._special = frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens that end an answer, in order."""
        return tuple(sorted(self.stop_ids))

    @property
    def pad(self) -> int:
        """What fills a batch: the tokenizer's padding token, or one that ends answers where it has none."""
        pad = self.tokenizer.pad_token_id
        return int(self.stops[0] if pad is None else pad)

    @property
    def digest(self) -> str:
        """sha256 of the template's text."""
        return f"sha256:{hashlib.sha256(self.text.encode()).hexdigest()}"

    def prompt_text(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, thinking: bool | None = None
    ) -> str:
        """The conversation with the generation prompt, as the engine renders it to ask for the next turn."""
        return self._render(messages, tools, thinking, add_generation_prompt=True)

    def prompt_ids(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, thinking: bool | None = None
    ) -> list[int]:
        return self._tokenise(self.prompt_text(messages, tools, thinking))

    def end_of_turn(self) -> int | None:
        """The token that ends an assistant's turn; None where the template takes no conversation of two words."""
        messages = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"})
        row = Row(messages, None, (0, 1), Place("", 0, 0), "chat")
        try:
            return self.render(row)[0].labels[-1]
        except RowInvalid:
            return None

    def render(self, row: Row, supervise: str = "all") -> list[Rendered]:
        """The row's sequences, each supervised turn in exactly one; raises RowInvalid where the template cannot."""
        return self._sequences(self._written(row, supervise), self._tokenise)

    def render_all(self, rows: Sequence[Row], supervise: str = "all") -> Iterator[list[Rendered] | RowInvalid]:
        """Of each row what `render` makes of it or raises; texts are tokenised many at a time, on all cores."""
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            written = [self._written_or_not(row, supervise) for row in rows[start : start + ROWS_AT_A_TIME]]
            ids = self._tokenised({t for one in written if isinstance(one, list) for _, *texts in one for t in texts})
            for one in written:
                yield one if isinstance(one, RowInvalid) else self._sequences_or_not(one, ids)

    def _sequences(
        self, written: Sequence[tuple[int, str, str]], tokenise: Callable[[str], list[int]]
    ) -> list[Rendered]:
        sequences: list[_Sequence] = []
        for turn, before, after in written:
            prompt, completion = tokenise(before), self._learned(tokenise(after), turn)
            if not sequences or not sequences[-1].goes_on_to(prompt):
                sequences.append(_Sequence())
            sequences[-1].add(turn, prompt, completion)
        return [sequence.finished() for sequence in sequences]

    def _sequences_or_not(
        self, written: Sequence[tuple[int, str, str]], ids: Mapping[str, list[int]]
    ) -> list[Rendered] | RowInvalid:
        try:
            return self._sequences(written, ids.__getitem__)
        except RowInvalid as error:
            return error

    def _written_or_not(self, row: Row, supervise: str) -> list[tuple[int, str, str]] | RowInvalid:
        try:
            return self._written(row, supervise)
        except RowInvalid as error:
            return error

    def _written(self, row: Row, supervise: str) -> list[tuple[int, str, str]]:
        """Of each supervised turn its index, the text before it and the text that the model has to write for it."""
        return [(turn, *self._turn(row, turn)) for turn in row.learned_turns(supervise)]

    def _turn(self, row: Row, turn: int) -> tuple[str, str]:
        thinks = self.thinks(row.messages[turn])
        before = self.prompt_text(row.messages[:turn], row.tools, thinks)
        after = self._render(row.messages[: turn + 1], row.tools, thinks, add_generation_prompt=False)
        if not after.startswith(before):
            raise RowInvalid(
                "template_mismatch",
                f"messages[{turn}] does not continue the prompt that serving renders for it.",
                "try --thinking or --no-thinking; see `hotshoe data show`",
            )
        return before, after[len(before) :]

    def _learned(self, completion: list[int], turn: int) -> list[int]:
        """The ids up to and with the end of the turn; raises RowInvalid where one before it stops."""
        end = self._end_of_turn(completion, turn)
        stops = [token for token in completion[:end] if token in self.stop_ids]
        if stops:
            raise RowInvalid(
                "stop_inside",
                f"messages[{turn}] holds {self.tokenizer.decode(stops[:1])!r} in its text, where serving would stop.",
                "remove it; the template writes the end of a turn",
            )
        return completion[: end + 1]

    def thinks(self, message: Mapping[str, Any]) -> bool:
        """Whether serving renders the prompt for this turn with thinking on."""
        if self.thinking is not None:
            return self.thinking
        return is_thought(message)

    def _end_of_turn(self, completion: list[int], turn: int) -> int:
        """Position of the last special token, which nothing but white space may follow; it must stop generation."""
        position = next((i for i in reversed(range(len(completion))) if completion[i] in self._special), None)
        if position is None or not self._is_blank(tuple(completion[position + 1 :])):
            raise BaseInvalid(
                f"The base's chat template does not end messages[{turn}] with a special token, so an adapter trained "
                "with it would never stop. Use the base's Instruct form."
            )
        if completion[position] not in self.stop_ids:
            ends = self.tokenizer.decode([completion[position]])
            stops = ", ".join(repr(self.tokenizer.decode([token])) for token in sorted(self.stop_ids)) or "nothing"
            raise BaseInvalid(
                f"The chat template ends a turn with {ends!r}, but this base stops at {stops}: what is trained with it "
                "would never stop. Use the base's Instruct form, or name the token in its generation_config.json."
            )
        return position

    def _is_blank(self, ids: tuple[int, ...]) -> bool:
        """Whether the ids are white space; the few that follow an end of turn are decoded once."""
        if ids not in self._blank:
            self._blank[ids] = not self.tokenizer.decode(list(ids)).strip()
        return self._blank[ids]

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: Any, thinking: bool | None, *, add_generation_prompt: bool
    ) -> str:
        switch = {"enable_thinking": bool(thinking)} if self.has_thinking_switch and thinking is not None else {}
        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **switch,
            )
        except Exception as error:  # jinja and the template's own raise_exception have no common type
            raise RowInvalid("template_failed", f"the base's chat template fails on it: {error}.") from error
        return text

    def _tokenise(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _tokenised(self, texts: Collection[str]) -> dict[str, list[int]]:
        """The ids of each text, as `_tokenise` has them."""
        listed = list(texts)
        if not getattr(self.tokenizer, "is_fast", False):
            return {text: self._tokenise(text) for text in listed}
        self._tokenise("")  # which takes away a truncation or padding that was set before
        encoded = self.tokenizer.backend_tokenizer.encode_batch_fast(listed, add_special_tokens=False)
        return {text: one.ids for text, one in zip(listed, encoded, strict=True)}


def load_template(folder: Any, thinking: bool | None = None) -> ChatTemplate:
    """The chat template of the base in a folder, with the stop tokens that its configs declare."""
    from transformers import AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises the bare class for a damaged file
        raise BaseInvalid(f"{folder} has no tokenizer that can be read: {error}") from error
    stops: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    try:
        declared = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    except OSError as error:
        if (Path(folder) / "generation_config.json").is_file():
            raise BaseInvalid(f"{folder}/generation_config.json cannot be read: {error}") from error
        declared = None
    stops.update([declared] if isinstance(declared, int) else declared or [])
    return ChatTemplate(tokenizer, frozenset(stops), thinking)


class _Sequence:
    """Turns of one row that share one rendering."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.turns: list[int] = []

    def goes_on_to(self, prompt: list[int]) -> bool:
        return len(prompt) > len(self.ids) and prompt[: len(self.ids)] == self.ids

    def add(self, turn: int, prompt: list[int], completion: list[int]) -> None:
        between = prompt[len(self.ids) :]
        self.ids += between + completion
        self.labels += [IGNORED] * len(between) + completion
        self.turns.append(turn)

    def finished(self) -> Rendered:
        return Rendered(tuple(self.ids), tuple(self.labels), tuple(self.turns))
