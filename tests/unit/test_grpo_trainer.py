"""The shared-prefix GRPO trainer computes what TRL's own does, with less work."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer
from trl.distributed import DistributedBackend

import twice_rec
from tiny_base.model import train_tokenizer
from tiny_models import gemma3, qwen3
from twice_rec.errors import InputError
from twice_rec.grpo.recipe import ADDITIVE_LOSSES
from twice_rec.grpo.trainer import GRPOTrainer as OursTrainer
from twice_rec.grpo.trainer import SharedPrefixGRPOTrainer, groups_together, in_pieces
from twice_rec.llm.fused import fuse_layers
from twice_rec.llm.tokens import encode_chat

WORDS = ["tea", "coffee", "milk", "bread", "honey", "sugar", "salt", "pepper", "rice", "beans"]
PROMPTS = [[{"role": "user", "content": " ".join(WORDS[: 2 + i]) + " then?"}] for i in range(6)]


def reward(completion_ids, **_):
    """Any fixed function of the tokens that tells samples apart."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def trained(trainer_class, make, folder, fused=False, ours=None, **settings):
    """Two optimizer steps: losses, adapter weights, and the tokens of each forward with gradients.

    `ours` are arguments of our trainer's own.
    """
    tokenizer = train_tokenizer([" ".join(WORDS)] * 20, 300)
    model = make(vocab_size=len(tokenizer), max_position_embeddings=512)
    model.generation_config.eos_token_id = list(range(200, len(tokenizer)))  # completions of many lengths
    torch.manual_seed(0)
    options = {
        "num_generations": 4, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "beta": 0.04,
        "max_completion_length": 12, "temperature": 0.9, "loss_type": "grpo", "gradient_checkpointing": True,
        "optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant", "max_steps": 2, "logging_steps": 1,
        "max_grad_norm": 1.0, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "seed": 3,
        "disable_tqdm": True,
    }  # fmt: skip
    trainer = trainer_class(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(output_dir=str(folder), **{**options, **settings}),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        **(ours or {}),
    )
    with torch.no_grad():  # the first gradient of lora_A is 0 as long as lora_B is
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    if fused:
        fuse_layers(trainer.model)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    tokens = []
    trainer.model.get_input_embeddings().register_forward_hook(
        lambda _, arguments, __: tokens.append(arguments[0].numel()) if torch.is_grad_enabled() else None
    )
    trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    updates = {name: p.detach() - start[name] for name, p in trainer.model.named_parameters() if name in start}
    return steps, updates, tokens


CASES = {
    "grpo": (gemma3, {}),
    "old and clipped": (
        qwen3,
        {"loss_type": "dapo", "num_iterations": 2, "mask_truncated_completions": True, "max_completion_length": 3},
    ),
    "several steps a batch": (gemma3, {"steps_per_generation": 4, "loss_type": "dr_grpo", "beta": 0.0}),
    "by micro-batch": (qwen3, {"loss_type": "bnpo", "entropy_coef": 0.1, "top_entropy_quantile": 0.6}),
}


def assert_alike(folder, make, settings, fused=False, ours=None):
    """Both trainers take the same steps, ours with less work at once."""
    expected, plain_updates, plain_tokens = trained(GRPOTrainer, make, folder, **settings)
    found, updates, tokens = trained(SharedPrefixGRPOTrainer, make, folder, fused, ours, **settings)
    assert expected[0]["completions/min_length"] < expected[0]["completions/max_length"]
    assert expected[0]["completions/clipped_ratio"] > 0 or "mask_truncated_completions" not in settings
    for a, b in zip(found, expected, strict=True):
        for name in {"loss", "reward", "grad_norm", "completions/mean_length"} & b.keys():
            assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-4), name
    assert updates.keys() == plain_updates.keys()
    for name, update in plain_updates.items():
        assert update.abs().max() > 0, name
        assert (updates[name] - update).abs().max() < 1e-4 * update.abs().max() + 1e-7, name
    assert max(tokens) < max(plain_tokens)
    assert ours or sum(tokens) < sum(plain_tokens)
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_steps_are_those_of_trl(tmp_path, case):
    assert_alike(tmp_path, *CASES[case], fused=case == "grpo")


LOSS_TYPES = {
    name
    for names in re.findall(r"self\.loss_type (?:==|in) (.+?):\n", inspect.getsource(GRPOTrainer._compute_loss))
    for name in re.findall(r'"(\w+)"', names)
}


def test_losses_that_add_up_are_those_of_trl_without_bnpo():
    assert {*ADDITIVE_LOSSES, "bnpo"} == LOSS_TYPES


