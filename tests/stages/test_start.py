"""How stages start and stop: launchers, the rollout server's command, outputs that cannot be written, wandb."""

import errno
import itertools
import json
import os
import subprocess
import sys

import pytest

from stages.pipeline import ROOT, run
from twice_rec import artifacts
from twice_rec.stages import stage0_prepare, stage3b_serve

pytestmark = pytest.mark.slow

STAGE_LAUNCHERS = sorted(
    path.name for path in ROOT.glob("*.sh") if path.name not in ("install.sh", "test.sh", "reproduce.sh")
)


@pytest.fixture
def prepared(tmp_path):
    run_dir = tmp_path / "tiny"
    assert run("prepare", run_dir, None) == 0
    return run_dir


def launch(cwd, *words):
    return subprocess.run(["bash", *words], cwd=cwd, capture_output=True, text=True, check=False, timeout=300)


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
    before = sorted(path for path in prepared.rglob("*") if path.parts[-2] != "logs")

    def replace(source, target):
        raise OSError(number, os.strerror(number), str(target))

    monkeypatch.setattr(artifacts.os, "replace", replace)
    flags = ("--epochs", "1", "--hidden_size", "16", "--baselines", "[]")
    assert run("sasrec", prepared, None, *flags) == 1
    monkeypatch.undo()
    error = capfd.readouterr().err
    assert words in error
    assert "make room or choose another --run_dir" in error
    assert "Traceback" not in error
    files = [path for path in prepared.rglob("*") if path.is_file() and path.parts[-2] != "logs"]
    assert set(files) <= set(before), "something half-written is left"
    assert run("sasrec", prepared, None, *flags) == 0


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
    return stage3b_serve.load(str(path), ["--bf16", "false", "--use_cpu", "true", *flags])


def test_the_server_takes_model_host_and_port_from_the_recipe(tmp_path):
    merged = tmp_path / "sft" / "merged"
    merged.mkdir(parents=True)
    flags = ["--run_dir", str(tmp_path), "--rollout_host", "10.0.0.1", "--rollout_port", "9000"]
    recipe, _ = grpo_recipe(*flags)
    command = stage3b_serve.server_command(recipe)
    given = dict(itertools.pairwise(command))
    assert given["--model"] == str(merged)
    assert (given["--host"], given["--port"]) == ("10.0.0.1", "9000")
    assert given["--max-model-len"] == "10300"
    assert given["--generation-config"] == "vllm"  # sampling values come from the trainer, not from the model's files
    assert json.loads(given["--weight-transfer-config"]) == {"backend": "nccl"}


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
    words = ["--config", config, "--source", "atomic", "--domain", "shop", "--source_dir", str(folder)]
    words += ["--run_dir", str(tmp_path / "run"), "--num_candidates", "8", "--hard_pool", "10"]
    assert stage0_prepare.main(words) == 0
    statistics = json.loads((tmp_path / "run" / "data" / "statistics.json").read_text())
    assert (statistics["users"], statistics["items"]) == (80, 40)
    first = json.loads((tmp_path / "run" / "data" / "catalog.jsonl").read_text().splitlines()[0])
    assert first["title"].startswith("Title ")
    assert run("sasrec", tmp_path / "run", None, "--domain", "shop", "--epochs", "1") == 0
