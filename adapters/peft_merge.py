"""The merge of what is more than low-rank updates: PEFT's own, in a process of its own.

DoRA, trained biases, modules, tokens and embeddings change a model in ways that PEFT defines, so PEFT merges them: in
float32, rounded once. It holds the whole model in memory. `python -m adapters.peft_merge SPEC.json` has the folders
`base`, `adapter` and `merged`, the `dtype` and what else the comparison takes (see parity_logits); it writes the
weights into `merged` and the comparison on stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.bases import BaseModel, stored_dtype, weight_files
from adapters.canonical import check
from adapters.checkpoint import read_header
from adapters.child import run_child
from adapters.errors import HotshoeError, MergeFailed, StorageFull
from adapters.export_tokenizer import embedding_rows, trains_whole
from adapters.inspect import inspect_folder
from adapters.lora_config import MAX_RANK
from adapters.parity_report import Questions, available_memory_bytes

MEMORY_FACTOR = 8  # bytes per weight: the model in float32, and as much for what PEFT copies of it while it merges
FULL_DISK = "No space left on device"


def needs_peft(adapter: Path, base: BaseModel) -> bool:
    """The adapter can be merged and is more than low-rank updates of the seven projections."""
    found = check(inspect_folder(adapter), base, max_rank=MAX_RANK, base_is_served=True)
    return found.verdict == "export_only"


def merge_by_peft(
    adapter: Path,
    base: BaseModel,
    out: Path,
    *,
    dtype: str | None,
    shard_bytes: int | None = None,
    questions: Questions,
) -> dict[str, Any]:
    """Write the merged weights into `out`; returns `dtype`, what of `config` changed, and the logits' comparison.

    Raises MergeFailed where PEFT cannot merge it, or the model does not fit into memory.
    """
    weights = sum(path.stat().st_size for path in weight_files(base.folder)) // 2
    needed, free = weights * MEMORY_FACTOR + questions.kept_bytes, available_memory_bytes()
    if needed > free:
        raise MergeFailed(
            f"This adapter is merged by PEFT, which needs about {needed:,} bytes of memory for the base "
            f"{base.id}; {free:,} are free. Export it on a machine with more: hotshoe export DIR --base BASE."
        )
    chosen = dtype or stored_dtype(base.config) or "float32"
    spec = {
        "base": str(base.folder),
        "adapter": str(adapter),
        "merged": str(out),
        "dtype": chosen,
        "rows": resized_rows(adapter, base),
        "shard_bytes": shard_bytes,
        "served": list(questions.served),
        "evaluation": list(questions.evaluation),
        "chat_template": questions.chat_template,
        "tokenizer": str(questions.tokenizer or base.folder),
    }
    return run_child("adapters.peft_merge", spec, lambda said: _failed(said, base))


def resized_rows(adapter: Path, base: BaseModel) -> int | None:
    """The vocabulary's size where training changed it; raises MergeFailed where rows of it are nowhere."""
    header = read_header(adapter / "adapter_model.safetensors")
    rows = embedding_rows(header)
    if rows is None or rows == int(base.config["vocab_size"]):
        return None
    lacking = [module for module in ("embed_tokens", "lm_head") if not trains_whole(header, module)]
    if lacking and not (base.is_tied and len(lacking) == 1):
        raise MergeFailed(
            f"The adapter's vocabulary has {rows:,} rows and the base's {base.config['vocab_size']:,}, and the rows of "
            f"{' and '.join(lacking)} were not saved with it (PEFT: modules_to_save, or save_embedding_layers)."
        )
    return rows


def _failed(said: str, base: BaseModel) -> HotshoeError:
    if FULL_DISK in said:
        return StorageFull(f"The disk filled up during the export ({said[:200]}). Free space, and run it again.")
    return MergeFailed(f"PEFT cannot merge this adapter into {base.id}: {said[:500]}")


def main(spec_path: str) -> None:
    import torch

    from adapters.parity_logits import THREADS

    torch.set_num_threads(THREADS)
    print(json.dumps(_merge(json.loads(Path(spec_path).read_text()))))


def _merge(spec: Mapping[str, Any]) -> dict[str, Any]:
    import torch
    from peft import PeftModel

    from adapters.parity_logits import finished, load, reference_run, run
    from adapters.parity_prompts import open_tokenizer

    out, dtype = Path(spec["merged"]), getattr(torch, spec["dtype"])
    model = load(spec["base"])
    if spec["rows"]:
        model.resize_token_embeddings(spec["rows"], mean_resizing=False)
    was_tied = bool(getattr(model.config, "tie_word_embeddings", False))
    tokenizer = open_tokenizer(spec["tokenizer"], spec["chat_template"])
    adapted = PeftModel.from_pretrained(model, spec["adapter"]).eval()
    ground, reference = reference_run(adapted, tokenizer, spec)
    merged = adapted.merge_and_unload().to(dtype)
    changes = {"tie_word_embeddings": False} if was_tied and _untie(merged) else {}
    changes |= {"vocab_size": spec["rows"]} if spec["rows"] else {}
    merged.save_pretrained(out, **({"max_shard_size": spec["shard_bytes"]} if spec["shard_bytes"] else {}))
    rounded = run(merged.float(), ground, with_served=False)
    del model, adapted, merged
    logits = finished(spec, tokenizer, ground, reference, rounded)
    return {"dtype": spec["dtype"], "config": changes, "logits": logits}


def _untie(model: Any) -> bool:
    """Where training parted an output layer from the embeddings that it was tied to, the config says so."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight.data_ptr() == embeddings.weight.data_ptr():
        return False
    model.config.tie_word_embeddings = False
    return True


if __name__ == "__main__":
    main(sys.argv[1])
