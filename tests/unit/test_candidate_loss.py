"""The loss on all candidates: values worked out by hand, probabilities by brute force, and its part in a training."""

import copy
import math
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig
from trl.trainer.utils import add_fused_lm_head

from tiny_base.model import train_tokenizer
from tiny_models import gemma3
from twice_rec.catalog import ItemCatalog
from twice_rec.cf.confidence import ConfidenceModel
from twice_rec.grpo.candidate_loss import CandidateLoss, cf_scores, item_advantages, make_candidate_loss
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.grpo.trainer import SharedPrefixGRPOTrainer
from twice_rec.llm.shared_prefix import token_scores
from twice_rec.llm.tokens import encode_chat
from twice_rec.prompts import rationale_answer
from twice_rec.records import Item

TEMPERATURE = 0.9
CATALOG = ItemCatalog([Item("A1", "tea"), Item("B2", "coffee"), Item("C3", "milk"), Item("D4", "bread")])
WORDS = "tea coffee milk bread then what next because of A1 B2 C3 D4 <think> </think> <item_nm> </item_nm> <item_id>"
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"{words} then what"}],
        "candidates": ["B2", "C3", "D4"],
        "target": target,
        "history": ["A1"],
    }
    for words, target in (("tea", "C3"), ("tea coffee", "D4"))
]


class Fixed(ConfidenceModel):
    """z of B2, C3, D4 is 0, log 4, -log 4, so the paper's confidences are .5, .8, .2."""

    calibration = MappingProxyType({"raw": (0.5, -7.0)})

    def logits(self, histories, items):
        z = np.array([0.0, 0.0, 0.0, math.log(4), -math.log(4)], dtype=np.float32)
        return z[np.asarray(items)]

    def item_means(self, histories):
        raise NotImplementedError


def recipe(**keys):
    given = {"run_dir": "r", "domain": "d", "seed": 1, "attn_implementation": "sdpa", "share_prefixes": True, **keys}
    return GRPORecipe.model_validate(given)


def test_a_candidates_advantage_is_what_the_rewards_of_the_item_would_pay():
    """Eq. 2 with tau .3 and lambda 3, times 4: the hit C3 earns 4 (1 + 3 x .8), the misses 4 x .5 and 0."""
    earned = np.array([2.0, 13.6, 0.0])
    expected = (earned - earned.mean()) / (earned.std() + 1e-4)
    found = item_advantages(ROWS, CATALOG, Fixed(), recipe())
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    earned = np.array([2.0, 3.2, 4.0])  # the target D4 has .2, below tau
    np.testing.assert_allclose(found[1], (earned - earned.mean()) / (earned.std() + 1e-4), rtol=1e-5)


def test_rewards_of_the_form_pay_nothing_for_an_item():
    other = recipe(reward_funcs=["match", "structure"], reward_weights=[1.0, 9.0])
    found = item_advantages(ROWS[:1], CATALOG, Fixed(), other)
    np.testing.assert_allclose(found, [[-(0.5**0.5), 2**0.5, -(0.5**0.5)]], rtol=1e-3)


