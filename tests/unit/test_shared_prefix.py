"""The shared prefix is exact: values and gradients of the plain computation, for every kind of attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_models import gemma3, llama, qwen3
from twice_rec.llm.shared_prefix import continuation_log_probabilities

MODELS = {"gemma3": gemma3(), "gemma3-eager": gemma3("eager"), "qwen3": qwen3(), "llama": llama()}


def plain(model, prompt, continuations):
    """One ordinary row for each continuation."""
    values = []
    for continuation in continuations:
        ids = torch.tensor([[*prompt, *continuation]])
        logs = torch.log_softmax(model(input_ids=ids).logits[0].float(), dim=-1)
        values.append(logs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).squeeze(1))
    return values


tokens = st.lists(st.integers(3, 98), min_size=1, max_size=14)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(MODELS)), tokens, st.lists(tokens, min_size=1, max_size=5))
def test_values_equal_the_plain_computation(name, prompt, continuations):
    with torch.no_grad():
        found = continuation_log_probabilities(MODELS[name], prompt, continuations)
        expected = plain(MODELS[name], prompt, continuations)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_gradients_equal_the_plain_computation(name):
    model, prompt = MODELS[name], list(range(5, 25))
    continuations = [[30, 31, 32, 33], [40], list(range(50, 62))]

    def gradients(function):
        model.zero_grad()
        sum(value.sum() for value in function(model, prompt, continuations)).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients(plain)
    for parameter, gradient in gradients(continuation_log_probabilities).items():
        scale = expected[parameter].abs().max().clamp(min=1e-6)
        assert ((gradient - expected[parameter]).abs().max() / scale) < 1e-4, parameter


def test_empty_prompts_and_continuations_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        continuation_log_probabilities(MODELS["llama"], [], [[1]])
    with pytest.raises(ValueError, match="at least one token"):
        continuation_log_probabilities(MODELS["llama"], [1], [[2], []])


def test_attention_without_a_mask_is_refused():
    model = llama()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="use sdpa or eager"):
        continuation_log_probabilities(model, [1], [[2]])
