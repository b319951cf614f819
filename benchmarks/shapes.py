"""Models with random weights, of real shapes and of small ones."""

from __future__ import annotations

import torch

import reporting  # noqa: F401  finds the package
from twice_rec.llm import varlen  # noqa: F401  registers ours with transformers

WINDOW = 512
SHAPES = {
    "small": {
        "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 4096,
    },
    "small-wide": {
        "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 4096,
    },
    "small-deep": {
        "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 4096,
    },
    "qwen3-small": {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096, "tie_word_embeddings": True,
    },
    "gemma-3-1b": {
        "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
    },
    "qwen3-0.6b": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
    },
}  # fmt: skip


def bare_model(name: str, attention: str, device: str, dtype: torch.dtype):
    """A model of one of `SHAPES`: Qwen3's architecture if the name says so, else Gemma 3's."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

    options = {**SHAPES[name], "max_position_embeddings": 32768, "pad_token_id": 0}
    if name.startswith("qwen3"):
        config, model_class = Qwen3Config(**options), Qwen3ForCausalLM
    else:
        config, model_class = Gemma3TextConfig(**options, sliding_window=WINDOW), Gemma3ForCausalLM
    config._attn_implementation = attention
    torch.manual_seed(0)
    with torch.device(device):
        return model_class(config).to(dtype)
