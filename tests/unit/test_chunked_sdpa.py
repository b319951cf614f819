"""Attention for CPUs: the values and gradients of torch's sdpa, whatever the mask."""

import pytest
import torch

from twice_rec.llm.attention import chunked_sdpa

PROMPT = 40


def tree(branches, past=0):
    """A prompt and branches that do not see each other, behind tokens that all see: bool [L, past + L]."""
    length = PROMPT + sum(branches)
    seen = torch.zeros(length, length, dtype=torch.bool)
    seen[:, :PROMPT] = True
    start = PROMPT
    for count in branches:
        seen[start : start + count, start : start + count] = True
        start += count
    return torch.cat([torch.ones(length, past, dtype=torch.bool), seen.tril()], dim=1)


def window(length, size):
    order = torch.arange(length)
    return (order <= order[:, None]) & (order[:, None] - order < size)


PADDED = torch.ones(50, 50, dtype=torch.bool).tril()
PADDED[:, :30] = False  # on the left; the padding's own queries see themselves, as transformers has it
PADDED[range(30), range(30)] = True
MASKS = {
    "causal": torch.ones(90, 90, dtype=torch.bool).tril()[None],
    "tree": tree([9, 30, 1, 20])[None],
    "many branches": tree([8] * 20)[None],
    "behind a cache": tree([8] * 20, past=70)[None],
    "window": window(90, 20)[None],
    "padding": PADDED[None],
    "two rows": torch.stack([PADDED, torch.ones(50, 50, dtype=torch.bool).tril()]),
    "one query": torch.ones(1, 1, 60, dtype=torch.bool),
    "few queries": tree([3, 2], past=30)[None, -5:],
}


@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (4, 1)], ids=["grouped", "all", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MASKS)
def test_values_and_gradients_are_those_of_sdpa(monkeypatch, name, dtype, heads):
    monkeypatch.setattr("twice_rec.llm.attention._CHUNK", 16)
    mask = MASKS[name][:, None]  # [B, 1, L, S]
    batch, _, length, total = mask.shape
    generator = torch.Generator().manual_seed(3)
    sizes = [(batch, heads[0], length, 8), (batch, heads[1], total, 8), (batch, heads[1], total, 8)]
    states = [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]
    above = torch.randn(batch, length, heads[0], 8, generator=generator).to(dtype)

    ours, weights = chunked_sdpa(torch.nn.Module(), *states, mask, scaling=0.3)
    copies = [state.detach().double().requires_grad_() for state in states]
    exact = torch.nn.functional.scaled_dot_product_attention(*copies, attn_mask=mask, scale=0.3, enable_gqa=True)
    exact = exact.transpose(1, 2)
    assert weights is None
    assert (ours.shape, ours.dtype) == (exact.shape, dtype)
    assert ours.is_contiguous()
    rounding = 2e-2 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(ours.double(), exact, atol=rounding, rtol=rounding)
    found, expected = torch.autograd.grad(ours, states, above), torch.autograd.grad(exact, copies, above.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=4 * rounding, rtol=2 * rounding)


@pytest.mark.parametrize("length", [5, 40])
def test_values_may_be_narrower_than_keys(length):
    """As in DeepSeek's attention."""
    states = [torch.randn(2, 4, length, size, generator=torch.Generator().manual_seed(size)) for size in (16, 16, 8)]
    mask = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    exact = torch.nn.functional.scaled_dot_product_attention(*states, attn_mask=mask)
    torch.testing.assert_close(chunked_sdpa(torch.nn.Module(), *states, mask)[0], exact.transpose(1, 2))


def test_without_a_mask_all_earlier_tokens_are_seen():
    states = [torch.randn(1, heads, 30, 8, generator=torch.Generator().manual_seed(heads)) for heads in (6, 2, 2)]
    causal = torch.ones(1, 1, 30, 30, dtype=torch.bool).tril()
    found, expected = (chunked_sdpa(torch.nn.Module(), *states, mask, scaling=0.3)[0] for mask in (None, causal))
    torch.testing.assert_close(found, expected)
