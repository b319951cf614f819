"""The log of a trainer in files."""

import json
import logging
import math
from types import SimpleNamespace

from twice_rec.training_log import TrainingLog, shortened

SUMMARY = {"train_loss": 0.3, "train_runtime": 1.0, "epoch": 1.0, "step": 3}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(path, steps, history=(), main=True, reward=False):
    """A trainer's calls: it begins with the history of a checkpoint, and logs the steps."""
    state = SimpleNamespace(log_history=list(history), is_world_process_zero=main, max_steps=3)
    callback = TrainingLog(path)
    callback.on_train_begin(None, state, None)
    for step in steps:
        row = {"loss": step / 8, "learning_rate": 0.001, **({"reward": 2.5} if reward else {}), "step": step}
        state.log_history.append(row)
        callback.on_log(None, state, None)
    return state.log_history


def test_each_logged_step_is_a_line_in_both_files(tmp_path, caplog):
    with caplog.at_level(logging.DEBUG):
        train(tmp_path / "log.jsonl", [1, 2], reward=True)
    rows = [{"step": step, "loss": step / 8, "learning_rate": 0.001, "reward": 2.5} for step in (1, 2)]
    assert lines(tmp_path / "log.jsonl") == rows
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("DEBUG", "step 1 of 3: loss 0.125, reward 2.5, learning rate 0.001"),
        ("DEBUG", "step 2 of 3: loss 0.25, reward 2.5, learning rate 0.001"),
    ]


def test_a_resumed_training_repeats_no_step(tmp_path):
    path = tmp_path / "log.jsonl"
    history = train(path, [1, 2, 3])
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # killed while it wrote
    train(path, [2, 3], history[:1])  # from the checkpoint of step 1
    assert [row["step"] for row in lines(path)] == [1, 2, 3]
    train(path, [], [])  # begun anew
    assert not path.exists()


def test_what_is_no_step_and_no_number_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    state = SimpleNamespace(log_history=[SUMMARY], is_world_process_zero=True, max_steps=3)
    TrainingLog(path).on_log(None, state, None)
    assert not path.exists()
    state.log_history.append({"loss": math.nan, "kl": math.inf, "entropy": 0.5, "step": 3})
    TrainingLog(path).on_log(None, state, None)
    assert lines(path) == [{"step": 3, "loss": None, "kl": None, "entropy": 0.5}]


def test_other_processes_write_nothing(tmp_path):
    train(tmp_path / "log.jsonl", [1], main=False)
    assert not list(tmp_path.iterdir())


def test_of_a_long_prompt_the_middle_is_left_out():
    assert shortened([{"content": "a" * 799}]) == "a" * 799
    assert shortened([{"content": "a" * 200}, {"content": "b" * 99 + "c" * 600}]) == "a" * 200 + " ... " + "c" * 600
