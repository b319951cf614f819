"""The progress of long work: a bar in a terminal, lines in a log."""

import io
import sys
from types import SimpleNamespace

from transformers import PrinterCallback

from twice_rec.progress import progress
from twice_rec.training_log import TrainingLines, write_lines


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream, seconds_per_step, steps=60):
    """What a loop of `steps` steps writes, by a clock that moves by hand."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("tqdm.std.time", lambda: clock.now)
    for _ in progress(range(steps), desc="asking", unit="batch"):
        clock.now += seconds_per_step
    return stream.getvalue()


def test_a_log_gets_a_line_every_ten_seconds(monkeypatch):
    text = shown(monkeypatch, io.StringIO(), seconds_per_step=1.0)
    assert "\r" not in text
    lines = text.splitlines()
    assert len(lines) == 6
    assert lines[0] == "asking: batch 10 of 60, 00:10 taken, 00:50 left"


def test_what_is_quick_says_nothing_in_a_log(monkeypatch):
    assert shown(monkeypatch, io.StringIO(), seconds_per_step=0.1) == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    assert shown(monkeypatch, Terminal(), seconds_per_step=1.0).count("\r") > 20


def test_a_trainer_writes_lines_and_prints_no_metrics(monkeypatch):
    stream, clock = io.StringIO(), SimpleNamespace(now=1000.0)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("tqdm.std.time", lambda: clock.now)
    callbacks = [PrinterCallback]
    trainer = SimpleNamespace(remove_callback=callbacks.remove, add_callback=callbacks.append)
    write_lines(trainer, "grpo")
    (lines,) = callbacks
    assert isinstance(lines, TrainingLines)
    state = SimpleNamespace(is_world_process_zero=True, max_steps=8, global_step=2)
    lines.on_train_begin(None, state, None)
    for step in (3, 4, 5):
        state.global_step, clock.now = step, clock.now + 6.0
        lines.on_log(None, state, None, {"loss": 0.12345, "reward": 9.5, "kl": 1.0})
        lines.on_step_end(None, state, None)
    lines.on_train_end(None, state, None)
    assert stream.getvalue() == "grpo: step 4 of 8, 00:12 taken, 00:23 left, loss=0.123, reward=9.5\n"
