"""What a trainer's log says of its speed: counted by hand, and in trainings of stages 2 and 3."""

import logging
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig
from trl import GRPOConfig, SFTConfig

from tiny_base.model import train_tokenizer
from tiny_models import gemma3, llama
from twice_rec.grpo.trainer import GRPOTrainer, SharedPrefixGRPOTrainer
from twice_rec.llm import throughput
from twice_rec.llm.flops import ModelArithmetic, Work
from twice_rec.llm.footprint import Shape
from twice_rec.llm.throughput import Meter, peak_tflops
from twice_rec.sft.collator import PackedCollator
from twice_rec.sft.trainer import SFTTrainer

ONE = SimpleNamespace(num_processes=1, reduce=lambda counts, how: counts)
# a beginning of 3 tokens with rests of 2 and 4, and a row of 5
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5, 6, 0, 1, 2, 3, 4]])
ARITHMETIC = ModelArithmetic(layers=10, head=100, attention=8, windows=(3, None))
TRAINED = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}


def after(seconds, counted, peak=1e-9, adapter=True, accelerator=ONE):
    """The figures of one step of so many seconds, with a peak of 1,000 operations per second."""
    meter = Meter(ARITHMETIC, adapter, peak)
    counted(meter)
    meter._seconds = seconds
    return meter.figures(accelerator)


def test_packed_rows():
    """17 tokens of rows, 14 computed; pairs in the window 24 + 12, and without one 37 + 15."""
    found = after(2, lambda meter: meter.count(POSITIONS, 6))
    work = Work(14, 6, {3: 36, None: 52})
    assert work == Work.of([(0, 3), (3, 2), (3, 4), (0, 5)], 6, (3, None))
    flops = 2 * 2 * (10 * 14 + 100 * 6) + 3 * 4 * 8 * (36 + 52)
    assert flops == ARITHMETIC.training(work) == 11_408
    expected = {"tokens_per_second": 8.5, "computed_tokens_per_second": 7, "mfu": flops / (2 * 1000)}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(side):
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    batch = {"attention_mask": mask if side == "right" else mask.flip(1), "labels": torch.tensor([[-100, 7, 7, -100]])}
    found = after(1, lambda meter: meter.count_batch(batch))
    work = Work.of([(0, 2), (0, 4)], 2, (3, None))
    assert found == pytest.approx(
        {"tokens_per_second": 6, "computed_tokens_per_second": 6, "mfu": ARITHMETIC.training(work) / 1000}
    )


def test_a_forward_alone_is_work_but_no_trained_tokens():
    def counted(meter):
        meter.count(POSITIONS, 6, rows=30)
        meter.count(POSITIONS, 6, rows=30, training=False)

    found, work = after(1, counted, adapter=False), Work.of([(0, 3), (3, 2), (3, 4), (0, 5)], 6, (3, None))
    assert found["tokens_per_second"] == 30
    assert found["computed_tokens_per_second"] == 14
    assert found["mfu"] * 1000 == pytest.approx(ARITHMETIC.training(work, adapter=False) + ARITHMETIC.forward(work))


def test_tokens_are_those_of_all_processes_and_the_utilisation_is_that_of_each_gpu():
    four = SimpleNamespace(num_processes=4, reduce=lambda counts, how: counts * 4)
    one, found = (after(1, lambda meter: meter.count(POSITIONS, 6), accelerator=a) for a in (ONE, four))
    assert found["tokens_per_second"] == 4 * one["tokens_per_second"]
    assert found["mfu"] == pytest.approx(one["mfu"], rel=0.01)


def test_a_line_has_only_what_came_since_the_one_before():
    meter = Meter(ARITHMETIC, True, None)
    meter.begin_step()
    meter.count(POSITIONS, 6)
    meter.on_optimizer_step(None, None, None)
    assert meter.figures(ONE).keys() == {"tokens_per_second", "computed_tokens_per_second"}
    assert meter.figures(ONE) == {}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA A1000 Laptop", None),
        ("Tesla T4", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A40", 149.7),
        ("NVIDIA A40-48Q", None),
    ],
)
def test_peaks(name, peak):
    assert peak_tflops(name) == peak


