"""Every completion in files, the figures of a step as fractions, the warnings' words; with TRL's trainer itself."""

import json
import logging
import math
import string
from collections import defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from tiny_base.model import build_model, train_tokenizer
from tiny_models import base_shape
from twice_rec.catalog import ItemCatalog
from twice_rec.grpo.completion_log import PATIENCE, CompletionLog, step_figures
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.grpo.scoring import StepRewards
from twice_rec.item_sequences import ItemSequences
from twice_rec.llm.generation import PolicyScorer
from twice_rec.records import Item
from twice_rec.training_log import TrainingLog
from wandb_file import history, tables

WEIGHTS = {"collaborative": 4.0, "structure": 1.0}


def columns(**changed):
    """Two groups of three: hit, miss, malformed; outside, miss, miss."""
    return {
        "outcome": ["hit", "miss", "malformed", "outside", "miss", "miss"],
        "confidence": [0.8, 0.5, 0.0, 0.0, 0.25, 0.25],
        "log_popularity": [3.0, 2.0, math.nan, math.nan, 1.0, 0.0],
        "collaborative": [3.4, 0.5, 0.0, 0.0, 0.0, 0.0],
        "structure": [1.0] * 6,
        **changed,
    }


def test_figures_of_a_step():
    figures = step_figures(columns(), 3, WEIGHTS)
    # x = 3, 2, 1, 0 and y = 4 * (3.4, .5, 0, 0): means 1.5 and 3.9.
    sxy = 1.5 * (13.6 - 3.9) + 0.5 * (2.0 - 3.9) - 0.5 * (0 - 3.9) - 1.5 * (0 - 3.9)
    sxx, syy = 2 * (1.5**2 + 0.5**2), (13.6 - 3.9) ** 2 + (2.0 - 3.9) ** 2 + 2 * 3.9**2
    assert figures == pytest.approx(
        {
            "outcome/hit": 1 / 6,
            "outcome/miss": 3 / 6,
            "outcome/outside": 1 / 6,
            "outcome/malformed": 1 / 6,
            "confidence/hit": 8 / 10,
            "confidence/miss": (5 / 10 + 2 * 1 / 4) / 3,
            "groups/without_hit": 1 / 2,
            "groups/without_variance": 1 / 2,
            "structure/missing": 0.0,
            "reward/popularity_share": sxy**2 / (sxx * syy),
        }
    )


def test_popularity_explains_all_or_nothing():
    linear = columns(outcome=["miss"] * 6, log_popularity=[0.0, 1, 2, 3, 4, 5], collaborative=[0.0, 1, 2, 3, 4, 5])
    assert step_figures(linear, 3, WEIGHTS)["reward/popularity_share"] == pytest.approx(1)
    even = {**linear, "collaborative": [1.0, 0, 0, 0, 0, 1]}
    assert step_figures(even, 3, WEIGHTS)["reward/popularity_share"] == pytest.approx(0)


@pytest.mark.parametrize(
    "changed",
    [
        {"collaborative": [0.0] * 6},
        {"log_popularity": [1.0] * 6},
        {"outcome": ["malformed"] * 4 + ["hit", "miss"]},
        {"outcome": ["malformed"] * 6},
    ],
)
def test_a_share_of_nothing_is_left_out(changed):
    assert "reward/popularity_share" not in step_figures(columns(**changed), 3, WEIGHTS)


def test_without_item_rewards_there_is_no_popularity_share():
    assert "reward/popularity_share" not in step_figures(columns(), 3, {"structure": 1.0})
    figures = step_figures(columns(outcome=["malformed"] * 6), 3, {"structure": 1.0})
    assert not {"confidence/hit", "confidence/miss"} & figures.keys()
    assert figures["groups/without_variance"] == 1


def test_equal_sums_have_no_variance_though_their_parts_differ():
    table = columns(collaborative=[0.25, 0, 0, 1, 0, 0], structure=[0.0, 1, 1, 1, 1, 1])
    assert step_figures(table, 3, WEIGHTS)["groups/without_variance"] == 1 / 2


# ---------------------------------------------------------------------------------------------------------------------
# The callback on its own


