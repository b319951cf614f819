"""A trainer and a vLLM on one GPU: whether they fit is told before the first step, with settings that do."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from tiny_base.model import train_tokenizer
from twice_rec.errors import InputError
from twice_rec.grpo import one_gpu
from twice_rec.grpo.one_gpu import SHARE, Card, Trainer, check_one_gpu, fault, free_gib, least_gib, remedy
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.llm.footprint import GIB, card_gib, read_shape
from twice_rec.llm.recipe import EstimateConfig
from twice_rec.recipe_reader import load_recipe

ROOT = Path(__file__).parents[2]
H100 = Card(80.0, "H100")
GEMMA = {"model_type": "gemma3_text"}


@pytest.fixture(scope="module")
def trainer():
    return Trainer(read_shape(None, EstimateConfig(model_shape=str(ROOT / "recipes/shapes/gemma-3-1b-it.json"))), 9600)


def one_gpu_recipe(*flags):
    return load_recipe(ROOT / "recipes/grocery/grpo_one_gpu.yaml", GRPORecipe, list(flags), here=False)


def with_flags(recipe_flags, words):
    """The recipe as it is after a user took the advice."""
    return one_gpu_recipe(*recipe_flags, *words.split())


def test_the_recipe_for_one_gpu_fits(trainer):
    left = free_gib(one_gpu_recipe(), trainer, H100)
    assert left == pytest.approx(0.95 * 80 - 0.25 * 80 - sum(trainer.parts(one_gpu_recipe()).values()))
    assert left > 0
    assert free_gib(one_gpu_recipe(), trainer, Card(80.0, "", others=left + 1)) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("flags", "gib", "advice"),
    [
        (["--rollout_gpu_memory_utilization", "0.9"], 80, r"--rollout_gpu_memory_utilization 0\.\d\d?"),
        (["--gradient_checkpointing", "false"], 80, "--gradient_checkpointing true"),
        (
            ["--gradient_checkpointing", "false", "--rollout_gpu_memory_utilization", "0.9"],
            80,
            r"--gradient_checkpointing true --rollout_gpu_memory_utilization 0\.\d\d?",
        ),
        (["--per_device_train_batch_size", "128", "--gradient_accumulation_steps", "1"], 24, "--tokens_at_once 65536"),
        (["--rollout_gpu_memory_utilization", "0.05"], 80, r"--rollout_gpu_memory_utilization 0\.\d\d?"),
        (
            [f"--{SHARE}", "0.05", "--rollout", "trl_colocate", "--vllm_enable_sleep_mode", "true"],
            16,
            "--rollout_gpu_memory_utilization 0.82",
        ),  # asleep: 15.2 GiB without weights 1.86, adapter .05 and optimizer .05 are 13.2, .82 of 16
        (
            ["--share_prefixes", "false", "--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1",
             "--loss_type", "grpo"],
            24,
            r"--per_device_train_batch_size \d --gradient_accumulation_steps \d+",
        ),
    ],
)  # fmt: skip
def test_the_advice_is_a_setting_that_works(flags, gib, advice, trainer):
    recipe, card = one_gpu_recipe(*flags), Card(gib, "")
    assert fault(recipe, trainer, card)
    words = remedy(recipe, trainer, card)
    assert re.fullmatch(advice, words)
    changed = with_flags(flags, words)
    assert fault(changed, trainer, card) is None
    both = [
        r.trainer_value("per_device_train_batch_size") * r.trainer_value("gradient_accumulation_steps")
        for r in (recipe, changed)
    ]
    assert both[0] == both[1], "the effective batch stays"
    assert changed.rollout_gpu_memory_utilization * gib > 5


def test_a_share_below_vllms_weights_and_least_room_is_told(trainer):
    """Gemma-3-1B's weights are 1.86 GiB in bfloat16, 4 GiB are the least room: 5.86 of 80 are .0733."""
    told = {share: fault(one_gpu_recipe(f"--{SHARE}", share), trainer, H100) for share in ("0.073", "0.074")}
    assert told == {"0.073": "vLLM's share is too small: its weights and least room take 5.9 GiB", "0.074": None}
    halves = one_gpu_recipe("--rollout_tensor_parallel_size", "2")  # .93 and 4
    assert least_gib(halves, trainer) == pytest.approx(4.93, abs=0.01)


