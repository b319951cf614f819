"""A model, or a machine, that attention varlen does not take is told in one line, with the setting that works."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    CodeGenConfig,
    Gemma2Config,
    GPT2Config,
    GPTBigCodeConfig,
    GptOssConfig,
    LlamaConfig,
    MptConfig,
    Qwen3Config,
)

from tiny_models import gemma3, qwen3
from twice_rec.errors import InputError
from twice_rec.llm.models import load_model
from twice_rec.llm.recipe import ModelConfig
from twice_rec.llm.varlen import check_varlen

BASE = Path(__file__).parents[2] / "assets" / "tiny_base"


@pytest.fixture
def card(monkeypatch):
    """A GPU that nothing is computed on."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return monkeypatch


def test_models_that_it_takes(card):
    for config in (gemma3(head_dim=256).config, qwen3(head_dim=128).config, AutoConfig.from_pretrained(BASE)):
        for dtype in (torch.bfloat16, torch.float16):
            check_varlen(config, dtype, "cuda")
    check_varlen(GPT2Config(attn_pdrop=0.0, resid_pdrop=0.1), torch.bfloat16, "cuda")  # dropout elsewhere is no matter


@pytest.mark.parametrize(
    ("config", "dtype", "line"),
    [
        (Qwen3Config(), torch.float32, r"takes bfloat16 and float16, found dtype torch.float32; use .* sdpa$"),
        (Qwen3Config(head_dim=264), torch.bfloat16, r"takes heads of 8, .* the model's have 264; use .* sdpa$"),
        (Qwen3Config(head_dim=20), torch.bfloat16, r"the model's have 20; use attn_implementation sdpa$"),
        (LlamaConfig(hidden_size=60, num_attention_heads=4), torch.bfloat16, r"the model's have 15; use .* sdpa$"),
        (Qwen3Config(attention_dropout=0.1), torch.bfloat16, r"no dropout, the model's attention has; use .* sdpa$"),
        (GPT2Config(), torch.bfloat16, r"no dropout, the model's attention has; use .* sdpa$"),
        (GPTBigCodeConfig(), torch.bfloat16, r"no dropout, the model's attention has; use .* sdpa$"),
        (CodeGenConfig(attn_pdrop=0.1), torch.bfloat16, r"no dropout, the model's attention has; use .* sdpa$"),
        (MptConfig(attn_config={"attn_pdrop": 1}), torch.bfloat16, r"no dropout, the model's attention has; use"),
        (Gemma2Config(), torch.bfloat16, r"has no soft cap, the model's attention has; use .* eager$"),
        (GptOssConfig(), torch.bfloat16, r"has no sinks, the model's attention has; use .* eager$"),
        (
            Qwen3Config(num_hidden_layers=2, layer_types=["full_attention", "linear_attention"]),
            torch.bfloat16,
            r"does not take this model: no mask for layers of the kind linear_attention; use sdpa$",
        ),
    ],
)  # fmt: skip
def test_models_that_it_does_not_take(config, dtype, line, card):
    with pytest.raises(InputError, match=line) as caught:
        check_varlen(config, dtype, "cuda")
    assert "\n" not in str(caught.value)


def test_cards_that_it_does_not_take(card):
    card.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(InputError, match=r"capability 8.0 \(A100\) or later, found 7.5; use .* sdpa$"):
        check_varlen(Qwen3Config(), torch.float16, "cuda")


def test_without_a_gpu_a_model_is_not_loaded_for_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"varlen needs a GPU that torch can use; use .* chunked_sdpa$"):
        load_model(BASE, ModelConfig(dtype="bfloat16", attn_implementation="varlen"))