class FakeTrainer:
    """What the callback reads of a trainer."""

    def __init__(self, folder, report_to=()):
        self.args = SimpleNamespace(output_dir=str(folder), report_to=list(report_to))
        self.reward_func_names, self.reward_weights, self.num_generations = list(WEIGHTS), torch.tensor([4.0, 1.0]), 3
        self.model = SimpleNamespace(training=True)
        self._metrics = {"train": defaultdict(list)}
        self._logs = {name: deque(maxlen=6) for name in ("prompt", "completion", "advantages")}
        self._logs |= {name: defaultdict(lambda: deque(maxlen=6)) for name in ("rewards", "extra")}

    def sample(self, table, texts="abcdef"):
        self._logs["prompt"].extend([[{"role": "user", "content": "?"}]] * 6)
        self._logs["completion"].extend([[{"role": "assistant", "content": text}] for text in texts])
        for name, values in table.items():
            self._logs["rewards" if name in WEIGHTS else "extra"][name].extend(values)
        self._logs["advantages"].extend([0.5] * 6)


def state(step):
    return SimpleNamespace(global_step=step, max_steps=100, is_world_process_zero=True)


def read(path):
    return pyarrow.parquet.read_table(path).to_pydict()


def texts_of(path):
    return [completion[0]["content"] for completion in read(path)["completion"]]


def test_round_trip(tmp_path):
    trainer = FakeTrainer(tmp_path)
    log = CompletionLog(trainer, None, 4)
    trainer.sample(columns(truncated=[True] * 6, policy_version=[7] * 6))
    log.on_step_end(trainer.args, state(50), None)
    assert log.path(50).name == "completions_00050.parquet"
    found = read(log.path(50))
    assert list(found)[:3] == ["step", "prompt", "completion"]
    assert list(found)[-1] == "advantage"
    for name, values in columns(truncated=[True] * 6, policy_version=[7] * 6, step=[50] * 6).items():
        assert [str(value) for value in found[name]] == [str(value) for value in values], name
    assert texts_of(log.path(50)) == list("abcdef")
    assert trainer._metrics["train"]["groups/without_hit"] == [1 / 2]
    assert [path.name for path in log.path(50).parent.iterdir()] == ["completions_00050.parquet"]


def test_samples_of_micro_batches_are_all_kept_and_none_twice(tmp_path):
    trainer = FakeTrainer(tmp_path)
    log = CompletionLog(trainer, None, 4)
    trainer.sample(columns(), "abcdef")
    log.on_substep_end(trainer.args, state(0), None)
    log.on_substep_end(trainer.args, state(0), None)
    trainer.sample(columns(), "ghijkl")
    log.on_step_end(trainer.args, state(1), None)
    log.on_step_end(trainer.args, state(2), None)  # trained once more on the same
    assert texts_of(log.path(1)) == list("abcdefghijkl")
    assert not log.path(2).exists()
    assert len(trainer._metrics["train"]["outcome/hit"]) == 1


def run_steps(tmp_path, caplog, tables, **options):
    trainer = FakeTrainer(tmp_path)
    log = CompletionLog(trainer, options.pop("sample_every", None), 2)
    with caplog.at_level(logging.INFO, logger="twice_rec.grpo.completion_log"):
        for step, table in enumerate(tables, start=1):
            trainer.sample(table)
            log.on_step_end(trainer.args, state(step), None)
    return caplog.records


GOOD = columns(outcome=["hit", "miss", "miss"] * 2, collaborative=[2.0, 0, 0] * 2)
FLAT = columns(outcome=["miss"] * 6, collaborative=[0.0] * 6)
BROKEN = columns(outcome=["malformed"] * 4 + ["miss"] * 2, collaborative=[0.0] * 5 + [0.5], structure=[0.0, 1] * 3)
UNFORMED = {**GOOD, "structure": [0.0] * 5 + [1.0]}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (FLAT, ["had no variance", "advantages are 0", "raise temperature or num_generations", "tau"]),
        (BROKEN, ["were malformed", "raise max_completion_length", "completions/clipped_ratio"]),
        (UNFORMED, ["had no whole structure", "lower learning_rate", "reward_weights"]),
    ],
)
def test_persistent_faults_are_told_once_in_words(tmp_path, caplog, table, words):
    assert not run_steps(tmp_path, caplog, [*[table] * (PATIENCE - 1), GOOD, *[table] * (PATIENCE - 1)])
    (record,) = run_steps(tmp_path, caplog, [table] * 3 * PATIENCE)
    assert record.levelname == "WARNING"
    for part in [*words, f"last {PATIENCE} steps", str(tmp_path / "completions")]:
        assert part in record.getMessage()


