"""How stages start and stop: launchers, the rollout server's command, outputs that cannot be written, wandb."""

import errno
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from servers.processes import free_port, is_alive
from stages.pipeline import ROOT, run
from twice_rec.errors import InputError
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.grpo.rollout import vllm_command
from twice_rec.grpo.rollout.vllm_client import base_name
from twice_rec.recipe_reader import load_recipe
from twice_rec.stages import stage0_prepare, stage3b_serve

pytestmark = pytest.mark.slow

STAGE_LAUNCHERS = sorted(
    path.name for path in ROOT.glob("*.sh")
    if path.name not in ("install.sh", "test.sh", "reproduce.sh", "launch.sh", "model.sh")
)  # fmt: skip


@pytest.fixture
def prepared(tmp_path):
    run_dir = tmp_path / "tiny"
    assert run("prepare", run_dir, None) == 0
    return run_dir


def launch(cwd, *words):
    return subprocess.run(["bash", *words], cwd=cwd, capture_output=True, text=True, check=False, timeout=300)


def test_the_launcher_of_models_says_what_it_takes(tmp_path):
    done = launch(tmp_path, str(ROOT / "model.sh"), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: twice-rec model NAME [hub | package]" in done.stdout
    assert "NAME is one of: smollm2" in done.stdout


@pytest.mark.parametrize("name", STAGE_LAUNCHERS)
def test_launchers_work_from_anywhere_and_explain_their_keys(name, tmp_path):
    done = launch(tmp_path, str(ROOT / name), "--help")
    assert done.returncode == 0, done.stderr
    assert "--run_dir" in done.stdout
    assert "folder of all results" in done.stdout


def test_a_recipe_is_found_from_where_the_user_stands(tmp_path):
    (tmp_path / "mine.yaml").write_text("run_dir: r\ndomain: D\nseed: 1\nepoch: 3\n")
    done = launch(tmp_path, str(ROOT / "sasrec.sh"), "mine.yaml")
    assert done.returncode == 2
    assert f"{tmp_path / 'mine.yaml'}: 1 error in the recipe" in done.stderr
    assert "line 4: unknown key epoch; did you mean epochs?" in done.stderr


def test_a_launcher_goes_on_with_nothing_after_a_missing_recipe(tmp_path):
    done = launch(tmp_path, str(ROOT / "sasrec.sh"), "no_such.yaml")
    assert done.returncode != 0
    assert "no_such.yaml" in done.stderr


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system")]
)
def test_outputs_that_cannot_be_written(prepared, monkeypatch, capfd, number, words):
    before = sorted(path for path in prepared.rglob("*") if path.parts[-2] not in ("logs", ".locks"))

    def replace(source, target):
        raise OSError(number, os.strerror(number), str(target))

    monkeypatch.setattr(os, "replace", replace)
    flags = ("--epochs", "1", "--hidden_size", "16", "--baselines", "[]")
    assert run("sasrec", prepared, None, *flags) == 1
    monkeypatch.undo()
    error = capfd.readouterr().err
    assert words in error
    assert "make room or choose another --run_dir" in error
    assert "Traceback" not in error
    files = [path for path in prepared.rglob("*") if path.is_file() and path.parts[-2] not in ("logs", ".locks")]
    assert set(files) <= set(before), "something half-written is left"
    assert run("sasrec", prepared, None, *flags) == 0


def test_another_error_of_the_system_has_its_trace_in_the_log(prepared, monkeypatch, capfd):
    def replace(source, target):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))

    monkeypatch.setattr(os, "replace", replace)
    assert run("sasrec", prepared, None, "--epochs", "1", "--hidden_size", "16", "--baselines", "[]") == 1
    monkeypatch.undo()
    assert "make room" not in capfd.readouterr().err
    log = (prepared / "logs" / "sasrec.log").read_text()
    assert "sasrec failed" in log
    assert "Input/output error" in log.splitlines()[-1]


def test_wandb_offline_needs_no_account(prepared):
    script = (
        "import pathlib, sys; from stages.pipeline import run; "
        "sys.exit(run('sasrec', pathlib.Path(sys.argv[1]), None, *sys.argv[2:]))"
    )
    flags = ["--wandb", "offline", "--epochs", "2", "--baselines", "[]"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(prepared), *flags],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (prepared / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))


def grpo_recipe(*flags):
    path = ROOT / "recipes" / "grocery" / "grpo.yaml"
    return load_recipe(path, GRPORecipe, ["--bf16", "false", "--use_cpu", "true", *flags])


def server_flags(tmp_path, *flags):
    """The flags of the only server's command line."""
    merged = tmp_path / "sft" / "merged"
    merged.mkdir(parents=True, exist_ok=True)
    (merged / "config.json").write_text("{}")
    recipe = grpo_recipe("--run_dir", str(tmp_path), *flags)
    command = vllm_command.server_command(recipe, recipe.rollout_servers[0], merged)
    given = dict(itertools.pairwise(command))
    assert given["--model"] == str(merged)
    assert given["--served-model-name"] == base_name(merged)
    assert given["--generation-config"] == "vllm"  # sampling values come from the trainer, not from the model's files
    return command, given


