"""Training on several GPUs and machines: what the launchers and the Slurm jobs start, with stand-ins for all of it."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from servers.processes import free_port

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes/accelerate_configs"
JOBS = sorted((ROOT / "recipes/slurm").glob("*.sbatch"))
STAND_INS = {
    "venv/bin/python": 'echo "python $* [$CUDA_VISIBLE_DEVICES][$ACCELERATE_CONFIG]"',
    "venv/bin/accelerate": 'echo "accelerate $* [$CUDA_VISIBLE_DEVICES]"',
    "bin/scontrol": "printf 'node1\\nnode2\\n'",
    # Runs the command once on each of its machines, or on the one that --nodelist names.
    "bin/srun": """nodes="0 1"
        while [[ $1 == --* ]]; do [[ $1 != --nodelist=* ]] || nodes=$((${1##*node} - 1)); shift; done
        for node in $nodes; do echo "on machine $node"; SLURM_NODEID=$node "$@"; done""",
    "bin/nvidia-smi": "exit 1",
}


@pytest.fixture
def start(tmp_path):
    """Runs a script of the repository with the stand-ins; returns what they were called with."""
    for name, text in STAND_INS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def run(*words, **variables):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "SLURM", "CUDA"))}
        environment |= {"VENV": str(tmp_path / "venv"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        environment |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node[1-2]", **variables}
        done = subprocess.run(
            ["bash", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.replace(f"{ROOT}/", "").splitlines()

    return run


@pytest.mark.parametrize(
    ("name", "processes", "machines"), [("gpus_2", 2, 1), ("gpus_4", 4, 1), ("gpus_8", 8, 1), ("two_nodes", 8, 2)]
)
def test_a_launcher_starts_the_processes_of_the_config(start, name, processes, machines):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.num_processes, config.num_machines, config.distributed_type) == (processes, machines, "MULTI_GPU")
    path = f"recipes/accelerate_configs/{name}.yaml"
    checked, started = start("sft.sh", "recipes/grocery/sft.yaml", "--seed", "1", ACCELERATE_CONFIG=path)
    words = "-m twice_rec sft recipes/grocery/sft.yaml --seed 1"
    assert checked.startswith(f"python {words} --check ")
    assert started == f"accelerate launch --quiet --config_file {path} {words} []"


@pytest.mark.parametrize(("name", "processes"), [("gpus_2", 2), ("gpus_8", 8), ("two_nodes", 8)])
def test_accelerate_itself_starts_them(name, processes, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text("import os; os.write(1, '{RANK} of {WORLD_SIZE}\\n'.format(**os.environ).encode())\n")
    command = ["accelerate", "launch", "--quiet", "--config_file", str(CONFIGS / f"{name}.yaml")]
    command += ["--main_process_port", str(free_port())]
    machines = [["--machine_rank", "0"], ["--machine_rank", "1"]] if name == "two_nodes" else [[]]
    where = ["--main_process_ip", "127.0.0.1"] if name == "two_nodes" else []
    started = [
        subprocess.Popen([*command, *where, *rank, str(script)], stdout=subprocess.PIPE, text=True) for rank in machines
    ]
    shown = [line for process in started for line in process.communicate(timeout=300)[0].splitlines()]
    assert sorted(shown) == [f"{rank} of {processes}" for rank in range(processes)]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_config(path):
    config = load_config_from_file(str(path))
    assert config.distributed_type in ("NO", "MULTI_GPU", "DEEPSPEED")
    assert config.mixed_precision == ("bf16" if config.distributed_type == "DEEPSPEED" else "no")


def test_flags_of_accelerate_go_through_and_the_second_machine_does_not_check(start):
    variables = {"ACCELERATE_CONFIG": "recipes/accelerate_configs/two_nodes.yaml"}
    flags = "--machine_rank {} --main_process_ip node1 --main_process_port 29500"
    first = start("sft.sh", ACCELERATE_FLAGS=flags.format(0), **variables)
    second = start("sft.sh", ACCELERATE_FLAGS=flags.format(1), **variables)
    assert len(first) == 2
    assert [flags.format(rank) in lines[-1] for rank, lines in enumerate((first, second))] == [True, True]
    assert second[0].startswith("accelerate launch")


def test_a_dry_run_starts_no_accelerate_but_knows_its_config(start):
    path = "recipes/accelerate_configs/gpus_4.yaml"
    (line,) = start("grpo_step2.sh", "recipes/grocery/grpo.yaml", "--dry_run", ACCELERATE_CONFIG=path)
    assert line == f"python -m twice_rec grpo recipes/grocery/grpo.yaml --dry_run [][{path}]"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_jobs_are_sound_and_name_what_exists(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    subprocess.run(["shellcheck", "--shell=bash", str(path)], check=True)
    text = path.read_text()
    for word in re.findall(r"[\w/.]+\.(?:sh|yaml|sbatch)\b", text):
        assert (ROOT / word).is_file(), word
    first, *lines = text.splitlines()
    assert first == "#!/usr/bin/env bash"
    heads = [line for line in lines if line.startswith("#SBATCH")]
    assert lines[: len(heads)] == heads  # Slurm reads them before the first command only
    for option in ("job-name", "nodes", "ntasks-per-node", "cpus-per-task", "mem", "time", "output", "requeue"):
        assert any(line.startswith(f"#SBATCH --{option}") for line in heads), option
    assert f"sbatch recipes/slurm/{path.name} [RECIPE]" in text
    assert "set -euo pipefail" in text


def test_there_is_a_job_for_every_stage():
    launchers = {word for path in JOBS for word in re.findall(r"bash (\w+\.sh)", path.read_text())}
    stages = {path.name for path in ROOT.glob("*.sh") if 'launch.sh" ' in path.read_text()}
    stages -= {"base.sh", "ab_test.sh", "share.sh"}  # which need no job: they take seconds or are for the tiny recipes
    assert launchers == stages


@pytest.mark.parametrize("name", ["prepare", "rationales", "sasrec", "evaluate", "report", "study"])
def test_a_simple_job_starts_its_stage(start, name):
    (line,) = start(f"recipes/slurm/{name}.sbatch")
    assert line.startswith(f"python -m twice_rec {name} recipes/grocery/{name}.yaml ")
    (line,) = start(f"recipes/slurm/{name}.sbatch", f"recipes/amazon/{name}.yaml", "--seed", "1")
    assert line.startswith(f"python -m twice_rec {name} recipes/amazon/{name}.yaml --seed 1 ")


def test_the_job_of_stage_2(start):
    _, started = start("recipes/slurm/sft.sbatch")
    config = "--config_file recipes/accelerate_configs/gpus_4.yaml"
    assert started == f"accelerate launch --quiet {config} -m twice_rec sft recipes/grocery/sft_4gpus.yaml []"


def test_the_job_of_stage_2_on_two_machines(start):
    lines = start("recipes/slurm/sft_two_nodes.sbatch", "recipes/grocery/sft_8gpus.yaml", "--seed", "1")
    started = [line for line in lines if line.startswith("accelerate")]
    for rank, line in enumerate(started):
        assert f"two_nodes.yaml --machine_rank {rank} --main_process_ip node1 --main_process_port 29500 -m" in line
        assert line.endswith("sft recipes/grocery/sft_8gpus.yaml --seed 1 []")
    assert len(started) == 2
    assert sum("--check" in line for line in lines) == 1


def test_the_job_of_stage_3_shares_the_gpus_of_a_machine(start):
    lines = start("recipes/slurm/grpo.sbatch")
    assert "python -m twice_rec serve recipes/grocery/grpo_8gpus.yaml [0,1,2,3][]" in lines
    config = "--config_file recipes/accelerate_configs/gpus_4.yaml"
    assert f"accelerate launch --quiet {config} -m twice_rec grpo recipes/grocery/grpo_8gpus.yaml [4,5,6,7]" in lines


def test_the_job_of_stage_3_on_two_machines(start):
    lines = start("recipes/slurm/grpo_two_nodes.sbatch", "recipes/grocery/grpo_two_nodes.yaml", "--seed", "1")
    servers = " ".join(f"node2:{port}" for port in range(8000, 8008))
    words = f"recipes/grocery/grpo_two_nodes.yaml --seed 1 --rollout_servers {servers}"
    assert f"python -m twice_rec serve {words} [][]" in lines
    config = "--config_file recipes/accelerate_configs/gpus_8.yaml"
    assert f"accelerate launch --quiet {config} -m twice_rec grpo {words} []" in lines
    assert {"on machine 0", "on machine 1"} <= set(lines)