def test_the_cf_models_scores_are_calibrated():
    """Half of z: 0, log 2, -log 2."""
    expected = [[0, math.log(2), -math.log(2)]] * 2
    np.testing.assert_allclose(cf_scores(ROWS, CATALOG, Fixed()), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([WORDS] * 20, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    """The head of TRL's trainers, and weights from which the answers differ clearly."""
    made = gemma3(vocab_size=len(tokenizer), max_position_embeddings=512)
    add_fused_lm_head(made, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    return made


@pytest.fixture(scope="module")
def other(tokenizer):
    """The start model: the same shape, other weights."""
    made = gemma3(vocab_size=len(tokenizer), max_position_embeddings=512)
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.add_(0.1 * torch.sin(torch.arange(parameter.numel()).view(parameter.shape) + number))
    add_fused_lm_head(made, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    return made


def batch_of(tokenizer, pairs):
    """TRL's micro-batch of (row, text): prompts padded on the left, completions on the right."""
    prompts = [encode_chat(tokenizer, row["prompt"]) for row, _ in pairs]
    completions = [tokenizer(text, add_special_tokens=False)["input_ids"] for _, text in pairs]
    p, t = max(map(len, prompts)), max(map(len, completions))
    return {
        "prompt_ids": torch.tensor([[0] * (p - len(ids)) + ids for ids in prompts]),
        "prompt_mask": torch.tensor([[0] * (p - len(ids)) + [1] * len(ids) for ids in prompts]),
        "completion_ids": torch.tensor([ids + [0] * (t - len(ids)) for ids in completions]),
        "completion_mask": torch.tensor([[1] * len(ids) + [0] * (t - len(ids)) for ids in completions]),
    }


def by_brute_force(model, tokenizer, row, rationale):
    """The policy's softmax over the candidates, each answer in a row of its own."""
    prompt, values = encode_chat(tokenizer, row["prompt"]), []
    for item_id in row["candidates"]:
        ids = encode_chat(tokenizer, row["prompt"], rationale_answer(rationale, CATALOG[item_id]))
        logits = model.base_model(torch.tensor([ids])).last_hidden_state[0] @ model.lm_head.weight.T
        logp = torch.log_softmax(logits.float() / TEMPERATURE, dim=-1)
        values.append(sum(logp[i - 1, ids[i]] for i in range(len(prompt), len(ids))))
    return torch.stack(values).softmax(0)


TEXTS = [
    (0, "<think> because of tea </think> <item_nm> milk </item_nm> <item_id> C3 </item_id>"),
    (1, "<think> what </think> <item_nm> milk"),
    (0, "<think> because of tea </think> coffee"),  # the same rationale again
    (0, "<think> then coffee </think>"),
    (0, "no rationale at all"),
]


@pytest.mark.parametrize("start_weight", [None, 0.0, 0.7])
@pytest.mark.parametrize("limit", [1, None])
def test_the_loss_is_that_of_each_answer_in_a_row_of_its_own(model, other, tokenizer, start_weight, limit):
    values = np.array([[0.2, 1.0, -1.2], [0.5, 0.4, 0.1]], dtype=np.float32)
    loss = CandidateLoss(2.0, limit, ROWS, values, start_weight, CATALOG, tokenizer)
    batch = batch_of(tokenizer, [(ROWS[number], text) for number, text in TEXTS])
    found, figures = loss(model, batch, lambda groups: token_scores(other, groups)[0].detach())
    used = [(0, "because of tea"), *([] if limit else [(0, "then coffee")]), (1, "what")]
    losses, on_target = [], []
    for number, rationale in used:
        p = by_brute_force(model, tokenizer, ROWS[number], rationale)
        of_row = torch.tensor(values[number])
        if start_weight is None:
            losses.append(-(p * of_row).sum())
        else:
            before = by_brute_force(other, tokenizer, ROWS[number], rationale).detach()
            wanted = of_row.exp() * before**start_weight
            losses.append(-(p.log() * wanted / wanted.sum()).sum())
        on_target.append(p[1 + number])
    assert found.item() == pytest.approx(2.0 * torch.stack(losses).mean().item(), abs=2e-4)
    assert figures["candidates/loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=2e-4)
    assert figures["candidates/target_probability"] == pytest.approx(torch.stack(on_target).mean().item(), abs=2e-4)
    model.zero_grad()
    found.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (2.0 * torch.stack(losses).mean()).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and name in ours:
            scale = parameter.grad.abs().max().clamp(min=1e-3)
            assert (ours[name] - parameter.grad).abs().max() < 1e-4 * scale, name


def test_completions_without_a_rationale_teach_nothing(model, tokenizer):
    loss = CandidateLoss(1.0, 1, ROWS, np.ones((2, 3), np.float32), 0.0, CATALOG, tokenizer)
    found, figures = loss(model, batch_of(tokenizer, [(ROWS[0], "no rationale at all")]))
    assert (found.item(), figures) == (0.0, {})
    found.backward()  # other processes wait for this one's gradient


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "all weights"])
@pytest.mark.parametrize("start_weight", [0.0, 1.0])
def test_it_is_trained_on_beside_grpos_loss(tokenizer, tmp_path, adapter, start_weight):
    """With rewards of 0 alone, GRPO's gradient is 0: the policy learns from the candidates.

    It comes to the distribution that it is shown, whose entropy is the least that the cross-entropy can be; that of the
    start model stays what it was.
    """
    asked = SimpleNamespace(calls=0)

    def rollouts(prompts, trainer):
        asked.calls += 1
        ids = [encode_chat(tokenizer, prompt) for prompt in prompts]
        said = [tokenizer(TEXTS[0][1], add_special_tokens=False)["input_ids"] for _ in prompts]
        return {"prompt_ids": ids, "completion_ids": said, "logprobs": None}

    made = gemma3(vocab_size=len(tokenizer), max_position_embeddings=512)
    before = copy.deepcopy(made)
    settings = recipe(
        candidate_loss="distillation", reward_funcs=["match"], reward_weights=[0.0], candidate_start_weight=start_weight
    )
    trainer = SharedPrefixGRPOTrainer(
        model=made,
        reward_funcs=lambda completion_ids, **_: [0.0] * len(completion_ids),
        args=GRPOConfig(
            output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            max_steps=12, learning_rate=0.05 if adapter else 0.02, beta=0.0, temperature=TEMPERATURE, report_to="none",
            use_cpu=True, bf16=False, save_strategy="no", logging_steps=1, disable_tqdm=True,
            lr_scheduler_type="constant",
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        if adapter
        else None,
        rollout_func=rollouts,
        candidate_loss=make_candidate_loss(settings, ROWS, CATALOG, Fixed(), tokenizer),
    )  # fmt: skip
    trainer.train()
    losses = [row["candidates/loss"] for row in trainer.state.log_history if "candidates/loss" in row]
    entropies = []
    for row in ROWS:
        with torch.no_grad():
            of_start = by_brute_force(before, tokenizer, row, "because of tea")
        wanted = torch.tensor([2 / 7, 4 / 7, 1 / 7]) * of_start**start_weight
        wanted /= wanted.sum()
        entropies.append(-(wanted * wanted.log()).sum().item())
    assert asked.calls == 12
    assert losses[-1] < losses[0]
    assert losses[-1] == pytest.approx(sum(entropies) / 2, abs=0.03)
    steps = [row for row in trainer.state.log_history if "loss" in row]
    for row in steps:  # two micro-batches of a prompt each: the mean of both is logged as it is trained on
        assert row["loss"] == pytest.approx(row["candidates/loss"], abs=1e-4)


def test_no_loss_by_default():
    assert make_candidate_loss(recipe(), ROWS, CATALOG, Fixed(), None) is None


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"candidate_loss": "distillation", "item_first": True}, "needs item_first false and share_prefixes true"),
        (
            {"candidate_loss": "distillation", "share_prefixes": False},
            "found item_first False and share_prefixes False",
        ),
        (
            {"candidate_loss": "distillation", "candidate_cf_weight": 0.0},
            "candidate_cf_weight and candidate_start_weight are 0",
        ),
        (
            {"candidate_loss": "expected_reward", "reward_funcs": ["structure"], "reward_weights": [1.0]},
            r"no reward of the item \(collaborative, match, cf\) has a weight",
        ),
        (
            {"candidate_loss": "expected_reward", "reward_funcs": ["match", "tags"], "reward_weights": [0.0, 1.0]},
            "no reward of the item",
        ),
    ],
)
def test_settings_that_leave_nothing_to_learn_are_refused(keys, says):
    with pytest.raises(ValueError, match=says):
        recipe(**keys)
