"""The shared prefix is exact: values and gradients of the plain computation, for every kind of attention."""

import functools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from tiny_models import gemma3, llama, mistral, qwen3
from twice_rec.grpo.trainer import padded_scores
from twice_rec.llm import attention
from twice_rec.llm.models import compile_layers
from twice_rec.llm.shared_prefix import SharedRows, continuation_certainties, continuation_logprobs

# the heads of Gemma-3-1B
gemma3_wide = functools.partial(gemma3, head_dim=256, num_key_value_heads=1, query_pre_attn_scalar=256)

MODELS = {
    "gemma3": gemma3(),
    "gemma3-eager": gemma3("eager"),
    "gemma3-chunked": gemma3("chunked_sdpa"),
    "gemma3-varlen": gemma3("varlen"),
    "gemma3-wide-varlen": gemma3_wide("varlen"),
    "qwen3": qwen3(),
    "qwen3-chunked": qwen3("chunked_sdpa"),
    "qwen3-varlen": qwen3("varlen"),
    "llama": llama(),
    "llama-varlen": llama("varlen"),
    "mistral": mistral(),
    "mistral-chunked": mistral("chunked_sdpa"),
    "mistral-varlen": mistral("varlen"),
}


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_CHUNK", 4)
        yield


def plain(model, prompt, continuations):
    """One ordinary row for each continuation."""
    values = []
    for continuation in continuations:
        ids = torch.tensor([[*prompt, *continuation]])
        logs = torch.log_softmax(model(input_ids=ids).logits[0].float(), dim=-1)
        values.append(logs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).squeeze(1))
    return values


FEW_OR_MANY = st.sampled_from([4, 98])  # of few different tokens, continuations often begin alike
tokens = FEW_OR_MANY.flatmap(lambda last: st.lists(st.integers(3, last), min_size=1, max_size=14))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(MODELS)), tokens, st.lists(tokens, min_size=1, max_size=5))
def test_values_equal_the_plain_computation(name, prompt, continuations):
    with torch.no_grad():
        found = continuation_logprobs(MODELS[name], prompt, continuations)
        expected = plain(MODELS[name], prompt, continuations)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_gradients_equal_the_plain_computation(name):
    model, prompt = MODELS[name], list(range(5, 25))
    continuations = [[30, 31, 32, 33], [40], list(range(50, 62)), [30, 31, 60], [30, 31, 32, 33], list(range(50, 70))]

    def gradients(function):
        model.zero_grad()
        sum(value.sum() for value in function(model, prompt, continuations)).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients(plain)
    for parameter, gradient in gradients(continuation_logprobs).items():
        scale = expected[parameter].abs().max().clamp(min=1e-6)
        assert ((gradient - expected[parameter]).abs().max() / scale) < 1e-4, parameter


def test_empty_prompts_and_continuations_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        continuation_logprobs(MODELS["llama"], [], [[1]])
    with pytest.raises(ValueError, match="at least one token"):
        continuation_logprobs(MODELS["llama"], [1], [[2], []])


def test_attention_without_a_mask_is_refused():
    model = llama()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="use sdpa or chunked_sdpa or eager$"):
        continuation_logprobs(model, [1], [[2]])


TEMPERATURE = 0.8
GROUPS = st.lists(st.tuples(tokens, st.lists(tokens | st.just([]), min_size=1, max_size=4)), min_size=1, max_size=3)


@functools.cache
def with_head(make, attention="sdpa", dtype=torch.float32, device="cpu"):
    """A model with LoRA and the head that TRL's trainers add."""
    from trl.trainer.utils import add_fused_lm_head

    model = make(attention)
    add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(device, dtype)