@pytest.mark.parametrize(
    "loss_type", ["bnpo", *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(ADDITIVE_LOSSES))]
)
def test_every_loss_is_that_of_trl_with_accumulation(tmp_path, loss_type):
    level = {"luspo": {"importance_sampling_level": "sequence"}}.get(loss_type, {})
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "max_steps": 1}
    assert_alike(tmp_path, qwen3, {"loss_type": loss_type, "gradient_checkpointing": False, **settings, **level})


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_pieces_of_a_micro_batch_have_its_loss_also_under_bnpo(tmp_path, checkpointing):
    """A prompt here has 40 to 52 tokens, so that 60 are one prompt with some of its completions."""
    settings = {"loss_type": "bnpo", "max_steps": 1, "gradient_checkpointing": checkpointing}
    tokens = assert_alike(tmp_path, qwen3, settings, ours={"tokens_at_once": 60})
    assert max(tokens) <= 60
    assert len(tokens) >= 2 * 2 * 2  # of two micro-batches at least two pieces each, each also in its backward


def test_pieces_are_refused_where_every_forward_waits_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr(DistributedBackend, "is_zero3", True)
    with pytest.raises(InputError, match="tokens_at_once gives .* use ZeRO stage 2, or set it to null"):
        trained(SharedPrefixGRPOTrainer, qwen3, tmp_path, ours={"tokens_at_once": 60})


def test_pieces_keep_the_completions_of_a_prompt_together():
    """Prompts a of 3 tokens and b of 2, padded on the left; completions of 1 to 4 tokens, padded on the right."""
    prompts = torch.tensor([[5, 6, 7], [0, 8, 9], [5, 6, 7], [0, 8, 9], [5, 6, 7]])
    lengths = torch.tensor([2, 4, 1, 3, 2])
    mask = torch.cat([prompts > 0, torch.arange(4) < lengths[:, None]], dim=1)
    ids = torch.cat([prompts, torch.ones(5, 4, dtype=torch.long)], dim=1)

    def pieces(tokens):
        return [piece.tolist() for piece in in_pieces(ids, mask, 4, tokens)]

    assert pieces(None) == [[0, 1, 2, 3, 4]]
    assert pieces(17) == [[0, 2, 4, 1, 3]]  # 3 + 2 + 1 + 2, then 2 + 4 + 3
    assert pieces(16) == [[0, 2, 4, 1], [3]]
    assert pieces(9) == [[0, 2, 4], [1, 3]]  # 8 and 9
    assert pieces(7) == [[0, 2], [4], [1], [3]]  # 6; 5, with b's first 11; 6; 5
    assert pieces(1) == [[0], [2], [4], [1], [3]]


@pytest.mark.slow
def test_two_processes_take_the_steps_of_trl_too(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("both alike") == 2


def test_groups_come_together_and_stay_whole():
    generator = torch.Generator().manual_seed(0)
    prompts = torch.arange(3).repeat_interleave(4)[torch.randperm(12, generator=generator)]
    whole = {"prompt_ids": prompts[:, None].repeat(1, 2), "advantages": torch.arange(12.0)}
    batches = [
        {**{name: v[i : i + 4] for name, v in whole.items()}, "num_items_in_batch": torch.tensor(40)} for i in (0, 4, 8)
    ]
    together = groups_together(batches)
    assert [len(batch["prompt_ids"].unique()) for batch in together] == [1, 1, 1]
    assert sorted(torch.cat([batch["advantages"] for batch in together]).tolist()) == list(range(12))
    for batch in together:
        assert batch["num_items_in_batch"] == 40
        assert batch["prompt_ids"][:, 0].equal(prompts[batch["advantages"].long()])


def test_private_parts_of_trl_are_touched_in_one_module():
    private = re.compile(r"trainer\._[a-z]|from trl\.|def _(get_per_token|prepare_inputs|save_checkpoint|compute_loss)")
    folder = Path(twice_rec.__file__).parent
    found = [path.name for path in folder.rglob("*.py") if private.search(path.read_text())]
    assert found == ["trl_private.py"]


if __name__ == "__main__":  # one of the two processes
    settings = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    assert_alike(sys.argv[1], gemma3, settings, fused=True)
    assert_alike(sys.argv[1], gemma3, settings, fused=True, ours={"tokens_at_once": 60})
    assert torch.distributed.get_world_size() == 2
    print("both alike", flush=True)


def test_a_prompts_text_never_becomes_a_control_token():
    """Also with `trl_server` and `trl_colocate`, for which TRL encodes the prompts."""
    tokenizer = train_tokenizer([" ".join(WORDS)] * 20, 300)
    prompts = [[{"role": "user", "content": f"{text}{WORDS[0]}"}] for text in ("", tokenizer.eos_token)]
    ids, images, others = OursTrainer._tokenize_prompts(SimpleNamespace(processing_class=tokenizer), prompts)
    assert ids == [encode_chat(tokenizer, prompt) for prompt in prompts]
    assert [row.count(tokenizer.eos_token_id) for row in ids] == [ids[0].count(tokenizer.eos_token_id)] * 2
    assert (images, others) == (None, {})
    assert OursTrainer._tokenize_prompts is not GRPOTrainer._tokenize_prompts
    assert SharedPrefixGRPOTrainer._tokenize_prompts is OursTrainer._tokenize_prompts
