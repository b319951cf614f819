"""Rollouts as TRL's trainer meets them: groups, seeds, columns for the rewards; the trainer samples itself."""

import itertools
import logging
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from tiny_base.model import train_tokenizer
from tiny_models import gemma3
from twice_rec.errors import InputError
from twice_rec.grpo.rollout import trl_arguments
from twice_rec.grpo.rollout.base import Group, Rollouts, batches
from twice_rec.grpo.rollout.local import InProcessRollouts, merged
from twice_rec.grpo.rollout.vllm import QUIET_STEPS, Patience, ServerRollouts
from twice_rec.llm.generation import Completion

WORDS = ["green tea", "black coffee", "dark rye bread", "oat milk and honey"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(WORDS * 9, 99)


def train(tokenizer, folder, seed=0, rewards=None, **changes):
    """Three steps of GRPO; the columns that the reward saw, one list a step."""
    from trl import GRPOConfig, GRPOTrainer

    seen = []

    def reward(completions, policy_version, truncated, completion_ids, **columns):
        seen.append(list(zip(policy_version, truncated, map(tuple, completion_ids), strict=True)))
        return [float(len(ids)) for ids in completion_ids]

    values = {
        "output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, "max_steps": 3, "seed": 4,
        "per_device_train_batch_size": 6, "num_generations": 3, "max_completion_length": 7, "logging_steps": 1,
        "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True, **changes,
    }  # fmt: skip
    rows = [{"prompt": [{"role": "user", "content": words}]} for words in WORDS]
    rollouts = InProcessRollouts(tokenizer, seed)
    trainer = GRPOTrainer(
        model=gemma3(vocab_size=len(tokenizer)),
        reward_funcs=reward,
        args=GRPOConfig(**values),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        rollout_func=rollouts,
    )
    rollouts.attach(trainer)
    trainer.train()
    return seen, trainer


def test_rewards_get_version_and_truncation_of_every_answer(tokenizer, tmp_path):
    seen, trainer = train(tokenizer, tmp_path)
    assert [[version for version, _, _ in step] for step in seen] == [[0] * 6, [1] * 6, [2] * 6]
    for _, truncated, ids in itertools.chain(*seen):
        assert truncated == (ids[-1] not in trainer.eos_token_ids)
    assert trainer.model.training
    rows = [row for row in trainer.state.log_history if "reward" in row]
    assert [row["rollout/policy_version"] for row in rows] == [0, 1, 2]
    assert all(row["rollout/tokens_per_second"] > 0 for row in rows)


def test_answers_depend_on_the_seed_and_not_on_the_global_generator(tokenizer, tmp_path):
    one, _ = train(tokenizer, tmp_path)
    torch.rand(5)
    other, _ = train(tokenizer, tmp_path)
    assert one == other
    assert train(tokenizer, tmp_path, seed=1)[0] != one


def test_several_generations_a_step_are_not_the_same(tokenizer, tmp_path):
    seen, _ = train(tokenizer, tmp_path, gradient_accumulation_steps=2, steps_per_generation=1, max_steps=1)
    first, second = ([ids for _, _, ids in step] for step in seen)
    assert first != second
    assert {version for step in seen for version, _, _ in step} == {0}


def test_gradient_checkpointing_is_on_again_after_sampling(tokenizer, tmp_path):
    seen, trainer = train(tokenizer, tmp_path, gradient_checkpointing=True)
    assert trainer.model.is_gradient_checkpointing
    assert seen == train(tokenizer, tmp_path)[0]


def trainer_of(process, training=True):
    return SimpleNamespace(
        num_generations=4,
        num_generations_eval=2,
        model=SimpleNamespace(training=training),
        accelerator=SimpleNamespace(process_index=process, num_processes=2),
        state=SimpleNamespace(global_step=3),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )


class FakeServer:
    """Notes the seeds of all samples as vLLM gives them: sample i of a request has `seed + i`."""

    address = "nowhere:1"

    def __init__(self):
        self.seeds = []

    def complete(self, policy, prompt, count, stop, sampling):
        self.seeds += [sampling["seed"] + i for i in range(count)]
        return [Completion([1], [0.0], False)] * count


def seeds_of(tokenizer, prompts, process, calls, monkeypatch):
    """The seeds of all samples that one of two processes asks for, and the number of samples."""
    monkeypatch.setattr("twice_rec.grpo.rollout.vllm.gather_object", list)
    rollouts = ServerRollouts.__new__(ServerRollouts)
    Rollouts.__init__(rollouts, tokenizer, 5)
    rollouts._recipe, rollouts._servers = SimpleNamespace(rollout_seeds=True), [FakeServer(), FakeServer()]
    rollouts._trainer, rollouts._sampling, rollouts._stop = trainer_of(process), {}, []
    rollouts._run, rollouts._policy, rollouts._patience = "run", "policy-run-3", Patience(0)
    for training in calls:
        rollouts(prompts, trainer_of(process, training))
    return [seed for server in rollouts._servers for seed in server.seeds]


def test_every_sample_of_a_step_has_a_seed_of_its_own(tokenizer, monkeypatch):
    asked = [WORDS[0], WORDS[1], WORDS[0], WORDS[2]]  # the first prompt was drawn twice
    prompts = [[{"role": "user", "content": words}] for words in asked for _ in range(4)]
    halves = [prompts[:6], prompts[6:12]]  # the second group is split over the processes
    calls = [True, True, False]
    seeds = [seeds_of(tokenizer, half, p, calls, monkeypatch) for p, half in enumerate(halves)]
    assert [len(of_process) for of_process in seeds] == [18, 18]
    assert len({*seeds[0], *seeds[1]}) == 36
    assert seeds[0] == seeds_of(tokenizer, halves[0], 0, calls, monkeypatch)
    assert {*seeds_of(tokenizer, prompts, 0, [True], monkeypatch)} == {*range(min(seeds[0]), min(seeds[0]) + 16)}


def test_a_group_that_processes_share_has_one_number(tokenizer):
    prompts = [[{"role": "user", "content": words}] for words in WORDS for _ in range(4)]
    rollouts = InProcessRollouts(tokenizer, 0)
    whole = rollouts._groups(prompts, trainer_of(0))
    assert [(group.number, group.positions) for group in whole] == [
        (i, [4 * i + k for k in range(4)]) for i in range(4)
    ]
    parts = [rollouts._groups(prompts[6 * p : 6 * p + 6], trainer_of(p)) for p in range(2)]
    assert [[(group.number, len(group.positions)) for group in part] for part in parts] == [
        [(0, 4), (1, 2)],
        [(1, 2), (2, 4)],
    ]
    assert parts[0][1].prompt_ids == parts[1][0].prompt_ids == whole[1].prompt_ids


def test_the_adapter_is_merged_in_for_sampling_and_the_weights_are_put_back():
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    model, ids = get_peft_model(gemma3(), lora).eval(), torch.arange(5, 40)[None]
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(ids).logits
        with pytest.raises(KeyboardInterrupt), merged(model):
            assert torch.allclose(model(ids).logits, expected, atol=1e-4)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.fill_(100.0)  # is not read
            assert torch.allclose(model(ids).logits, expected, atol=1e-4)
            raise KeyboardInterrupt
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0].data_ptr()
        assert "lora" in name or tensor.equal(before[name][1])
    assert not any(getattr(module, "merged", False) for module in model.modules())