def padded(groups, shuffle):
    """TRL's batch of all samples in a random order: tokens, mask, length of the completions."""
    samples = [(prompt, c) for prompt, continuations in groups for c in continuations]
    shuffle.shuffle(samples)
    p, t = max(len(prompt) for prompt, _ in samples), max(1, *(len(c) for _, c in samples))
    ids = [[0] * (p - len(prompt)) + prompt + c + [0] * (t - len(c)) for prompt, c in samples]
    mask = [[0] * (p - len(prompt)) + [1] * (len(prompt) + len(c)) + [0] * (t - len(c)) for prompt, c in samples]
    return torch.tensor(ids), torch.tensor(mask, dtype=torch.bool), t


def plain_scores(model, ids, mask, length):
    """Row by row, without padding, from whole logits."""
    values = []
    for tokens_of_row, kept in zip(ids, mask, strict=True):
        row, start = tokens_of_row[kept][None], int(kept[:-length].sum())
        logs = torch.log_softmax(model(input_ids=row).logits[0].float() / TEMPERATURE, dim=-1)[start - 1 : -1]
        chosen, entropy = logs.gather(1, row[0, start:, None]).squeeze(1), -(logs.exp() * logs).sum(1)
        values.append([torch.nn.functional.pad(v, (0, length - len(v))) for v in (chosen, entropy)])
    return tuple(torch.stack(column) for column in zip(*values, strict=True))


def scores_and_gradients(function, model, batch):
    """Both scores, and the gradients of a weighted sum of them."""
    model.zero_grad()
    log_probabilities, entropies = function(model, *batch)
    weights = torch.linspace(-1, 2, log_probabilities.numel(), device=batch[0].device).view_as(log_probabilities)
    (weights * log_probabilities + 0.3 * weights.flip(0) * entropies).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return log_probabilities.detach(), entropies.detach(), gradients


