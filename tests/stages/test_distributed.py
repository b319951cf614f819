"""Two data-parallel processes train what one trains with the same global batch."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from stages.pipeline import ROOT, run, words

pytestmark = pytest.mark.slow


def train(run_dir, processes, *flags):
    """Stage 2 with so many processes (gloo); the adapter it saved."""
    shutil.rmtree(run_dir / "sft", ignore_errors=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--master_port", str(port), "-m", "twice_rec.stages.stage2_sft"]
    command += words("sft", run_dir, run_dir / "base", *flags)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return load_file(run_dir / "sft" / "adapter_model.safetensors")


def test_two_processes_train_what_one_trains(tmp_path):
    for stage in ("prepare", "base", "rationales"):
        assert run(stage, tmp_path, tmp_path / "base") == 0
    flags = ["--use_peft", "true", "--max_steps", "3", "--save_steps", "9", "--sample_every", "null"]
    one = train(tmp_path, 1, *flags, "--per_device_train_batch_size", "4")
    two = train(tmp_path, 2, *flags, "--per_device_train_batch_size", "2")
    assert one.keys() == two.keys()
    assert all((one[name] - two[name]).abs().max() < 1e-5 for name in one)
