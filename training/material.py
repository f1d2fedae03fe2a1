"""What goes into a run: the base with its template, the rendered rows, and the facts that the settings depend on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.bases import BaseModel, stored_dtype
from adapters.errors import ConfigInvalid, DataInvalid
from training.canaries import Canary, canaries_of, row_of
from training.config import Facts, Settings, TrainingConfig, held_out
from training.data.columns import Columns
from training.data.dataset import Prepared, hold_out, prepare
from training.data.formats import DataFile, read_data, read_rows
from training.data.replay import Replay, replayed
from training.data.rows import Row
from training.data.stopping import refuse_untrained_end
from training.data.template import ChatTemplate, load_template
from training.machine import has_bfloat16, memory_bytes, own_device
from training.planner.sizes import of_base


@dataclass(frozen=True)
class Material:
    """What goes into a run: the base with its template, and the prepared rows."""

    base: BaseModel
    template: ChatTemplate
    file: DataFile
    training: Prepared
    validation_file: DataFile | None  # None when the validation rows were held out of the training file
    validation: Prepared | None
    turns: tuple[int, int]  # supervised turns with and without reasoning
    canaries: tuple[Canary, ...] = ()  # planted behind the training rows, one sequence each
    replay: Replay | None = None  # between the training rows and the canaries

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Of each row of the file, those held out too, the tokens of its longest sequence and those learned."""
        held = self.validation.lengths if self.validation is not None and self.validation_file is None else {}
        found = self.training.lengths | held
        return [found[id(row)] for row in self.file.rows]

    @property
    def enable_thinking(self) -> bool | None:
        """How serving must set `enable_thinking`; None where the template has no switch, or for a mixture."""
        thinking, plain = self.turns
        if not self.template.has_thinking_switch or (thinking and plain):
            return None
        return bool(thinking)


def gather(config: TrainingConfig) -> Material:
    """Read and render everything a run needs, without loading the model."""
    from adapters.embedded import EMBEDDED, open_base

    base = open_base(config.base or EMBEDDED)
    template = load_template(base.folder, config.thinking)
    if config.method != "full":  # which trains the embeddings, too
        refuse_untrained_end(base, template)
    file, validation_file = read_both(config)
    rows, held = file.rows, validation_file.rows if validation_file else []
    if validation_file is None and (wanted := held_out(len(rows), config.validation_share)):
        rows, held = hold_out(rows, wanted, config.seed)
    length = longest_row(config, base)

    def ready(source: DataFile, chosen: list[Row], **named: Any) -> Prepared:
        return prepare(
            source, chosen, template, max_length=length, over_long=config.over_long, supervise=config.supervise, **named
        )

    canaries = tuple(canaries_of(config.canaries, config.seed))
    replay = _replay(config, len(rows))
    planted = list(map(row_of, canaries))
    learned = [*rows, *(replay.rows if replay else ()), *planted]
    training = ready(file, learned, title=_title(file, replay), where=_places(file, replay, planted))
    validation = ready(validation_file or file, held) if held else None
    turns = [template.thinks(row.messages[i]) for row in rows for i in row.learned_turns(config.supervise)]
    counts = (sum(turns), len(turns) - sum(turns))
    return Material(base, template, file, training, validation_file, validation, counts, canaries, replay)


def _replay(config: TrainingConfig, rows: int) -> Replay | None:
    """The general rows of the run, drawn for so many of its own."""
    if config.replay is None:
        return None
    return replayed(read_data(config.replay, Columns(config.columns)), rows, config.replay_share, config.seed)


def _title(file: DataFile, replay: Replay | None) -> str:
    return f"{file.path} with {replay.file.path}" if replay is not None else str(file.path)


def _places(file: DataFile, replay: Replay | None, planted: Sequence[Row]) -> Callable[[Row], str]:
    """Where each learned row is, in the file that it is from; a canary is from none."""
    places = {id(row): str(row.place) for row in planted}
    if replay is not None:
        places |= {id(row): replay.file.where(row) for row in replay.rows}
    return lambda row: places.get(id(row)) or file.where(row)