def test_samples_are_shown_with_their_rewards(tmp_path, caplog):
    told = [record.getMessage() for record in run_steps(tmp_path, caplog, [GOOD] * 3, sample_every=2)]
    assert told == [
        "step 2, hit, collaborative 2, structure 1, advantage +0.50: a",
        "step 2, miss, collaborative 0, structure 1, advantage +0.50: f",
    ]
    told = run_steps(tmp_path, caplog, [GOOD] * 100, sample_every=1000)  # and at the last step
    assert [record.getMessage()[:9] for record in told][-2:] == ["step 100,"] * 2


def test_samples_go_to_wandb(tmp_path, monkeypatch):
    import wandb

    logged = []
    monkeypatch.setattr(wandb, "log", lambda values, commit: logged.append((values["completions"], commit)))
    trainer = FakeTrainer(tmp_path, ["wandb"])
    trainer.sample(columns())
    CompletionLog(trainer, 1, 6).on_step_end(trainer.args, state(1), None)
    ((table, commit),) = logged
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.data]
    assert [row["completion"] for row in rows] == list("abcdef")
    assert [row["prompt"] for row in rows] == ["?"] * 6
    assert rows[2]["log_popularity"] is None
    assert not commit


# ---------------------------------------------------------------------------------------------------------------------
# With TRL's trainer

CATALOG = ItemCatalog([Item(f"I{i}", f"item {i}") for i in range(4)])


class Confidences:
    def confidences(self, histories, candidates, kind, debiased):
        return (candidates / 10).astype(np.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["which item, <think> <item_nm> item 1 </item_nm>?"] * 50 + [string.printable], 300)


def train(tokenizer, folder, steps, resume=None, names=("match", "tags", "rank"), **keys):
    model = build_model(tokenizer, base_shape(), seed=1)
    chosen = {"reward_funcs": list(names), "reward_weights": [1.0] * len(names), "reward_rank": "ndcg"}
    config = GRPORecipe(run_dir="r", domain="D", seed=1, **chosen)
    data = SimpleNamespace(catalog=CATALOG, training_histories=lambda: ItemSequences.of([[1, 2], [2]]))
    step = StepRewards(config, data, Confidences(), PolicyScorer(model, tokenizer))
    row = {"candidates": ["I1", "I2"], "target": "I1", "history": ["I0"]}
    rows = [{"prompt": [{"role": "user", "content": f"which item {i}?"}], **row} for i in range(8)]
    arguments = {
        "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "learning_rate": 1e-2,
        "use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1, "save_steps": 1, "max_steps": steps,
        "gradient_checkpointing": False, "save_strategy": "steps", "disable_tqdm": True,
    }  # fmt: skip
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=step.functions,
        args=GRPOConfig(output_dir=str(folder), **{**arguments, **keys}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    log = CompletionLog(trainer, 1, 2)
    trainer.add_callback(log)
    trainer.add_callback(TrainingLog(folder / "log.jsonl"))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, log


def test_files_hold_what_the_trainer_trained_on(tokenizer, tmp_path):
    trainer, log = train(tokenizer, tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "completions").iterdir()) == [log.path(1).name, log.path(2).name]
    for step in (1, 2):
        found, logged = read(log.path(step)), trainer.state.log_history[step - 1]
        assert found["step"] == [step] * 4
        assert {tuple(message["role"] for message in prompt) for prompt in found["prompt"]} == {("user",)}
        for name in ("match", "tags", "rank"):
            assert np.mean(found[name]) == pytest.approx(logged[f"rewards/{name}/mean"], abs=1e-6)
        totals = np.sum([found[name] for name in ("match", "tags", "rank")], axis=0)
        expected = (totals - totals.mean()) / (totals.std(ddof=1) + 1e-4)
        assert found["advantage"] == pytest.approx(expected, abs=1e-4)
        assert logged["outcome/malformed"] == found["outcome"].count("malformed") / 4
        assert logged["groups/without_variance"] == logged["frac_reward_zero_std"]
        assert "completions/clipped_ratio" in logged


