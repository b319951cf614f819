"""A study's processes: at the same time, behind each other, failing, ended; here they are one-line scripts."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from servers.processes import is_alive
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.recipe import Recipe
from twice_rec.recipe_reader import load_recipe
from twice_rec.study import runner as module
from twice_rec.study.places import Places
from twice_rec.study.plan import Run
from twice_rec.study.runner import DONE, FAILED, SKIPPED, STOPPED, THERE, Runner
from twice_rec.study.tables import result_table

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, eq=False)
class Script(Run):
    """A run whose process is a line of bash."""

    text: str = "true"
    server: str = ""

    def command(self, *more):
        return ["bash", "-c", self.text, *more]

    def server_command(self, *more):
        return ["bash", "-c", self.server]


def script(run_dir, name, text="true", needs=(), finishes=True, **more):
    """A run that makes the folder NAME and needs others; `finishes`: it writes a manifest, at once."""
    if finishes:
        text = f"mkdir -p {run_dir}/{name}; echo > {run_dir}/{name}/manifest.json; {text}"
    recipe = more.pop("recipe", None) or Recipe(run_dir=str(run_dir), domain="D", seed=1)
    made = (run_dir / name,)
    return Script("", 1, "grpo", name, recipe, (), made, tuple(run_dir / n for n in needs), text=text, **more)


def study(tmp_path, runs, places=None):
    return Runner(runs, places or Places((), 2, 1), tmp_path / "study")


def states(runner):
    return {row.run.what: row.state for row in runner.rows}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "_PAUSE", 0.02)


def test_runs_go_behind_what_they_need_and_as_many_at_once_as_there_are_places(tmp_path):
    log = tmp_path / "order"
    a_and_b_wait_for_each_other = "until [ $(grep -c 'begin [ab]' {log}) = 2 ]; do sleep 0.02; done; "
    runs = []
    for name, needs in {"a": (), "b": (), "c": (), "d": ("a", "b")}.items():
        meets = a_and_b_wait_for_each_other.format(log=log) if name in "ab" else ""
        runs.append(script(tmp_path, name, f"echo begin {name} >> {log}; {meets}echo end {name} >> {log}", needs))
    runner = study(tmp_path, runs)
    runner.run()
    assert states(runner) == dict.fromkeys("abcd", DONE)
    lines = log.read_text().splitlines()
    running = [sum(1 if line.startswith("begin") else -1 for line in lines[: n + 1]) for n in range(len(lines))]
    assert max(running) == 2
    assert lines.index("begin d") > max(lines.index("end a"), lines.index("end b"))


def test_a_failed_run_ends_what_needs_it_and_nothing_else(tmp_path, caplog):
    caplog.set_level("INFO", "study")
    log = tmp_path / "study" / "logs" / "seed1_grpo_a.log"
    log.parent.mkdir(parents=True)
    log.write_text("error: of an earlier try\n")
    runs = [
        script(tmp_path, "a", "echo one; echo 'error: the disk is full'; echo '  what to do'; exit 1"),
        script(tmp_path, "b", needs=["a"]),
        script(tmp_path, "c", needs=["b"]),
        script(tmp_path, "d"),
        script(tmp_path, "e", "kill -9 $$"),
        script(tmp_path, "f", "exit 2"),
        script(
            tmp_path, "g", "echo error: g failed; echo 'Traceback (most recent call last):'; echo KeyError: 3; false"
        ),
        script(tmp_path, "report", reports_on=(tmp_path,)),
    ]
    runner = study(tmp_path, runs)
    rows = {row.run.what: row for row in runner.run()}
    assert states(runner) == {
        "a": FAILED, "b": SKIPPED, "c": SKIPPED, "d": DONE, "e": FAILED, "f": FAILED, "g": FAILED,
        "report": DONE,
    }  # fmt: skip
    assert rows["a"].says == "the disk is full"
    assert rows["b"].says == "needs seed 1 grpo a, which failed"
    assert rows["c"].says == "needs seed 1 grpo b, which was skipped"
    assert rows["e"].says == "ended by signal 9: it wrote nothing"
    assert rows["f"].says == "it wrote nothing"
    assert rows["g"].says == "KeyError: 3"
    assert log.read_text().splitlines()[:2] == ["error: of an earlier try", "one"]
    assert "[8/8] seed 1 grpo report done in" in caplog.text
    table = result_table(runner.rows)
    assert "the disk is full" in table
    kept = json.loads((tmp_path / "study" / "study.json").read_text())["runs"]
    assert {row["what"]: row["state"] for row in kept} == states(runner)
    assert kept[0]["says"] == "the disk is full"
    assert Path(kept[0]["log"]) == log


def test_the_report_that_sums_up_is_told_which_domains_have_one(tmp_path):
    def of_domain(domain, text, **more):
        folder = tmp_path / domain
        recipe = Recipe(run_dir=str(folder), domain=domain, seed=1)
        return Script(
            domain, 1, "report", domain, recipe, (), (folder / "report",), (), text=text, reports_on=(folder,), **more
        )

    first = of_domain("A", f"echo $0 $1 $2 $3 > {tmp_path}/told", sums_up=True)
    runner = study(tmp_path, [of_domain("B", "true"), of_domain("C", "exit 2"), of_domain("D", "true"), first])
    runner.run()
    assert states(runner) == {"B": THERE, "C": FAILED, "D": THERE, "A": THERE}
    there = f'["{tmp_path}/B/report", "{tmp_path}/D/report"]'
    assert (tmp_path / "told").read_text() == f'--domain_reports {there} --missing_domains ["C"]\n'
    kept = json.loads((tmp_path / "study" / "study.json").read_text())["runs"][-1]
    assert kept["command"][-4:] == ["--domain_reports", there, "--missing_domains", '["C"]']


def test_what_is_finished_already_is_told_from_what_was_done(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    manifest = tmp_path / "old" / "manifest.json"
    manifest.write_text("{}")
    os.utime(manifest, (1000, 1000))
    runs = [script(tmp_path, "old", finishes=False), script(tmp_path, "new")]
    runner = study(tmp_path, runs)
    runner.run()
    assert states(runner) == {"old": THERE, "new": DONE}
    assert [row.seconds is None for row in runner.rows] == [True, False]


def test_each_run_has_its_share_of_the_machine(tmp_path):
    text = "echo $OMP_NUM_THREADS $CUDA_VISIBLE_DEVICES; sleep 0.3"
    runner = study(tmp_path, [script(tmp_path, n, text) for n in "abc"], Places(("0", "3"), 2, 4))
    runner.run()
    told = [row.log.read_text().split() for row in runner.rows]
    assert [threads for threads, _ in told] == ["4"] * 3
    assert {told[0][1], told[1][1]} == {"0", "3"}


def test_ctrl_c_ends_the_processes_and_the_next_study_goes_on(tmp_path):
    ends = (
        f"trap 'echo ended >> {tmp_path}/ended; exit 130' INT; echo up >> {tmp_path}/up; while :; do sleep 0.05; done"
    )
    runs = [script(tmp_path, "a", ends), script(tmp_path, "b", ends), script(tmp_path, "c")]
    runner = study(tmp_path, runs)

    def interrupt():
        while not (tmp_path / "up").exists() or (tmp_path / "up").read_text().count("up") < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    assert (tmp_path / "ended").read_text().count("ended") == 2
    assert states(runner) == {"a": STOPPED, "b": STOPPED, "c": "waiting"}
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    again = study(tmp_path, [script(tmp_path, n) for n in "abc"])
    again.run()
    assert states(again) == dict.fromkeys("abc", DONE)


def test_a_study_that_is_killed_leaves_no_process(tmp_path):
    code = f"""
