"""Stage 2's loss on a CPU: TRL's, with the head computed only where a token is predicted."""

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig

from tiny_base.model import train_tokenizer
from tiny_models import gemma3
from twice_rec.sft.collator import PackedCollator
from twice_rec.sft.trainer import SFTTrainer

ROWS = [
    {"input_ids": list(range(10, 24)), "labels": [-100] * 8 + [9, 8, 7, -100, 5, 4], "lengths": [[3, 2, 4], [5]]},
    {"input_ids": list(range(10, 16)), "labels": [-100] * 5 + [9], "lengths": [[6]]},
]


def trainer_of(kind, tmp_path, packed, smoothing):
    torch.manual_seed(3)
    model = gemma3("chunked_sdpa", vocab_size=300)
    rows = [row if packed else {name: row[name] for name in ("input_ids", "labels")} for row in ROWS]
    more = {"data_collator": PackedCollator(model)} if packed else {}
    return kind(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path), dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=not packed,
            bf16=False, use_cpu=True, report_to="none", label_smoothing_factor=smoothing, max_steps=1,
            per_device_train_batch_size=2,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=train_tokenizer(["tea and coffee"] * 9, 300),
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
        **more,
    )  # fmt: skip


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_loss_gradients_and_log_are_those_of_trl(tmp_path, packed, smoothing):
    found = {}
    for kind in (SFTTrainer, trl.SFTTrainer):
        trainer, heads = trainer_of(kind, tmp_path, packed, smoothing), []
        trainer.model.train()
        batch = next(iter(trainer.get_train_dataloader()))
        backbone = trainer.model.get_base_model().base_model
        backbone.norm.register_forward_hook(lambda *_, seen=heads: seen.append(1))
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(6))
        loss.backward()
        gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        found[kind] = loss.detach(), gradients, {name: values[-1] for name, values in trainer._metrics["train"].items()}
        assert heads == [1] * (2 if smoothing else 1), "TRL asks for its log once more if labels are smoothed"
    (loss, gradients, log), (their_loss, their_gradients, their_log) = found[SFTTrainer], found[trl.SFTTrainer]
    torch.testing.assert_close(loss, their_loss)
    assert gradients.keys() == their_gradients.keys() != set()
    torch.testing.assert_close(gradients, their_gradients)
    assert log == pytest.approx(their_log)
    assert set(log) >= {"entropy", "mean_token_accuracy", "num_tokens"}


def test_the_head_sees_what_predicts_a_token(tmp_path, monkeypatch):
    trainer, seen = trainer_of(SFTTrainer, tmp_path, True, 0.0), []
    apply = trl.trainer.utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        "trl.trainer.utils._ChunkedLogProbFunction.apply",
        lambda hidden, *more: seen.append(hidden.shape) or apply(hidden, *more),
    )
    trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert [shape[0] for shape in seen] == [6]
