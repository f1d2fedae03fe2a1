"""An inspected adapter against a base: which layers it adapts, at which rank and scaling, and whether it can be served.

Pure: looks at names, shapes and settings only. Every problem is reported at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from adapters.bases import BaseModel
from adapters.claims import claim_means
from adapters.errors import Problem
from adapters.header import MAX_PROBLEMS, TensorInfo, cap_problems
from adapters.inspect import Inspection
from adapters.lora_config import LoraSettings
from adapters.tensor_names import Part, TensorName, canonical_key, read_mlx_name, read_name


class VerdictKind(StrEnum):
    """What may become of an upload."""

    ACCEPT = "accept"
    CONVERT = "convert"  # servable after a lossless change of spelling or form
    EXPORT_ONLY = "export_only"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class ModuleAdapter:
    """One adapted layer: W + scaling * B A, with A (rank, in_features) and B (out_features, rank)."""

    name: str
    rank: int
    alpha: float
    scaling: float


@dataclass(frozen=True)
class Verdict:
    """The decision, its reasons (problems, limits or conversions) and the plan that canonicalise carries out."""

    verdict: VerdictKind
    reasons: tuple[Problem, ...]
    dropped: tuple[str, ...]
    modules: Mapping[str, ModuleAdapter]
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)  # canonical key -> tensor in the source file
    initial: Mapping[str, TensorInfo] = field(default_factory=dict)  # the same keys in initial_adapter.safetensors
    base_digest: str = ""
    is_transposed: bool = False  # the source's matrices are MLX-LM's: (in_features, rank) and (rank, out_features)

    @property
    def rank(self) -> int:
        """The largest rank of any layer; 0 when there is none."""
        return max((module.rank for module in self.modules.values()), default=0)

    def as_dict(self) -> dict[str, Any]:
        return {
            "verdict": str(self.verdict),
            "reasons": [reason.as_dict() for reason in self.reasons],
            "dropped": list(self.dropped),
            "modules": len(self.modules),
            "rank": self.rank,
        }


@dataclass
class _Check:
    base: BaseModel
    settings: LoraSettings
    problems: list[Problem] = field(default_factory=list)
    limits: list[Problem] = field(default_factory=list)
    conversions: list[Problem] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def problem(self, code: str, path: str, message: str, advice: str = "") -> None:
        self.problems.append(Problem(code, path, message, advice))

    def read(self, key: str) -> TensorName:
        reader: Callable[[str, Collection[str]], TensorName] = read_mlx_name if self.settings.is_mlx else read_name
        return reader(key, self.base.shapes)

    def shape(self, tensor: TensorInfo) -> tuple[int, ...]:
        """As PEFT has it."""
        return tensor.shape[::-1] if self.settings.is_mlx else tensor.shape


def check(inspection: Inspection, base: BaseModel, *, max_rank: int, base_is_served: bool = False) -> Verdict:
    """Decide about an inspected adapter for `base`; `base_is_served` accepts whatever it claims of its base."""
    settings = inspection.settings
    if settings is None or inspection.problems:
        return _refusal(inspection, base, base_is_served)
    state = _Check(base, settings, limits=list(inspection.limits), dropped=list(inspection.dropped))
    _check_claim(state, base_is_served)
    names = _read_names(state, inspection.tensors)
    pairs = _pairs(state, names)
    modules = _modules(state, pairs)
    initial = _initial(state, inspection, pairs)
    if initial:
        modules = {name: _doubled(settings, module) for name, module in modules.items()}
    _check_ranks(state, modules, max_rank)
    _note_unmatched(state, modules)
    if not modules and not state.problems and not state.limits:
        state.problem("tensor_set_invalid", "tensors", "no layer is adapted")
    tensors = {name.canonical: tensor for name, tensor in names}
    return _verdict(state, modules, tensors, initial)


def _refusal(inspection: Inspection, base: BaseModel, base_is_served: bool) -> Verdict:
    """Every problem of a refused upload that can be told without what is missing: claim, names, halves, size."""
    settings = inspection.settings or inspection.outline
    problems = list(inspection.problems)
    if settings is not None:
        state = _Check(base, settings, problems)
        _check_claim(state, base_is_served)
        names = _read_names(state, inspection.tensors)
        for module, (a, b) in (_pairs(state, names) if inspection.is_header_whole else {}).items():
            shape = base.shapes[module]
            if a[1:] + b[:1] != (shape.in_features, shape.out_features):
                message = f"lora_A is {list(a)} and lora_B {list(b)}; this layer is {shape.in_features} wide and "
                state.problem("shape_mismatch", module, f"{message}{shape.out_features} high")
    return Verdict(VerdictKind.REFUSE, cap_problems(problems), inspection.dropped, {}, base_digest=base.digest)


def _verdict(
    state: _Check, modules: dict[str, ModuleAdapter], tensors: dict[str, TensorInfo], initial: dict[str, TensorInfo]
) -> Verdict:
    if state.problems:
        kind, reasons = VerdictKind.REFUSE, cap_problems(state.problems)
    elif state.limits:
        kind, reasons = VerdictKind.EXPORT_ONLY, cap_problems(state.limits)
    elif state.conversions:
        kind, reasons = VerdictKind.CONVERT, tuple(state.conversions)
    else:
        kind, reasons = VerdictKind.ACCEPT, ()
    dropped, is_mlx = tuple(sorted(state.dropped)), state.settings.is_mlx
    return Verdict(kind, reasons, dropped, modules, tensors, initial, state.base.digest, is_mlx)


def _check_claim(state: _Check, base_is_served: bool) -> None:
    claim = state.settings.base_claim
    if claim is None or base_is_served or claim_means(claim, state.base):
        return
    state.problem(
        "base_mismatch",
        "config.base_model_name_or_path",
        f"says the adapter was made for {claim[:120]!r}; this base is {state.base.id}",
        "If it is the same model, say so: --base-is served (HTTP: base_is=served), or declare the name with the base.",
    )


def _read_names(state: _Check, tensors: Iterable[TensorInfo]) -> list[tuple[TensorName, TensorInfo]]:
    """Every tensor with its meaning; unknown ones and two keys for one thing are problems."""
    names = [(state.read(tensor.name), tensor) for tensor in tensors]
    seen: dict[str, str] = {}
    unknown: list[str] = []
    for name, _ in names:
        if name.part is Part.UNKNOWN:
            unknown.append(name.key)
        elif name.canonical in seen:
            state.problem("tensor_set_invalid", name.key, f"means the same tensor as {seen[name.canonical]}")
        seen.setdefault(name.canonical, name.key)
    layers = f"names no layer of {state.base.id} ({state.base.config['num_hidden_layers']} layers)"
    advice = "Check that the adapter was made for this base."
    if len(unknown) > MAX_PROBLEMS:
        state.problem("tensor_set_invalid", "tensors", f"{len(unknown):,} of their names are of no layer", advice)
    for key in unknown[:MAX_PROBLEMS]:
        state.problem("tensor_set_invalid", key, layers, advice)
    adapters = {name.adapter for name, _ in names if name.adapter}
    if len(adapters) > 1:
        state.problem("tensor_set_invalid", "tensors", f"hold several adapters: {', '.join(sorted(adapters)[:5])}")
    renamed = [name for name, _ in names if name.is_converted and name.part is not Part.UNKNOWN]
    if state.settings.is_mlx:
        message = (
            "MLX-LM: both halves of each layer are transposed, and its scale times its rank, "
            f"{state.settings.rank}, is lora_alpha {state.settings.alpha:g}"
        )
        state.conversions.append(Problem("converted", "tensors", message))
    elif renamed:
        message = f"{len(renamed)} tensor names are respelled, {renamed[0].key} as {renamed[0].canonical}"
        state.conversions.append(Problem("converted", "tensors", message))
    _limit_beyond_projections(state, names)
    return names


def _limit_beyond_projections(state: _Check, names: list[tuple[TensorName, TensorInfo]]) -> None:
    beyond = [name.canonical for name, _ in names if name.part is Part.EXPORT_ONLY]
    if beyond:
        shown = ", ".join(beyond[:3]) + (f" and {len(beyond) - 3} more" if len(beyond) > 3 else "")
        message = f"{shown}: only low-rank updates of the seven projections can be swapped per request"
        advice = "Train on q, k, v, o, gate, up and down alone to serve it; this version can be exported."
        state.limits.append(Problem("not_servable", "tensors", message, advice))


def _pairs(
    state: _Check, names: list[tuple[TensorName, TensorInfo]]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Module -> shapes of A and B, for modules that have both; a missing half is a problem."""
    halves: dict[str, dict[Part, tuple[int, ...]]] = {}
    for name, tensor in names:
        if name.part in (Part.A, Part.B):
            halves.setdefault(name.module, {})[name.part] = state.shape(tensor)
    pairs = {}
    for module, parts in halves.items():
        missing = {Part.A, Part.B} - set(parts)
        for part in missing:
            state.problem("tensor_set_invalid", module, f"has no {part.value}", "Save the adapter again, whole.")
        if not missing:
            pairs[module] = (parts[Part.A], parts[Part.B])
    return dict(sorted(pairs.items(), key=lambda item: _layer_order(item[0])))


