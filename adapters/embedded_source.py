"""Reads the embedded base's source, a llama GGUF with Q4_1 weights, as the tensors and tokenizer of a Qwen2 model.

A Llama decoder layer is a Qwen2 layer whose query, key and value biases are zero, so nothing is approximated: the
dequantised float32 weights are the model, and its logits equal those of the Llama model bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

    Tensors = dict[str, np.ndarray[Any, np.dtype[np.float32]]]

MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# transformers 5, models/qwen2/tokenization_qwen2.py
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WITH_BIAS = ("attn_q", "attn_k", "attn_v")


class SourceModel:
    """One opened GGUF file."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self._reader = GGUFReader(path)

    def field(self, name: str) -> Any:
        return self._reader.fields[name].contents()

    def config(self) -> dict[str, Any]:
        """`config.json` of the Qwen2 model, but for the special tokens."""
        layers = self.field("llama.block_count")
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "attention_dropout": 0.0,
            "dtype": "float32",
            "hidden_act": "silu",
            "hidden_size": self.field("llama.embedding_length"),
            "initializer_range": 0.02,
            "intermediate_size": self.field("llama.feed_forward_length"),
            "layer_types": ["full_attention"] * layers,
            "max_position_embeddings": self.field("llama.context_length"),
            "max_window_layers": layers,
            "num_attention_heads": self.field("llama.attention.head_count"),
            "num_hidden_layers": layers,
            "num_key_value_heads": self.field("llama.attention.head_count_kv"),
            "rms_norm_eps": float(self.field("llama.attention.layer_norm_rms_epsilon")),
            "rope_parameters": {"rope_theta": float(self.field("llama.rope.freq_base")), "rope_type": "default"},
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.field("llama.vocab_size"),
        }

    def tensors(self) -> Tensors:
        """Every tensor of the Qwen2 model by its Hugging Face name in float32, with zero biases; tied embedding."""
        import numpy as np
        from gguf import dequantize

        heads = {
            "attn_q": self.field("llama.attention.head_count"),
            "attn_k": self.field("llama.attention.head_count_kv"),
        }
        tensors: Tensors = {}
        for tensor in self._reader.tensors:
            weights = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            if not tensor.name.startswith("blk."):
                name = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
                tensors[name[tensor.name]] = weights
                continue
            _, layer, module, _ = tensor.name.split(".")
            target = f"model.layers.{layer}.{MODULES[module]}"
            tensors[f"{target}.weight"] = _unpermuted(weights, heads[module]) if module in heads else weights
            if module in WITH_BIAS:
                tensors[f"{target}.bias"] = np.zeros(weights.shape[0], dtype=np.float32)
        return dict(sorted(tensors.items()))

    def tokenizer(self) -> Tokenizer:
        """The source's byte-level BPE with Qwen2's own splitting rules.

        transformers 5 opens every qwen2 folder with those rules, whatever its tokenizer.json says, and other loaders
        follow tokenizer.json: written so, all give the same ids. The merges were learnt within GPT-2's splits, so on
        ordinary text the ids are also those of the source's tokenizer (a test compares them).
        """
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        tokens = self.field("tokenizer.ggml.tokens")
        merges = [tuple(pair.split(" ")) for pair in self.field("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        control = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL
        kinds = self.field("tokenizer.ggml.token_type")
        special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        return tokenizer


def _unpermuted(weights: Any, heads: int) -> Any:
    """Undo the row order of llama.cpp's rotary embedding: (heads, half, 2) pairs back to (heads, 2, half)."""
    rows, columns = weights.shape
    return weights.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
