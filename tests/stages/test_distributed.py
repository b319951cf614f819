"""Two processes train what one trains with the same global batch: data-parallel by gloo, and ZeRO-2."""

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
from safetensors.torch import load_file

from stages.pipeline import ROOT, STAGES, run, words

pytestmark = pytest.mark.slow

LAUNCHERS = {
    "one": ["-m", "torch.distributed.run", "--nproc_per_node", "1", "--master_port"],
    "gloo": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
    "zero2": [
        "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2", "--mixed_precision", "no",
        "--config_file", str(ROOT / "recipes" / "accelerate_configs" / "zero2.yaml"), "--main_process_port",
    ],
}  # fmt: skip


def train(run_dir, launcher, batch_size):
    """Stage 2 under a launcher; the adapter it saved."""
    shutil.rmtree(run_dir / "sft", ignore_errors=True)
    flags = ["--use_peft", "true", "--max_steps", "3", "--save_steps", "9", "--sample_every", "null"]
    launch(launcher, "sft", run_dir, *flags, "--per_device_train_batch_size", str(batch_size))
    return load_file(run_dir / "sft" / "adapter_model.safetensors")


def launch(launcher, stage, run_dir, *flags):
    """Run a stage in the launcher's processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, *LAUNCHERS[launcher], str(port), "-m", STAGES[stage][0]]
    command += words(stage, run_dir, run_dir / "base", *flags)
    # DeepSpeed compiles. In the user's cache, a process that was killed then leaves a lock, and others wait for ever.
    compiled = {"TORCH_EXTENSIONS_DIR": str(run_dir / "compiled")}
    environment = {**os.environ, **compiled, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("distributed")
    for stage in ("prepare", "base", "rationales"):
        assert run(stage, run_dir, run_dir / "base") == 0
    return run_dir, train(run_dir, "one", 4)


@pytest.mark.parametrize("launcher", ["gloo", "zero2"])
def test_two_processes_train_what_one_trains(one, launcher):
    run_dir, alone = one
    together = train(run_dir, launcher, 2)
    assert alone.keys() == together.keys()
    assert all((alone[name] - together[name]).abs().max() < 1e-5 for name in alone)
    assert any(tensor.abs().max() > 1e-5 for name, tensor in alone.items() if "lora_B" in name), "nothing was trained"


def test_a_group_split_over_two_processes_is_one_group(one):
    """Its completions stand together in the file, and what is said of the step is of all of them."""
    run_dir, _ = one
    assert run("sasrec", run_dir, run_dir / "base") == 0
    launch("gloo", "grpo", run_dir, "--per_device_train_batch_size", "2")  # groups of four
    log = json.loads((run_dir / "grpo" / "trainer_state.json").read_text())["log_history"]
    for step in (1, 2, 3):
        found = pyarrow.parquet.read_table(run_dir / "grpo" / "completions" / f"completions_{step:05d}.parquet")
        columns = found.to_pydict()
        assert len(columns["step"]) == 4
        assert len({str(prompt) for prompt in columns["prompt"]}) == 1
        assert np.mean([outcome == "malformed" for outcome in columns["outcome"]]) == log[step - 1]["outcome/malformed"]
        assert log[step - 1]["groups/without_hit"] == float("hit" not in columns["outcome"])
        assert log[step - 1]["groups/without_variance"] == log[step - 1]["frac_reward_zero_std"]


def test_sasrec_by_two_processes_is_that_by_one(one):
    """The gradients are those of the whole batch, whoever has which rows; every process draws the same negatives."""
    run_dir, _ = one
    flags = ["--epochs", "2", "--dropout", "0", "--loss", "sampled_softmax", "--num_negatives", "64"]
    flags += ["--batch_size", "37", "--validation_steps", "4", "--baselines", "popularity", "--lists", "uniform"]
    flags += ["--weight_decay", "0.01"]  # which would weigh twice as much beside half a gradient
    found, losses = {}, {}
    for launcher in ("one", "gloo"):
        shutil.rmtree(run_dir / "sasrec", ignore_errors=True)
        shutil.rmtree(run_dir / "eval", ignore_errors=True)
        launch(launcher, "sasrec", run_dir, *flags)
        found[launcher] = load_file(run_dir / "sasrec" / "model.safetensors")
        rows = [json.loads(line) for line in (run_dir / "sasrec" / "log.jsonl").read_text().splitlines()]
        losses[launcher] = [row["loss"] for row in rows]
        assert (run_dir / "eval" / "sasrec" / "metrics.json").exists()
    assert found["one"].keys() == found["gloo"].keys()
    for name, weights in found["one"].items():
        if name != "model.input_norm.weight":  # not used before norms, and decayed by several processes only
            # A bias of the keys changes no attention: its gradient is rounding, which Adam scales up to whole steps.
            atol = 1e-3 if name.endswith("query_key_value.bias") else 1e-6
            assert np.allclose(weights, found["gloo"][name], atol=atol), name
    assert losses["gloo"] == pytest.approx(losses["one"], rel=1e-5)
    assert any((weights != found["gloo"][name]).any() for name, weights in found["one"].items()), "it was one process"