def test_batches_hold_whole_groups():
    groups = [Group([1], list(range(size)), 0, 0) for size in (4, 4, 3, 9, 1)]
    sizes = [[len(group.positions) for group in batch] for batch in batches(groups, 8)]
    assert sizes == [[4, 4], [3], [9], [1]]


def test_a_gap_is_logged_and_warned_of_now_and_then(caplog):
    rollouts = ServerRollouts.__new__(ServerRollouts)
    rollouts._recipe, rollouts._warned = SimpleNamespace(rollout_logprob_gap=0.05), -QUIET_STEPS
    name = "sampling/sampling_logp_difference/mean"
    for step, gap in enumerate([0.01, 0.2, 0.3, *[0.3] * QUIET_STEPS]):
        metrics = {"train": {name: [9.0, gap], "rollout/logprob_gap": []}}
        trainer = SimpleNamespace(
            _metrics=metrics, model=SimpleNamespace(training=True), state=SimpleNamespace(global_step=step)
        )
        rollouts._trainer = trainer
        with caplog.at_level(logging.WARNING):
            rollouts.on_step_end(None, trainer.state, None)
        assert metrics["train"]["rollout/logprob_gap"] == [gap]
    assert [text.partition(":")[0] for text in caplog.messages] == ["step 1", f"step {1 + QUIET_STEPS}"]


def test_a_vllm_within_the_trainer_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="trl_colocate, a vLLM within the trainer's process, and torch sees no GPU"):
        trl_arguments(SimpleNamespace(rollout="trl_colocate"), None)