def compare(found, expected):
    for a, b in zip(found[:2], expected[:2], strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert found[2].keys() == expected[2].keys()
    largest = max(gradient.abs().max() for gradient in expected[2].values())
    for name, gradient in expected[2].items():
        assert (found[2][name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6 * largest, name


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([gemma3, gemma3_wide, qwen3, llama]),
    st.sampled_from(["sdpa", "varlen"]),
    GROUPS,
    st.randoms(use_true_random=False),
)
def test_padded_scores_and_gradients_equal_the_plain_computation(make, attention, groups, shuffle):
    batch = padded(groups, shuffle)
    expected = scores_and_gradients(plain_scores, with_head(make), batch)
    compare(scores_and_gradients(padded_scores, with_head(make, attention), batch), expected)


def test_a_batch_without_any_token_has_zero_gradients():
    model = with_head(gemma3)
    log_probabilities, entropies, gradients = scores_and_gradients(
        padded_scores, model, (torch.full((3, 6), 5), torch.tensor([[True] * 4 + [False] * 2] * 3), 2)
    )
    assert log_probabilities.tolist() == entropies.tolist() == [[0, 0]] * 3
    assert gradients
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
@pytest.mark.parametrize("make", [gemma3, gemma3_wide, qwen3], ids=["gemma3", "wide", "qwen3"])
def test_bfloat16_is_as_close_as_the_plain_computation(make, attention):
    batch = padded([(list(range(5, 25)), [[30, 31, 32, 33], [40], list(range(50, 62))])], random.Random(0))
    exact = scores_and_gradients(plain_scores, with_head(make), batch)
    plain_one = scores_and_gradients(plain_scores, with_head(make, dtype=torch.bfloat16), batch)
    shared = scores_and_gradients(padded_scores, with_head(make, attention, torch.bfloat16), batch)

    def distance(found):
        gradients = torch.cat([(found[2][name].float() - g).flatten() for name, g in exact[2].items()])
        return (found[0] - exact[0]).norm(), gradients.norm()

    for ours, theirs in zip(distance(shared), distance(plain_one), strict=True):
        assert 0 < ours < 1.5 * theirs


def test_what_continuations_begin_with_stands_once():
    rows = SharedRows.of([([5, 6], [[7, 8, 9], [7, 8], [], [4], [7, 8, 4, 4], [7, 8, 9]]), ([5], [[6]])], llama())
    assert rows.input_ids.tolist() == [[5, 6, 4, 7, 8, 4, 4, 9], [5, 6, 0, 0, 0, 0, 0, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 2, 3, 4, 5, 4], [0, 1, 0, 0, 0, 0, 0, 0]]
    assert rows.ends[0].tolist() == [8, 8, 3, 8, 8, 7, 7, 8]
    assert list(zip(rows.row.tolist(), rows.column.tolist(), rows.targets.tolist(), strict=True)) == [
        (0, 1, 4), (0, 1, 7), (0, 3, 8), (0, 4, 4), (0, 5, 4), (0, 4, 9), (1, 0, 6)
    ]  # fmt: skip
    assert rows.places.tolist() == [1, 2, 5, 1, 2, 0, 1, 2, 3, 4, 1, 2, 5, 6]


def long_batch():
    """Two groups of continuations, longer than the kernels' blocks."""
    draw = random.Random(0)
    groups = [
        ([draw.randrange(3, 99) for _ in range(n)], [[draw.randrange(3, 99) for _ in range(k)] for k in (40, 3, 77)])
        for n in (300, 450)
    ]
    ids, mask, length = padded(groups, draw)
    return ids.cuda(), mask.cuda(), length


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "make", [gemma3_wide, functools.partial(qwen3, head_dim=128), llama], ids=["gemma3", "qwen3", "llama"]
)
def test_varlen_is_as_close_as_the_plain_computation(make, compiled):
    make, batch = functools.partial(make, max_position_embeddings=4096), long_batch()
    exact = scores_and_gradients(plain_scores, with_head(make, device="cuda"), batch)
    plain_one = scores_and_gradients(plain_scores, with_head(make, "sdpa", torch.bfloat16, "cuda"), batch)
    model = with_head(make, "varlen", torch.bfloat16, "cuda")
    if compiled:
        compile_layers(model.get_base_model())
    segments = scores_and_gradients(padded_scores, model, batch)

    def distance(found):
        gradients = torch.cat([(found[2][name].float() - g).flatten() for name, g in exact[2].items()])
        return (found[0] - exact[0]).norm(), gradients.norm()

    for ours, theirs in zip(distance(segments), distance(plain_one), strict=True):
        assert 0 < ours < 1.5 * theirs


@pytest.mark.parametrize("name", ["gemma3", "qwen3-chunked", "llama-varlen"])
def test_certainties_are_those_of_rows_of_their_own(name):
    model, prompt, continuations = MODELS[name], [5, 6, 7, 8], [[9, 10, 11], [9, 10, 12, 13], [4]]
    with torch.no_grad():
        found = continuation_certainties(model, prompt, continuations)
        for continuation, values in zip(continuations, found, strict=True):
            logits = model(input_ids=torch.tensor([[*prompt, *continuation]])).logits[0].float()
            logs = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
            expected = -math.log(logs.shape[1]) - logs.mean(dim=1)
            assert values.shape == (len(continuation),)
            assert torch.allclose(values, expected, atol=1e-4)
            assert (values > 0).all()


class Always(torch.nn.Module):
    """A head that gives the same logits everywhere."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, hidden):
        return self.logits.expand(*hidden.shape[:-1], -1)


def test_certainty_by_hand():
    """Of 1/2, 1/4, 1/8, 1/8: -log 4 + (1 + 2 + 3 + 3) / 4 log 2 = log 2 / 4; of equal ones 0."""
    model = llama()
    for logits, expected in [([4.0, 3.0, 2.0, 2.0], math.log(2) / 4), ([1.0, 1.0, 1.0, 1.0], 0.0)]:
        model.lm_head = Always([value * math.log(2) for value in logits])
        for values in continuation_certainties(model, [5, 6], [[1, 2], [3]]):
            assert values.tolist() == pytest.approx([expected] * len(values), abs=1e-6)