def test_an_offline_run_of_wandb_has_the_curves_and_a_table_of_completions(tokenizer, tmp_path, monkeypatch):
    import wandb

    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "PROJECT": "p", "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    _, log = train(tokenizer, tmp_path / "grpo", 2, report_to=["wandb"], save_strategy="no")
    wandb.finish()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    rows = [row for row in history(folder) if "train/loss" in row]
    lines = [json.loads(line) for line in (tmp_path / "grpo" / "log.jsonl").read_text().splitlines()]
    assert [row["train/global_step"] for row in rows] == [line["step"] for line in lines] == [1, 2]
    for row, line in zip(rows, lines, strict=True):
        for name in ("loss", "reward", "learning_rate", "rewards/match/mean", "outcome/malformed", "kl"):
            if name in line:
                assert row[f"train/{name}"] == pytest.approx(line[name], rel=1e-6, abs=1e-9), name
        assert {"loss", "reward", "learning_rate", "rewards/match/mean"} <= line.keys()
    shown = tables(folder, "completions")
    assert [[row["step"] for row in table] for table in shown] == [[1, 1], [2, 2]]
    for step, table in enumerate(shown, start=1):
        kept = read(log.path(step))
        for row, place in zip(table, (0, 3), strict=True):  # the first and the last completion of the step
            assert row["prompt"] == kept["prompt"][place][0]["content"]
            assert row["completion"] == kept["completion"][place][0]["content"]
            assert row["outcome"] == kept["outcome"][place]
            for name in ("match", "tags", "rank", "advantage"):
                assert row[name] == pytest.approx(kept[name][place]), name


def test_a_resumed_run_leaves_no_file_twice_and_none_of_steps_ahead(tokenizer, tmp_path):
    _, log = train(tokenizer, tmp_path / "whole", 3)
    folder = tmp_path / "killed"
    train(tokenizer, folder, 3)
    later = log.path(9).name
    (folder / "completions" / later).write_bytes(b"of a run that got further")
    train(tokenizer, folder, 3, resume=str(folder / "checkpoint-1"))
    names = [log.path(step).name for step in (1, 2, 3)]
    assert sorted(path.name for path in (folder / "completions").iterdir()) == names
    for name in names:  # the same seeds give the same completions
        assert texts_of(folder / "completions" / name) == texts_of(tmp_path / "whole" / "completions" / name)


@pytest.mark.parametrize(
    ("keys", "sizes"),
    [
        ({"num_iterations": 2}, {1: 4, 3: 4}),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, {1: 8, 2: 8, 3: 8}),
        ({"steps_per_generation": 2}, {1: 8, 3: 8}),
    ],
)
def test_every_completion_stands_in_one_file(tokenizer, tmp_path, keys, sizes):
    _, log = train(tokenizer, tmp_path, 3, names=("tags",), save_strategy="no", **keys)
    found = {step: len(read(log.path(step))["step"]) for step in range(1, 4) if log.path(step).exists()}
    assert found == sizes


def test_the_policy_scores_with_its_adapter_and_keeps_its_mode(tokenizer, tmp_path):
    trainer, _ = train(tokenizer, tmp_path, 1, save_strategy="no")
    inner = trainer.model.get_base_model()
    prompt = [{"role": "user", "content": "which item?"}]
    trainer.model.train()
    policy = PolicyScorer(inner, tokenizer)
    before = policy.score(prompt, ["item 1", "item 2"])
    assert trainer.model.training
    assert all(module.training for module in inner.modules())
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter)
    after = policy.score(prompt, ["item 1", "item 2"])
    with trainer.model.disable_adapter():
        without = policy.score(prompt, ["item 1", "item 2"])
    assert len({before[0], after[0], without[0]}) == 3
