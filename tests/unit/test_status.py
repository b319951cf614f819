"""The tree of a run: fresh, stale, unfinished, running, missing."""

from pathlib import Path

import pytest

from twice_rec.locks import writing
from twice_rec.manifest import Manifest, launcher_of, redo_command
from twice_rec.recipe import Recipe
from twice_rec.run import StageRun
from twice_rec.stages.command_line import STAGES, main
from twice_rec.stages.status import tree


def stage(run_dir, name, folder, inputs, text="x", finish=True):
    recipe = Recipe(run_dir=str(run_dir), domain="D", seed=0, overwrite=True)
    with StageRun(recipe, name, folder, inputs) as run:
        run.begin()
        (run.path / "out.txt").write_text(text)
        if finish:
            run.finish([run.path / "out.txt"], {})
    return run.path / "out.txt"


@pytest.fixture
def run_dir(tmp_path):
    data = stage(tmp_path, "prepare", "data", [])
    accepted = stage(tmp_path, "rationales", "rationales", [data])
    sft = stage(tmp_path, "sft", "sft", [data, accepted])
    stage(tmp_path, "evaluate", "eval/base", [data])
    answers = stage(tmp_path, "evaluate", "eval/stage2", [data, sft])
    stage(tmp_path, "judge", "judge/stage2", [data, answers])
    stage(tmp_path, "grpo", "grpo_B", [data, sft])
    stage(tmp_path, "sft", "sft_short", [data, accepted])
    return tmp_path


def told(run_dir):
    """Name -> the first word about it, and depth."""
    lines = [line for line in tree(run_dir) if line[2 : 2 + 20].strip()]
    return {line.split()[0]: (line.split()[1].strip(":;"), (len(line) - len(line.lstrip())) // 2) for line in lines}


def test_each_result_is_below_what_it_rests_on(run_dir):
    assert told(run_dir) == {
        "data": ("fresh", 1),
        "rationales": ("fresh", 2),
        "sft": ("fresh", 3),
        "eval/stage2": ("fresh", 4),
        "judge/stage2": ("fresh", 5),
        "grpo_B": ("fresh", 4),
        "eval/stage3_B": ("missing", 5),
        "grpo": ("missing", 4),
        "sft_short": ("fresh", 3),
        "eval/stage2_short": ("missing", 4),
        "sasrec": ("missing", 2),
        "eval/base": ("fresh", 2),
        "report": ("missing", 1),
    }
    text = " ".join(" ".join(tree(run_dir)).split())
    assert "missing; make it: bash grpo_step2.sh RECIPE --run_dir" in text
    assert "--variants stage3_B" in text


def test_stale_running_unfinished_and_gone(run_dir, capsys):
    stage(run_dir, "rationales", "rationales", [run_dir / "data" / "out.txt"], "others")
    stage(run_dir, "sasrec", "sasrec", [run_dir / "data" / "out.txt"], finish=False)
    (run_dir / "eval" / "base" / "out.txt").unlink()
    with writing(run_dir / "grpo_B"):
        assert main(["status", str(run_dir)]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert all(len(line) <= 100 for line in lines)
    text = " ".join(shown.split())
    assert "sft stale: it rests on rationales/out.txt, which has changed since" in text
    assert "redo it: bash sft.sh --overwrite true" in text
    assert "grpo_B running: process" in text
    assert "sasrec unfinished; finish it: bash sasrec.sh" in text
    assert "eval/base fresh, but eval/base/out.txt is gone" in text
    assert "judge/stage2 stale: it rests on rationales/out.txt" in text


def test_what_is_missing_beside_a_link_is_made_in_the_folder_that_has_the_link(run_dir, tmp_path, monkeypatch):
    recipes = Path(__file__).parents[2] / "recipes" / "tiny"
    command = ["twice_rec", "prepare", str(recipes / "prepare.yaml")]
    monkeypatch.setattr("sys.argv", command)
    stage(run_dir, "prepare", "data", [])
    other = tmp_path / "other"
    other.mkdir()
    (other / "data").symlink_to("../data")
    text = " ".join(" ".join(tree(other)).split())
    assert f"recipes/tiny/sft.yaml --run_dir {other}" in text
    monkeypatch.setattr("sys.argv", [*command, "--run_dir", str(run_dir)])
    stage(run_dir, "prepare", "data", [], "changed")
    assert f"--run_dir {run_dir} --overwrite" in redo_command(other / "data", Manifest.load(other / "data"))


def test_a_report_is_stale_once_something_is_newer(run_dir):
    base = run_dir / "eval" / "base" / "out.txt"
    recipe = Recipe(run_dir=str(run_dir), domain="D", seed=0)
    with StageRun(recipe, "report", "report", [base]) as run:
        run.path.mkdir()
        run.finish([], {})
    assert told(run_dir)["report"][0] == "fresh"
    stage(run_dir, "evaluate", "eval/oracle", [run_dir / "data" / "out.txt"])
    assert "stale: eval/oracle is newer; redo it: bash report.sh" in " ".join(" ".join(tree(run_dir)).split())


@pytest.mark.parametrize(
    ("words", "says"), [([], "found nothing"), (["a", "b"], "found a b"), (["nowhere"], "nowhere")]
)
def test_what_is_no_run_is_named(words, says, capsys):
    assert main(["status", *words]) == 2
    assert says in capsys.readouterr().err


def test_commands_name_the_launchers_that_there_are():
    assert {name: launcher_of(name) for name in STAGES if name != "serve"} == {
        name: launcher for name, (_, launcher, _) in STAGES.items() if name != "serve"
    }