def test_the_server_takes_model_and_address_from_the_recipe(tmp_path):
    command, given = server_flags(tmp_path, "--rollout_servers", "[10.0.0.1:9000]", "--rollout_executor", "ray")
    assert (given["--host"], given["--port"]) == ("10.0.0.1", "9000")
    assert (given["--max-model-len"], given["--distributed-executor-backend"]) == ("10300", "ray")
    assert (given["--max-lora-rank"], given["--max-loras"]) == ("8", "2")
    assert "--enable-lora" in command
    more = "{max_num_seqs: 64, enforce_eager: true, enable_prefix_caching: false, compilation_config: {mode: 0}}"
    command, given = server_flags(tmp_path, "--lora_r", "33", "--rollout_server_args", more)
    assert (given["--max-lora-rank"], given["--max-num-seqs"]) == ("64", "64")
    assert "--enforce-eager" in command
    assert "--no-enable-prefix-caching" in command
    assert "--enable-prefix-caching" not in command
    assert json.loads(given["--compilation-config"]) == {"mode": 0}


def test_trls_own_server_gets_weights_by_nccl_and_no_adapters(tmp_path):
    command, given = server_flags(tmp_path, "--rollout", "trl_server", "--use_peft", "false")
    assert json.loads(given["--weight-transfer-config"]) == {"backend": "nccl"}
    assert "--enable-lora" not in command


