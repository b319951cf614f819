"""Very small language models with random weights, for tests: fast, and of the architectures users run."""

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tiny_base.recipe import ShapeConfig

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def gemma3(attention="sdpa", **others):
    """Two sliding-window layers (window 7) and one full layer."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(
        **{**SIZES, "sliding_window": 7, "layer_types": kinds, "query_pre_attn_scalar": 8, **others}
    )
    return _build(Gemma3ForCausalLM, config, attention)


def qwen3(attention="sdpa", **others):
    """Full attention with query and key norms."""
    return _build(Qwen3ForCausalLM, Qwen3Config(**{**SIZES, **others}), attention)


def llama(attention="sdpa", **others):
    """Full attention, no list of layer kinds in its configuration."""
    return _build(LlamaForCausalLM, LlamaConfig(**{**SIZES, **others}), attention)


def mistral(attention="sdpa", **others):
    """One sliding window (7) for all layers, no list of layer kinds."""
    return _build(MistralForCausalLM, MistralConfig(**{**SIZES, "sliding_window": 7, **others}), attention)


def _build(model_class, config, attention):
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        for parameter in model.parameters():  # far from the start, so that logits differ
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def base_shape():
    """The shape of the toy base model at a size for tests."""
    return ShapeConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=16, full_attention_every=2, max_position_embeddings=512,
    )  # fmt: skip
