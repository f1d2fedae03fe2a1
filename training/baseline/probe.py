"""A linear probe: what the frozen base's states already tell of a label, read by a linear model.

x = the state of the prompt's last token after layer l, (hidden,); label = argmax(W (x - mean) / deviation + b)

Alain and Bengio, arXiv 1610.01644. The layer and the strength of W's penalty are chosen on the validation rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from training.baseline.rivals import PROBE, Rival, choose, labels_of, share_right
from training.baseline.sets import Part, Sets
from training.evaluate import Prompt
from training.greedy import padded_behind
from training.metrics import Task
from training.quiet import Progress, unwatched
from training.sample import label_by_label

if TYPE_CHECKING:
    from training.reference import Reference

MOST_ROWS = 1_000  # of the training set, whose states are computed
BATCH_TOKENS = 8_192
STRENGTHS = (0.01, 0.1, 1.0)
DEPTHS = (0.5, 0.75, 1.0)  # of the layers


def probe(reference: Reference, sets: Sets, task: Task, seed: int = 0, progress: Progress = unwatched) -> Rival | None:
    """The probe fitted on training rows; None where they have one label only."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels = labels_of(sets.training, task)
    chosen = even_by_label(labels, MOST_ROWS, seed)
    given = [labels[at] for at in chosen]
    if len(set(given)) < 2:
        return None
    asked = [sets.training.examples[at].prompt for at in chosen]
    found = states(reference, [*asked, *(one.prompt for one in sets.validation.examples)], progress)
    wanted = labels_of(sets.validation, task)

    def fit(setting: tuple[int, float]) -> tuple[int, Any]:
        depth, strength = setting
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=200, tol=1e-3))
        return depth, model.fit(found[depth, : len(asked)], given)

    def right(fitted: tuple[int, Any]) -> float:
        return share_right(fitted[1].predict(found[fitted[0], len(asked) :]), wanted)

    settings = [(depth, strength) for depth in range(len(DEPTHS)) for strength in STRENGTHS]
    (depth, strength), (_, model) = choose(fit, right, settings)

    def tell(part: Part) -> list[str]:
        return [str(label) for label in model.predict(states(reference, [one.prompt for one in part.examples])[depth])]

    detail = f"layer at {DEPTHS[depth]:.0%} of the depth, C = {strength:g}, from {len(asked):,} training rows"
    return Rival(PROBE, task.label or "", tell, detail)


@torch.inference_mode()
def states(reference: Reference, prompts: Sequence[Prompt], progress: Progress = unwatched) -> Any:
    """(depths, prompts, hidden) states of each prompt's last token, float32."""
    rows = [reference.render(prompt) for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda at: len(rows[at]))
    model = reference.model
    layers = int(model.config.num_hidden_layers)
    depths = [round(share * layers) for share in DEPTHS]
    made = np.zeros((len(depths), len(rows), int(model.config.hidden_size)), np.float32)
    for part in _batches(order, rows):
        ids, mask = padded_behind([rows[at] for at in part], reference.template.pad)
        ends = torch.tensor([len(rows[at]) - 1 for at in part])
        hidden = model.model(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), output_hidden_states=True
        ).hidden_states
        for place, depth in enumerate(depths):
            made[place, part] = hidden[depth][torch.arange(len(part)), ends.to(model.device)].float().cpu().numpy()
        progress(part[-1], len(rows))
    return made


def even_by_label(labels: Sequence[str], most: int, seed: int) -> list[int]:
    """At most so many rows, as many of each label as there are as long as there is room."""
    order = np.random.default_rng(seed).permutation(len(labels)).tolist()
    return sorted(label_by_label(order, labels)[:most])


def _batches(order: Sequence[int], rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows of similar length together, as many as fit."""
    parts: list[list[int]] = [[]]
    for at in order:
        if parts[-1] and (len(parts[-1]) + 1) * len(rows[at]) > BATCH_TOKENS:
            parts.append([])
        parts[-1].append(at)
    return parts