def test_servers_of_one_machine_share_its_gpus(monkeypatch):
    recipe = grpo_recipe("--rollout_tensor_parallel_size", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    first, second = (vllm_command.server_environment(recipe, number, 2) for number in (0, 1))
    assert (first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]) == ("4,5", "6,7")
    assert vllm_command.server_environment(recipe, 0, 1)["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
    assert first["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def test_a_machine_starts_its_own_servers_only():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port} is taken by another program"):
            vllm_command.addresses_here([f"127.0.0.1:{port}"])
    assert vllm_command.addresses_here(["192.0.2.1:8000", f"127.0.0.1:{port}"]) == [f"127.0.0.1:{port}"]
    with pytest.raises(InputError, match="none of rollout_servers \\(192.0.2.1:8000\\) is an address of this machine"):
        vllm_command.addresses_here(["192.0.2.1:8000"])


# Takes vLLM's place: it listens at its address and computes in a child process, which it does not end itself.
FAKE_SERVER = """
import multiprocessing, os, runpy, socket, sys, time
context = multiprocessing.get_context(os.environ["START_METHOD"])
started = context.Event()
sleeps = {"target": runpy.run_path, "args": (os.environ["FAKE_ENGINE"], {"started": started}), "daemon": True}
engine = context.Process(**sleeps)
engine.start()
started.wait()
listener = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])))
print(os.getpid(), engine.pid, flush=True)
time.sleep(600)
"""
LAUNCHER = """
import pathlib, sys
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.grpo.rollout.vllm_command import become_server
recipe = GRPORecipe(run_dir="r", domain="D", seed=1, rollout="vllm_server", rollout_servers=sys.argv[1:])
become_server(recipe, pathlib.Path("owner/model"), "then")
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_servers_die_with_their_launcher(tmp_path, number, method):
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(FAKE_SERVER)
    (tmp_path / "engine.py").write_text("import time\nstarted.set()\ntime.sleep(600)\n")
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}", "START_METHOD": method}
    environment["FAKE_ENGINE"] = str(tmp_path / "engine.py")
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *addresses],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    pids = [int(word) for _ in addresses for word in launcher.stdout.readline().split()]
    assert len(pids) == 4
    assert launcher.pid in pids  # it became a server itself
    assert all(is_alive(pid) for pid in pids)
    launcher.send_signal(number)
    launcher.wait(60)
    launcher.stdout.close()
    deadline = time.monotonic() + 60
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert vllm_command.addresses_here(addresses) == addresses  # the ports are free again


def test_a_server_needs_the_stage_2_model_and_vllm(tmp_path, monkeypatch, capfd):
    words = ["--config", str(ROOT / "recipes" / "grocery" / "grpo.yaml"), "--bf16", "false", "--use_cpu", "true"]
    words += ["--run_dir", str(tmp_path)]
    monkeypatch.setattr(stage3b_serve.importlib.util, "find_spec", lambda name: None)
    assert stage3b_serve.main(words) == 2
    assert "vllm is not installed; pip install -r requirements-gpu.txt" in capfd.readouterr().err
    monkeypatch.setattr(stage3b_serve.importlib.util, "find_spec", lambda name: object())
    assert stage3b_serve.main(words) == 2
    assert "it is made by sft.sh, which must run first" in capfd.readouterr().err


def test_atomic_files_of_recbole(tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    rows = [f"u{u}\ti{(u * 7 + t * (u % 3 + 1)) % 40}\t{3 + t % 3}\t{1000 + t}" for u in range(80) for t in range(6)]
    (folder / "shop.inter").write_text(
        "\n".join(["user_id:token\titem_id:token\trating:float\ttimestamp:float", *rows]) + "\n"
    )
    items = [f"i{i}\tTitle {i}\tTea Green" for i in range(40)]
    (folder / "shop.item").write_text("\n".join(["item_id:token\ttitle:token_seq\tcategories:token_seq", *items]))
    config = str(ROOT / "recipes" / "grocery" / "prepare.yaml")
    words = ["--config", config, "--source", "recbole", "--domain", "shop", "--source_dir", str(folder)]
    words += ["--run_dir", str(tmp_path / "run"), "--num_candidates", "8", "--hard_pool", "10"]
    assert stage0_prepare.main(words) == 0
    statistics = json.loads((tmp_path / "run" / "data" / "statistics.json").read_text())
    assert (statistics["users"], statistics["items"]) == (80, 40)
    first = json.loads((tmp_path / "run" / "data" / "catalog.jsonl").read_text().splitlines()[0])
    assert first["title"].startswith("Title ")
    assert run("sasrec", tmp_path / "run", None, "--domain", "shop", "--epochs", "1") == 0


@pytest.mark.parametrize(
    ("words", "environment", "line"),
    [
        (["sft.sh", "--seed", "3", "recipes/tiny/sft.yaml"], {}, "the recipe comes first"),
        (["sft.sh"], {"VENV": "/no/such"}, "/no/such has no Python; make the environment with: bash install.sh"),
        (["grpo_step2.sh"], {"ACCELERATE_CONFIG": "no.yaml"}, "ACCELERATE_CONFIG is no.yaml: no such file"),
        (["sft.sh", "--seed", "010"], {}, "--seed: seed must be a whole number, found '010'"),
        (["sasrec.sh", "--help"], {"CDPATH": "/"}, ""),
        (["install.sh", "-h"], {}, ""),
        (["install.sh", "other.txt"], {}, "other.txt: no such file of requirements; here are requirements-gpu.txt"),
        (["install.sh"], {"VENV": "/tmp/none", "PYTHON": "false"}, "Python 3.11 or later is needed, false is"),
        (["reproduce.sh", "--help"], {}, ""),
        (["test.sh", "--help"], {}, ""),
        (["reproduce.sh", "--seed", "1"], {}, "reproduce.sh takes no arguments, found --seed 1"),
        (["sft.sh", ""], {}, "the recipe is an empty word; name one, or leave it out for recipes/tiny/sft.yaml"),
        (
            ["sft.sh", "--run_dir", "README.md"],
            {},
            "run_dir is README.md: no folder can be made there (Not a directory)",
        ),
        (["base.sh"], {"VENV": "/no/such"}, "/no/such has no Python; make the environment with: bash install.sh"),
    ],
)
def test_what_a_launcher_cannot_use_is_told_in_one_line(tmp_path, words, environment, line):
    command = ["bash", str(ROOT / words[0]), *words[1:]]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == (2 if line else 0)
    assert line in done.stderr
    assert "Traceback" not in done.stderr


def test_where_there_is_a_gpu_errors_come_before_accelerate(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho GPU 0\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for words, line in (
        (["--learning_rate", "much"], "--learning_rate"),
        ([], f"{tmp_path / 'run'}/rationales/accepted.jsonl: no such file"),
    ):
        command = [
            "bash",
            str(ROOT / "sft.sh"),
            str(ROOT / "recipes/tiny/sft.yaml"),
            "--run_dir",
            str(tmp_path / "run"),
        ]
        done = subprocess.run(
            [*command, *words], env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 2
        assert line in done.stderr
        assert "Traceback" not in done.stderr


def test_a_check_writes_no_results(prepared):
    before = sorted(prepared.rglob("*.json*"))
    assert run("sasrec", prepared, None, "--check") == 0
    assert sorted(prepared.rglob("*.json*")) == before
    assert not (prepared / "sasrec").exists()


def test_sasrec_refuses_what_it_could_not_rank_or_export_before_it_trains(prepared, tmp_path, capsys):
    assert run("prepare", prepared, None, "--candidate_lists", "uniform", "--overwrite", "true") == 0
    (tmp_path / "file").touch()
    for flags, line in (
        (("--lists", "hard"), "has the lists uniform, not hard"),
        (("--export_scores", str(tmp_path)), "where no file can be written"),
        (("--export_scores", str(tmp_path / "file" / "scores.npz")), "where no file can be written"),
    ):
        assert run("sasrec", prepared, None, "--lists", "full", *flags) == 2
        assert line in capsys.readouterr().err
        assert not (prepared / "sasrec").exists()


def test_a_check_of_finished_results_writes_nothing_either(prepared, tmp_path):
    flags = ("--epochs", "1", "--hidden_size", "16", "--baselines", "[]")
    assert run("sasrec", prepared, None, *flags) == 0
    before = sorted(prepared.rglob("*.*"))
    assert run("sasrec", prepared, None, *flags, "--export_scores", str(tmp_path / "scores.npz"), "--check") == 0
    assert run("report", prepared, None, "--check") == 0
    assert run("serve", prepared, None, "--check") == 0
    assert {path.name for path in set(prepared.rglob("*.*")) - set(before)} <= {"report.log", "serve.log"}
    assert not (tmp_path / "scores.npz").exists()
