"""Sampling with one computation a prompt: the tokens of `generate`, the log-probabilities of a plain forward."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tiny_models import gemma3, llama, mistral, qwen3
from twice_rec.llm import generation

LENGTHS, COPIES, NEW = (5, 19, 12), (2, 1, 3), 20  # shorter and longer than Gemma's window of 7
STOP = {1, 5, 9, 44}


@pytest.fixture(params=[gemma3, qwen3, llama, mistral])
def model(request):
    return request.param().eval()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 99, (n,), generator=generator).tolist() for n in LENGTHS]


def completions_of(*arguments, **options):
    """All answers in one list."""
    return [answer for answers in generation.sample_completions(*arguments, **options) for answer in answers]


def repeated(prompts):
    return [prompt for prompt, copies in zip(prompts, COPIES, strict=True) for _ in range(copies)]


def plain_log_probabilities(model, prompt, answer, temperature):
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def test_greedy_tokens_are_those_of_generate(model, prompts):
    ours = completions_of(model, prompts, COPIES, {1}, NEW)
    for prompt, answer in zip(repeated(prompts), ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, eos_token_id=[1]
        )
        assert answer.token_ids == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("attention", ["chunked_sdpa", "eager", "varlen"])
def test_other_attention_agrees(monkeypatch, attention):
    monkeypatch.setattr("twice_rec.llm.attention._CHUNK", 4)
    prompt = [list(range(3, 20)), list(range(40, 45))]
    models = [gemma3(kind).eval() for kind in ("sdpa", attention)]
    one, other = (completions_of(model, prompt, (1, 1), {1}, NEW) for model in models)
    assert [a.token_ids for a in one] == [a.token_ids for a in other]
    assert models[1].config._attn_implementation == attention, "the model is trained with its own attention"


@torch.no_grad()
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "lora"])
def test_log_probabilities_are_those_of_a_plain_forward(model, prompts, wrapped):
    if wrapped:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        model.eval()
    answers = completions_of(model, prompts, COPIES, STOP, NEW, 0.7, torch.Generator().manual_seed(3))
    assert len({tuple(answer.token_ids) for answer in answers}) > 3
    for prompt, answer in zip(repeated(prompts), answers, strict=True):
        expected = plain_log_probabilities(model, prompt, answer.token_ids, 0.7)
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=2e-5, rtol=0)


def test_answers_end_at_stop_tokens_and_only_there(model, prompts):
    answers = completions_of(model, prompts, (20, 20, 20), STOP, 8, 2.0, torch.Generator().manual_seed(0))
    assert {answer.truncated for answer in answers} == {True, False}
    for answer in answers:
        assert not STOP & set(answer.token_ids[:-1])
        assert answer.truncated == (answer.token_ids[-1] not in STOP)
        assert len(answer.token_ids) == len(answer.logprobs) == 8 or not answer.truncated


def test_the_generator_alone_decides(model, prompts):
    def sample(seed):
        return completions_of(model, prompts, COPIES, STOP, NEW, 1.0, torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    first = sample(7)
    torch.manual_seed(99)
    assert sample(7) == first
    assert sample(8) != first
    torch.set_rng_state(before)


def test_samples_are_distributed_as_the_model_says(model):
    answers = completions_of(model, [[3, 4, 5]], (20_000,), set(), 1, 1.3, torch.Generator().manual_seed(0))
    counts = torch.bincount(torch.tensor([answer.token_ids[0] for answer in answers]), minlength=99)
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([[3, 4, 5]])).logits[0, -1] / 1.3, -1)
    error = (counts / len(answers) - expected).abs()
    assert (error < 5 * (expected * (1 - expected) / len(answers)).sqrt() + 1e-4).all()


@torch.no_grad()
def test_top_p_leaves_the_unlikely_out(model):
    answers = completions_of(model, [[3, 4, 5]], (20_000,), set(), 1, 1.3, torch.Generator().manual_seed(0), top_p=0.6)
    scores = torch.log_softmax(model(torch.tensor([[3, 4, 5]])).logits[0, -1] / 1.3, -1)
    ordered, order = scores.exp().sort(descending=True)
    kept = order[: 1 + int((ordered.cumsum(0) < 0.6).sum())]
    counts = torch.bincount(torch.tensor([answer.token_ids[0] for answer in answers]), minlength=len(scores))
    assert set(counts.nonzero()[:, 0].tolist()) <= set(kept.tolist())
    expected = scores.exp()[kept] / scores.exp()[kept].sum()
    error = (counts[kept] / len(answers) - expected).abs()
    assert (error < 5 * (expected * (1 - expected) / len(answers)).sqrt() + 1e-4).all()
    for answer in answers[:10]:
        assert answer.logprobs[0] == pytest.approx(float(scores[answer.token_ids[0]]), abs=2e-5)


@torch.no_grad()
def test_prompts_read_one_by_one_are_gone_on_with_as_if_read_together(model, prompts, monkeypatch):
    together = generation.read_prompts(model, prompts)
    answers = generation.sample_completions(model, prompts, COPIES, {1}, NEW, read=together)
    monkeypatch.setattr(generation, "_LONG", 1)
    alone = generation.read_prompts(model, prompts)
    assert alone.lengths == together.lengths
    assert torch.equal(alone.mask, together.mask)
    torch.testing.assert_close(alone.logits, together.logits, atol=2e-5, rtol=0)
    found = generation.sample_completions(model, prompts, COPIES, {1}, NEW, read=alone)
    assert [[one.token_ids for one in group] for group in found] == [[one.token_ids for one in g] for g in answers]
    for row, prompt in enumerate(prompts):
        scores = generation.logprobs_after(model, alone, row, [7, 8, 9], [[4, 5, 6], [4, 5, 11, 12], [30]])
        expected = generation.continuation_logprobs(model, [*prompt, 7, 8, 9], [[4, 5, 6], [4, 5, 11, 12], [30]])
        torch.testing.assert_close(scores, expected, atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_follows_a_prompt_that_was_read_is_scored_as_if_all_were_computed(model, prompts, attention):
    """Twice and after sampling from the same prompts: what was read stays as it is."""
    model.set_attn_implementation(attention)
    read = generation.read_prompts(model, prompts)
    beginning, ends = [7, 8, 9], [[4, 5, 6], [4, 5, 11, 12], [30]]
    for sampled in (False, True):
        if sampled:
            answers = generation.sample_completions(model, prompts, COPIES, {1}, NEW, read=read)
            assert answers == generation.sample_completions(model, prompts, COPIES, {1}, NEW)
        for row, prompt in enumerate(prompts):
            found = generation.logprobs_after(model, read, row, beginning, ends)
            expected = generation.continuation_logprobs(model, [*prompt, *beginning], ends)
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