from pathlib import Path
import sys
sys.path[:0] = [{str(ROOT / "src")!r}, {str(ROOT / "tests")!r}]
from unit.test_study_runner import script, study
study(Path({str(tmp_path)!r}), [script(Path({str(tmp_path)!r}), "a", "echo $$ > {tmp_path}/pid; exec sleep 300")]).run()
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    pid = tmp_path / "pid"
    deadline = time.monotonic() + 300
    while not pid.exists() or not pid.read_text().strip():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    while is_alive(int(pid.read_text())):
        assert time.monotonic() < deadline, "the run outlived its study"
        time.sleep(0.05)


def served(tmp_path, text, server):
    flags = ["--run_dir", str(tmp_path)]
    recipe = load_recipe(ROOT / "recipes" / "tiny" / "grpo_server.yaml", GRPORecipe, flags)
    return script(tmp_path, "grpo_server", text, recipe=recipe, server=server)


def test_rollout_servers_run_beside_their_run_and_end_with_it(tmp_path):
    server = f"trap 'echo > {tmp_path}/stopped; exit 0' TERM; echo > {tmp_path}/up; while :; do sleep 0.05; done"
    trainer = f"until [ -f {tmp_path}/up ]; do sleep 0.05; done"
    runner = study(tmp_path, [served(tmp_path, trainer, server)])
    runner.run()
    assert states(runner) == {"grpo_server": DONE}
    assert (tmp_path / "stopped").exists()


def test_a_server_that_ends_ends_its_run(tmp_path):
    runner = study(tmp_path, [served(tmp_path, "sleep 300", "echo 'error: no memory'; exit 1")])
    (row,) = runner.run()
    assert (row.state, row.says) == (FAILED, "its rollout server ended: no memory")
    assert row.processes[0].poll() is not None


def test_a_link_that_cannot_be_made_is_a_failed_run(tmp_path):
    (tmp_path / "seed2" / "data").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    recipe = Recipe(run_dir=str(tmp_path / "seed2"), domain="D", seed=2)
    run = Script("", 2, "sft", "x", recipe, (), (), (), {"data": tmp_path / "data"})
    (row,) = study(tmp_path, [run]).run()
    assert row.state == FAILED
    assert "hold different results" in row.says