def test_another_loss_is_said_and_batches_are_those_that_trl_takes(trainer, monkeypatch):
    """Where prompts are not shared, micro-batches become smaller, and a sampled batch keeps its 128 completions."""
    flags = ["--share_prefixes", "false", "--steps_per_generation", "2", "--use_cpu", "true", "--bf16", "false"]
    flags += ["--per_device_train_batch_size", "64", "--gradient_accumulation_steps", "2"]
    recipe, card = one_gpu_recipe(*flags), Card(24.0, "")
    words, says = remedy(recipe, trainer, card).split(" (")
    assert says == "another loss: it depends on which completions share a micro-batch)"
    changed = with_flags(flags, words)
    size, steps = (changed.trainer_value(n) for n in ("per_device_train_batch_size", "steps_per_generation"))
    assert size < 64
    assert size * steps == 128
    assert changed.trainer_arguments(Path("out")).generation_batch_size == 128  # TRL took it
    assert "(" not in remedy(with_flags(flags, "--loss_type dapo"), trainer, card)
    assert "(" in remedy(with_flags(flags, "--loss_type dapo --entropy_coef 0.1"), trainer, card)


def test_a_small_card_takes_another_one(trainer):
    assert remedy(one_gpu_recipe(), trainer, Card(8.0, "")).startswith("a GPU of its own for vLLM")


def test_a_vllm_that_sleeps_has_its_share_only_while_it_samples(trainer):
    flags = ["--rollout", "trl_colocate", "--rollout_gpu_memory_utilization", "0.6"]
    awake, asleep = (one_gpu_recipe(*flags, "--vllm_enable_sleep_mode", value) for value in ("false", "true"))
    parts = trainer.parts(awake)
    held = parts["weights"] + parts["adapter"] + parts["optimizer"]
    card = Card(24.0, "")
    assert free_gib(awake, trainer, card) == pytest.approx(0.35 * 24 - sum(parts.values()))
    assert free_gib(asleep, trainer, card) == pytest.approx(0.95 * 24 - max(sum(parts.values()), 0.6 * 24 + held))


class Gpu:
    """What torch says of a GPU on which others hold `taken` GiB."""

    def __init__(self, monkeypatch, taken, gib=80.0):
        sizes = (int((gib - taken) * GIB), int(gib * GIB))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: sizes)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        monkeypatch.setattr(one_gpu, "card_gib", lambda recipe: (gib, "NVIDIA H100 80GB HBM3"))


def check(*flags):
    config = AutoConfig.for_model(**{**GEMMA, "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
        "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256})  # fmt: skip
    rows = [{"prompt": [{"role": "user", "content": "tea " * n}]} for n in (5, 2000)]
    check_one_gpu(one_gpu_recipe(*flags), config, rows, train_tokenizer(["tea and coffee"] * 9, 300))


def test_a_server_on_the_trainers_gpu_is_seen(monkeypatch, caplog):
    Gpu(monkeypatch, taken=20.5)
    with caplog.at_level(logging.INFO):
        check()
    assert re.search(r"on one GPU \(NVIDIA H100 80GB HBM3, 80.0 GiB\) the trainer takes about \d", caplog.text)
    assert "vLLM 20.0 (rollout_gpu_memory_utilization 0.25), others have 0.5: they fit" in caplog.text


def test_what_does_not_fit_is_told_in_one_line(monkeypatch):
    Gpu(monkeypatch, taken=72.0)
    line = r"vLLM 72.0 .*: they do not fit; use --rollout_gpu_memory_utilization 0.*, for grpo_step1.sh too$"
    with pytest.raises(InputError, match=line) as caught:
        check("--rollout_gpu_memory_utilization", "0.9")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"they do not fit; use --rollout_gpu_memory_utilization 0\.\d+$"):
        check("--rollout_gpu_memory_utilization", "0.9", "--rollout", "trl_colocate")


def test_a_server_that_the_recipe_puts_there_counts_though_it_is_not_seen(monkeypatch):
    Gpu(monkeypatch, taken=0.5)
    with pytest.raises(InputError, match=r"vLLM 4\.0 .*: vLLM's share is too small: .* 5\.9 GiB; use --rollout_gpu_"):
        check("--rollout_gpu_memory_utilization", "0.05")


def test_each_process_looks_at_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", "GPU {}".format)
    sizes = SimpleNamespace(total_memory=24 * GIB), SimpleNamespace(total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", sizes.__getitem__)
    assert card_gib(EstimateConfig()) == (24, "GPU 0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert card_gib(EstimateConfig()) == (80, "GPU 1")


def test_a_server_on_another_gpu_takes_no_part(monkeypatch, caplog):
    Gpu(monkeypatch, taken=0.5)
    with caplog.at_level(logging.INFO):
        check("--rollout_gpu_memory_utilization", "0.9", "--rollout_shares_gpu", "false")
        check("--rollout_gpu_memory_utilization", "0.9", "--rollout", "transformers")
    assert "GPU" not in caplog.text