def read_both(config: TrainingConfig) -> tuple[DataFile, DataFile | None]:
    """The data, and the validation data where it is given; raises DataInvalid with the bad rows of both."""
    paths = (config.data, config.validation) if config.validation is not None else (config.data,)
    readings = [read_rows(path, Columns(config.columns)) for path in paths]
    refused = [reading.error() for reading in readings if reading.bad]
    if refused:
        problems = tuple(problem for error in refused for problem in error.problems)
        raise DataInvalid(" ".join(error.message for error in refused), param="data", problems=problems)
    return readings[0].file, readings[1].file if len(readings) > 1 else None


def longest_row(config: TrainingConfig, base: BaseModel) -> int:
    """The most tokens that a row may have; raises ConfigInvalid for more than the base's context."""
    context = base.context_length_tokens
    if config.max_length is not None and config.max_length > context:
        raise ConfigInvalid(
            f"max_length is {config.max_length:,}, and {base.id} has a context of {context:,} tokens: give at most "
            "that, or leave it out.",
            param="max_length",
        )
    return config.max_length or context


def facts(material: Material) -> Facts:
    """What the settings depend on, measured on this data, base and machine."""
    device = own_device()
    return Facts(
        rows=len(material.training.sequences),
        longest_row_tokens=material.training.longest,
        has_validation=material.validation is not None,
        parameters=parameter_count(material.base),
        context_length_tokens=material.base.context_length_tokens,
        base_dtype=stored_dtype(material.base.config) or "float32",
        device=device,
        device_memory_bytes=memory_bytes(device),
        has_bfloat16=has_bfloat16(device),
    )


def parameter_count(base: BaseModel) -> int:
    """Parameters of the projections and embeddings, from shapes alone; norms and biases do not matter to a choice."""
    of = of_base(base)
    return of.linear_parameters + of.embedding_parameters


def announcement(config: TrainingConfig, material: Material, settings: Settings) -> str:
    """What is about to happen, in a few lines."""
    data = material.training
    mixed = {"replayed rows": len(material.replay.rows) if material.replay else 0, "canaries": len(material.canaries)}
    own = data.rows - sum(mixed.values())
    beside = "".join(f" and {count:,} {what}" for what, count in mixed.items() if count)
    lines = [
        f"{config.name}: {settings.method} on {material.base.id}, {settings.dtype}, "
        f"{'every weight' if settings.method == 'full' else f'rank {settings.rank}'}, "
        f"learning rate {settings.learning_rate:g}, {settings.batch_size} rows a step, {settings.steps} steps",
        f"{config.data} ({material.file.description}): {own:,} rows{beside}, {data.tokens:,} tokens, "
        f"{data.supervised_tokens:,} of them learned",
    ]
    if material.validation is None:
        lines.append("no validation rows: neither early stopping nor a best adapter to keep")
    else:
        source = material.validation_file.path if material.validation_file else f"held out of {config.data}"
        lines.append(f"validation: {material.validation.rows:,} rows, {source}")
    for kind, part in (("", data), ("validation ", material.validation)):
        for name, places in (("cut", part.cut), ("dropped", part.dropped)) if part is not None else ():
            if places:
                lines.append(f"{len(places)} {kind}rows above {settings.max_length:,} tokens {name}: {_first(places)}")
    if material.replay is not None:
        drawn = material.replay
        lines.append(f"replay: {len(drawn.rows):,} of {len(drawn.file.rows):,} rows of {drawn.file.path}")
    if material.file.left_aside:
        lines.append(f"not read: {_first(material.file.left_aside)}")
    ignored = ", ".join(f"{key} ({count})" for key, count in material.file.ignored_keys.items())
    return "\n".join([*lines, *([f"keys without a meaning here: {ignored}"] if ignored else [])])


def _first(names: Sequence[str], count: int = 5) -> str:
    more = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