def _layer_order(name: str) -> tuple[object, ...]:
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))


def _modules(state: _Check, pairs: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> dict[str, ModuleAdapter]:
    modules = {}
    for name, (shape_a, shape_b) in pairs.items():
        shape, settings = state.base.shapes[name], state.settings
        rank = _matching(settings.rank_pattern, name, settings.rank)
        alpha = _matching(settings.alpha_pattern, name, settings.alpha)
        expected_a, expected_b = (rank, shape.in_features), (shape.out_features, rank)
        if (shape_a, shape_b) != (expected_a, expected_b):
            state.problem("shape_mismatch", name, _explain_shapes(shape_a, shape_b, expected_a, expected_b, rank))
            continue
        modules[name] = ModuleAdapter(name, rank, alpha, settings.scaling(rank, alpha))
    return modules


def _explain_shapes(
    a: tuple[int, ...], b: tuple[int, ...], expected_a: tuple[int, ...], expected_b: tuple[int, ...], rank: int
) -> str:
    needs = f"rank {rank} on this layer needs {list(expected_a)} and {list(expected_b)}"
    plain = f"lora_A is {list(a)} and lora_B {list(b)}; {needs}"
    if (b, a) == (expected_a, expected_b):
        return f"{plain}: A and B are swapped"
    if len(a) == len(b) == 2 and a[0] == b[1] and (a[1], b[0]) == (expected_a[1], expected_b[0]):
        return f"{plain}: the file has rank {a[0]}, the config says {rank}"
    return f"{plain}: made for a base of another size"


def _matching(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first key that is the module's name (`^name`, `name`) or its last parts, as PEFT finds it."""
    found = [key for key in (f"^{name}", *_suffixes(name)) if key in pattern]
    if len(found) > 1:
        found = [next(key for key in pattern if key in found)]
    return pattern[found[0]] if found else default


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _initial(
    state: _Check, inspection: Inspection, pairs: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
) -> dict[str, TensorInfo]:
    """The adapter before training, by canonical key, when the initialisation changed the base and so it is needed."""
    kind = state.settings.mutated_init
    if kind is None:
        if inspection.initial_tensors is not None:
            state.dropped.append("initial_adapter: not needed, as the initialisation left the base unchanged")
        return {}
    if inspection.initial_tensors is None:
        state.problem(
            "feature_not_supported",
            "config.init_lora_weights",
            f"is {kind}, which changed the base's weights before training",
            "Add the adapter as it was before training (initial_adapter), or save with PEFT's "
            "path_initial_model_for_weight_conversion.",
        )
        return {}
    names = [(state.read(tensor.name), tensor) for tensor in inspection.initial_tensors]
    initial = {name.canonical: tensor for name, tensor in names if name.part in (Part.A, Part.B)}
    for module, (shape_a, shape_b) in pairs.items():
        for part, shape in ((Part.A, shape_a), (Part.B, shape_b)):
            found = initial.get(canonical_key(module, part))
            if found is None or found.shape != shape:
                state.problem("shape_mismatch", module, f"initial_adapter has no {part.value} of shape {list(shape)}")
    message = f"{kind}: the initial adapter is subtracted, which doubles the rank and keeps the result"
    state.conversions.append(Problem("converted", "config.init_lora_weights", message))
    return initial


def _doubled(settings: LoraSettings, module: ModuleAdapter) -> ModuleAdapter:
    """[A; A0] and [B, -B0] have twice the rank; alpha grows so that the scaling stays."""
    alpha = module.alpha * (math.sqrt(2) if settings.use_rslora else 2)
    return ModuleAdapter(module.name, 2 * module.rank, alpha, module.scaling)


def _check_ranks(state: _Check, modules: Mapping[str, ModuleAdapter], max_rank: int) -> None:
    above = [module for module in modules.values() if module.rank > max_rank]
    if above:
        message = f"rank {max(module.rank for module in above)} is above {max_rank}, the largest rank served here"
        advice = "Start the server with a larger --max-rank to serve it; this version can be exported."
        state.limits.append(Problem("rank_too_large", "config.r", message, advice))


def _note_unmatched(state: _Check, modules: Mapping[str, ModuleAdapter]) -> None:
    """Patterns and targets that meet no tensor have no effect; they are dropped and named."""
    adapted = {suffix for module in modules for suffix in (f"^{module}", *_suffixes(module))}
    named = [
        *(f"rank_pattern.{key}" for key in state.settings.rank_pattern if key not in adapted),
        *(f"alpha_pattern.{key}" for key in state.settings.alpha_pattern if key not in adapted),
        *(f"target_modules {key[:80]}" for key in state.settings.target_modules or () if key not in adapted),
    ]
    state.dropped += [f"{what}: no tensor of that module is in the file" for what in named]
