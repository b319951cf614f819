"""benchmarks/gpu.sh stays runnable: its commands, its order under a clock, its record of results."""

import functools
import json
import os
import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import torch

from benchmarks.clock import by_kind
from benchmarks.gpu_tables import gpu_table

ROOT = Path(__file__).parents[2]
WHERE = {"machine", "gpu", "torch", "date", "command"}  # of every line
PARTS = [
    "sft", "grpo", "tests", "paper", "sft_memory", "qwen3", "curve", "grpo_memory",
    "qwen3_packed", "attention", "compile",
]  # fmt: skip


def run(out, *flags, python=sys.executable, **environment):
    """The script's output and exit status."""
    environment = {**os.environ, "OUT": str(out), "PYTHON": str(python), **environment}
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def stub(folder, body):
    """An interpreter that writes down what it is asked to run, and then does as told."""
    path = folder / "python"
    path.write_text(f'#!/usr/bin/env bash\necho "$*" >>{folder}/commands\n{body}\n')
    path.chmod(0o755)
    return path


@functools.cache
def options_of(script):
    environment = {**os.environ, "PYTHONPATH": "src"}
    command = [sys.executable, script, "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return set(re.findall(r"--[a-z_]+", done.stdout))


@pytest.mark.parametrize("flags", [[], ["--quick"]], ids=["whole", "quick"])
def test_every_part_runs_a_script_with_options_that_it_has(tmp_path, flags):
    done = run(tmp_path, *flags, python=stub(tmp_path, 'echo \'{"name": "stub"}\''))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^== (\w+)$", done.stdout, re.MULTILINE) == PARTS
    commands = (tmp_path / "commands").read_text().splitlines()
    assert len(commands) == len(PARTS)
    assert (tmp_path / "gpu.jsonl").read_text().count('{"name": "stub"}\n') == len(PARTS)
    for command in commands:
        script, *words = command.split()
        if script == "-m":  # pytest
            assert all((ROOT / word).is_file() for word in words if word.endswith(".py"))
        else:
            assert {word for word in words if word.startswith("--")} <= options_of(script)


def test_a_part_that_fails_is_named_and_does_not_end_the_others(tmp_path):
    done = run(tmp_path, python=stub(tmp_path, '[ "$1" != -m ]'), PARTS="sft tests paper")
    assert done.returncode == 1
    assert "== paper took" in done.stdout
    assert "stopped by the clock: none; failed: tests" in done.stdout


def test_no_part_begins_when_the_time_is_used_up(tmp_path):
    done = run(tmp_path, python=stub(tmp_path, "true"), BUDGET="9")
    assert done.returncode == 0
    assert f"stopped by the clock: {' '.join(PARTS)}; failed: none" in done.stdout
    assert not (tmp_path / "commands").exists()


@pytest.mark.slow
def test_a_part_that_hangs_after_its_results_has_not_failed(tmp_path):
    done = run(tmp_path, python=stub(tmp_path, 'echo \'{"name": "stub"}\'; sleep 60'), PARTS="sft", BUDGET="10")
    assert done.returncode == 0
    assert "stopped by the clock: sft; failed: none" in done.stdout


def test_one_part_runs_at_toy_size(tmp_path):
    done = run(tmp_path, "--quick", PARTS="attention")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [row["layer"] for row in rows] == ["full", "sliding"]
    assert all(row["difference"] < 1e-5 and row["varlen_ms"] > 0 for row in rows)
    for row in rows:
        assert row.keys() >= WHERE
        assert row["machine"].startswith(platform.machine())
        assert row["date"] == str(date.today())
        assert row["command"] == "benchmarks/attention.py --samples 16"
        assert row["gpu"] is None or torch.cuda.is_available()


def test_every_line_is_made_in_one_place():
    """By the scripts whose lines gpu.sh keeps: `reporting.show_line`, or `report`, which calls it."""
    scripts = set(re.findall(r"benchmarks/(\w+)\.py", (ROOT / "benchmarks/gpu.sh").read_text()))
    assert scripts == {"sft", "shared_prefix", "attention"}
    for name in scripts:
        text = (ROOT / f"benchmarks/{name}.py").read_text()
        assert "show_line(" in text
        assert "print(json.dumps" not in text


@pytest.mark.slow
def test_a_training_part_runs_at_toy_size(tmp_path):
    done = run(tmp_path, "--quick", PARTS="grpo_memory")
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert (row["name"], row["who"], row["checkpointing"]) == ("shared_prefix_run", "ours", True)
    assert (row["attention"], row["fuse"]) == ("varlen", True)  # as on a GPU
    assert row["seconds"] > 0
    assert row.keys() >= WHERE
    assert row["mfu"] == pytest.approx(row["flops"] / row["seconds"] / 989e12)


@pytest.mark.slow
def test_stage_2_runs_at_toy_size_as_on_a_gpu(tmp_path):
    """Rows of 9,497 tokens in all, those of a user together: packs of 1,638 are fewer steps than its 18 rows have."""
    done = run(tmp_path, "--quick", PARTS="qwen3_packed")
    assert done.returncode == 0, done.stdout + done.stderr
    *rows, last = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [(row["who"], row["shape"], row["fuse"]) for row in rows] == [
        ("ours", "qwen3-small", True), ("packed", "qwen3-small", False),
    ]  # fmt: skip
    assert all(row["users"] == 8 and row["pack_tokens"] == 16384 and row["steps"] < 9 for row in rows)
    assert all(row.keys() >= WHERE for row in (*rows, last))


def test_kernels_by_what_they_do():
    names = ["void flash::flash_bwd_kernel<cutlass::bfloat16_t>", "sm90_xmma_gemm_bf16", "nvjet_tst_128x", "mul", "add"]
    found = by_kind(zip(names, [1, 2, 4, 8, 16], strict=True))
    assert found == {"attention_ms": 1, "matrix_ms": 6, "other_ms": 24}


@pytest.mark.slow
def test_the_papers_loss_runs_at_toy_size(tmp_path):
    """With two prompts of 4 completions, micro-batches of 4 hold 2 (1 - C(4, 4) / C(8, 4)) = 1.97 prompts."""
    done = run(tmp_path, "--quick", PARTS="paper")
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert (row["loss"], row["accumulation"], row["checkpointing"]) == ("bnpo", 2, True)
    assert row["seconds"] > 0
    assert row["flops"] > 0


def test_recorded_results_say_where_they_are_from():
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/gpu.jsonl").read_text().splitlines()]
    assert rows
    assert all(row.get("gpu") and row.get("machine") and row.get("date") for row in rows)
    assert all(row.get("command") or row.get("note") for row in rows)


def line(**keys):
    how = {"name": "sft_run", "shape": "a", "gpu": "G", "fuse": False, "compile": False, "checkpointing": False}
    return {**how, "mfu": 0.25, "mib": 1000.4, **keys}


def test_the_table_compares_each_peer_with_ours_of_the_same_work_and_card():
    step = {"name": "shared_prefix_run", "prompt": 7000, "samples": 16, "completion": 300, "accumulation": 1}
    table = gpu_table(
        [
            line(who="ours", row_tokens=30.0),
            line(who="ours", row_tokens=600.0, fuse=True),
            line(who="ours", row_tokens=300.0, checkpointing=True),
            line(who="ours", row_tokens=9000.0, gpu="other"),
            line(who="ours", row_tokens=9000.0, note="within a profile"),
            line(who="padded", row_tokens=100.0, checkpointing=True),
            line(who="padded", row_tokens=100.0, shape="b"),
            line(who="ours", seconds=0.5, **step),
            line(who="theirs", seconds=2.0, **step),
            line(who="ours", seconds=3.0, **step | {"accumulation": 8, "loss": "bnpo"}),
            {"name": "attention", "layer": "full", "shape": "a", "gpu": "G", "varlen_ms": 2.0, "sdpa_ms": 5.0},
        ],
        [],
    )
    assert [[cell.strip() for cell in row.split("|")[1:6]] for row in table.splitlines()[2:]] == [
        ["stage 2, a", "ours", "30 tokens/s", "-", "25.0 %"],
        ["stage 2, a", "ours, fused layers", "600 tokens/s", "-", "25.0 %"],
        ["stage 2, a", "ours, gradient checkpointing", "300 tokens/s", "-", "25.0 %"],
        ["stage 2, a", "ours", "9,000 tokens/s", "-", "25.0 %"],
        ["stage 2, a", "TRL, padded, gradient checkpointing", "100 tokens/s", "6.0 times", "25.0 %"],
        ["stage 2, b", "TRL, padded", "100 tokens/s", "-", "25.0 %"],
        ["stage 3, a step on 7,000 + 16 x 300 tokens, a", "ours", "0.500 s", "-", "25.0 %"],
        ["stage 3, a step on 7,000 + 16 x 300 tokens, a", "TRL", "2.000 s", "4.0 times", "25.0 %"],
        ["stage 3, a step on 8 x (7,000 + 16 x 300 tokens), bnpo, a", "ours", "3.000 s", "-", "25.0 %"],
        ["attention alone, full layer, a", "ours, varlen", "2.0 ms", "-", "-"],
        ["attention alone, full layer, a", "sdpa with a mask", "5.0 ms", "2.5 times", "-"],
    ]
    assert "stage 3" not in gpu_table(
        [line(who="ours", row_tokens=1.0), line(who="ours", seconds=1, **step, note="")], []
    )
    assert gpu_table([line(who="ours", row_tokens=1.0)], ["b"]).count("\n") == 1