@pytest.mark.parametrize(
    ("gpu", "says"),
    [
        (None, "no model FLOP utilisation: this machine has no GPU"),
        ("Some Card", "the bfloat16 peak of Some Card is not known"),
        ("NVIDIA H200", None),
    ],
)
def test_a_missing_utilisation_is_said_once(gpu, says, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    model = get_peft_model(llama(), LoraConfig(target_modules="all-linear"))
    with caplog.at_level(logging.INFO):
        meter = Meter.of(model)
    assert [record for record in caplog.messages if "utilisation" in record] == caplog.messages
    assert len(caplog.messages) == (says is not None)
    assert says is None or says in caplog.messages[0]
    assert meter._arithmetic == ModelArithmetic.of(llama())


def test_a_model_with_other_layers_is_trained_all_the_same(caplog):
    model = SimpleNamespace(config=llama().config.__class__(layer_types=["linear_attention"] * 2, num_hidden_layers=2))
    with caplog.at_level(logging.INFO):
        Meter.of(model)
    assert "the operations of this model are not counted" in caplog.text


MIXTURE = {
    "vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 2, "moe_intermediate_size": 128, "num_experts": 8,
    "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip


def test_of_experts_those_that_a_token_goes_through_count():
    """Per layer: queries and output 256 x 256, keys and values 256 x 128, router 256 x 8, experts 2 x 3 x 256 x 128."""
    shape = Shape.of(AutoConfig.for_model("qwen3_moe", **MIXTURE))
    assert shape.arithmetic.layers == 2 * (2 * 256 * 256 + 2 * 256 * 128 + 256 * 8 + 2 * 3 * 256 * 128) == 790_528
    # gate and up are one matrix of 256 x 256
    assert shape.widths == 2 * (2 * 512 + 2 * 384 + 264 + 2 * (512 + 384))


def test_experts_of_an_unknown_number_are_said_not_to_count():
    config = llama().config  # says nothing of experts
    with pytest.raises(ValueError, match=r"it has experts, .*experts.*, and its config.json no num_experts_per_tok"):
        ModelArithmetic.of(SimpleNamespace(config=config, base_model=SimpleNamespace(layers=Experts())))


class Experts(torch.nn.Module):
    """The weights of a layer's experts."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.Parameter(torch.zeros(8, 4, 3))


def pinned(monkeypatch):
    """A GPU that a meter believes in: 1 TFLOP/s."""
    monkeypatch.setattr(throughput, "peak_tflops", lambda name: 1.0)
    monkeypatch.setattr(Meter, "of", classmethod(lambda cls, model: cls(ModelArithmetic.of(bare(model)), True, 1.0)))


def bare(model):
    return model.get_base_model()


def seconds_of(row, tokens):
    return tokens / row["tokens_per_second"]


@pytest.mark.parametrize("packed", [True, False])
def test_the_log_of_stage_2(packed, tmp_path, monkeypatch):
    pinned(monkeypatch)
    model = gemma3("chunked_sdpa", vocab_size=300)
    rows = [
        {"input_ids": list(range(10, 24)), "labels": [-100] * 8 + [9] * 6, "lengths": [[3, 2, 4], [5]]},
        {"input_ids": list(range(10, 16)), "labels": [-100] * 5 + [9], "lengths": [[6]]},
    ]
    more, options = {}, {}
    if packed:
        more, options = {"data_collator": PackedCollator(model)}, {"remove_unused_columns": False}
    else:
        rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path), dataset_kwargs={"skip_prepare_dataset": True}, max_steps=1, bf16=False,
            per_device_train_batch_size=2, **TRAINED, **options,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=train_tokenizer(["tea and coffee"] * 9, 300),
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
        **more,
    )  # fmt: skip
    trainer.train()
    row = trainer.state.log_history[0]
    tokens, segments = (23, [(0, 3), (3, 2), (3, 4), (0, 5), (0, 6)]) if packed else (20, [(0, 14), (0, 6)])
    seconds = seconds_of(row, tokens)
    assert 0 < seconds <= trainer.state.log_history[-1]["train_runtime"]
    assert row["computed_tokens_per_second"] * seconds == pytest.approx(20)
    arithmetic = ModelArithmetic.of(bare(trainer.model))
    flops = arithmetic.training(Work.of(segments, 7, arithmetic.windows))
    assert row["mfu"] * seconds * 1e12 == pytest.approx(flops)


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, SharedPrefixGRPOTrainer])
def test_the_log_of_stage_3(trainer_class, tmp_path, monkeypatch):
    """Two prompts with two completions each; the policy is trained, and the reference asked once."""
    pinned(monkeypatch)
    prompts, ends = [list(range(10, 20)), list(range(20, 26))], [[30, 31, 32], [33], [34, 35], [36, 37, 38, 39]]

    def rollouts(given, trainer):
        return {"prompt_ids": [prompts[i // 2] for i in range(4)], "completion_ids": ends, "logprobs": None}

    model = gemma3("chunked_sdpa" if trainer_class is SharedPrefixGRPOTrainer else "sdpa", vocab_size=300)
    trainer = trainer_class(
        model=model,
        reward_funcs=lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
        args=GRPOConfig(
            output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=4, beta=0.04, bf16=False,
            max_completion_length=4, loss_type="grpo", max_steps=1, **TRAINED,
        ),
        train_dataset=Dataset.from_list([{"prompt": "tea"}, {"prompt": "milk"}]),
        processing_class=train_tokenizer(["tea and coffee"] * 9, 300),
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
        rollout_func=rollouts,
    )  # fmt: skip
    trainer.train()
    row = trainer.state.log_history[0]
    seconds = seconds_of(row, 2 * 10 + 2 * 6 + 10)
    if trainer_class is SharedPrefixGRPOTrainer:
        segments = [(0, 10), (10, 3), (10, 1), (0, 6), (6, 2), (6, 4)]
    else:
        segments = [(0, 13), (0, 11), (0, 8), (0, 10)]
    arithmetic = ModelArithmetic.of(bare(trainer.model))
    work = Work.of(segments, 10, arithmetic.windows)
    assert row["computed_tokens_per_second"] * seconds == pytest.approx(work.tokens)
    assert row["mfu"] * seconds * 1e12 == pytest.approx(arithmetic.training(work) + arithmetic.forward(work))
