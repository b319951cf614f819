"""Judges behind a server that misbehaves: nothing asked twice, nothing averaged in silence, nothing given away."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from evaluated import ROOT, well_argued, write_evaluation
from servers.fault_server import completion
from twice_rec.stages import stage4b_judge

pytestmark = pytest.mark.server

RECIPE = str(ROOT / "recipes" / "tiny" / "judge.yaml")
HASTY = (
    "--concurrency",
    "16",
    "--timeout_seconds",
    "8",
    "--preflight",
    "false",
    "--backoff_seconds",
    "0.02",
    "--max_attempts",
    "20",
)
TWO = "{first: {}, second: {temperature: 0.5}}"
FEW = (*HASTY, "--variants", "stage3", "--num_judged", "20", "--judges", TWO)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@dataclass
class Run:
    """A run with an evaluation of stage 3, and its judging."""

    path: Path
    url: str

    def words(self, *flags):
        words = [RECIPE, "--run_dir", str(self.path), "--judged_by", "openai", "--model", "annotator"]
        return [*words, "--base_url", self.url, "--api_key_env", "TWICE_TEST_KEY", *flags]

    def stage(self, *flags):
        return stage4b_judge.main(self.words(*flags))

    def stored(self):
        return sum(p.read_bytes().count(b"\n") for p in self.path.glob("answers/judge_*.jsonl") if "unus" not in p.name)

    def results(self, variant="stage3"):
        return [(self.path / "judge" / variant / name).read_bytes() for name in ("verdicts.jsonl", "scores.json")]

    def scores(self, variant="stage3"):
        return json.loads((self.path / "judge" / variant / "scores.json").read_text())


@pytest.fixture(scope="module")
def evaluated(prepared, tmp_path_factory):
    """The prepared data with 60 evaluated users; some answers are malformed."""
    run_dir = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(prepared / "data", run_dir / "data")
    good = well_argued(run_dir)
    write_evaluation(run_dir, "stage3", lambda e: good(e) if e.user_id[-1] != "A" else "<think> Fine.", users=60)
    return run_dir


@pytest.fixture
def new_run(evaluated, tmp_path):
    def make(url, name="run"):
        shutil.copytree(evaluated, tmp_path / name)
        return Run(tmp_path / name, url)

    return make


@pytest.mark.slow
def test_two_judges_with_faults_and_one_that_is_killed(new_run, fault_server, api_key):
    faults = {"transport": 0.1, "content": 0.3, "key": api_key}
    many = (*HASTY, "--variants", "stage3", "--num_judged", "40", "--judges", TWO, "--max_reasks", "0")
    server = fault_server(**faults)
    whole = new_run(server.url, "whole")
    assert whole.stage(*many, "--price_per_million_input", "1") == 0
    found = rows(whole.path / "judge" / "stage3" / "verdicts.jsonl")
    assert len(found) == 40 * 3 * 2
    assert len({(row["user_id"], row["judge"], row["condition"]) for row in found}) == len(found)
    without = [row for row in found if "no_verdict" in row]
    assert without  # a reply that holds no verdict, since nothing is asked again
    assert not any("score" in row or "choice" in row for row in without)
    settled = [row for row in found if row.get("is_settled")]
    assert whole.stored() == len(found) - len(settled)  # each open question has one answer
    assert len(server.answered()) == whole.stored()
    scores = whole.scores()
    for judge in ("first", "second"):
        for condition, of in scores["judges"][judge].items():
            own = [row for row in found if (row["judge"], row["condition"]) == (judge, condition)]
            assert of["n"] + of["without_verdict"] == 40 == len(own)
            assert of["without_verdict"] == sum("no_verdict" in row for row in own)
        cost = scores["costs"][judge]
        assert cost["cost"] == pytest.approx(cost["prompt_tokens"] / 1e6, abs=1e-4)
        assert cost["completions"] == whole.stored() / 2
    assert [(of["a"], of["b"], of["condition"]) for of in scores["agreement"]] == [
        ("first", "second", "item_shown"),
        ("first", "second", "counterfactual"),
    ]

    slow = fault_server(**faults, delay=0.05)
    killed = new_run(slow.url, "killed")
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "twice_rec", "judge", *killed.words(*many, "--price_per_million_input", "1")]
    for wanted in (30, 130):  # in the first judge, in the second
        process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        deadline = time.monotonic() + 300
        while killed.stored() < wanted and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        assert process.returncode == -9, output
    assert killed.stage(*many, "--price_per_million_input", "1") == 0
    assert killed.results() == whole.results()
    assert len(slow.answered()) <= whole.stored() + 2 * 16  # under way when it was killed
    for path in [path for path in (*whole.path.rglob("*"), *killed.path.rglob("*")) if path.is_file()]:
        assert api_key.encode() not in path.read_bytes(), path


def test_answers_serve_other_settings_and_are_asked_again_for_nothing(new_run, fault_server):
    server = fault_server()
    run = new_run(server.url)
    assert run.stage(*FEW) == 0
    asked = server.answered()
    assert len(asked) == len(set(asked)) == run.stored()
    assert run.stage(*FEW, "--num_judged", "15", "--overwrite") == 0
    assert server.answered()[: len(asked)] == asked
    assert run.scores()["users"] == 15
    more = server.answered()[len(asked) :]
    assert len(more) <= 2 * 15  # the control alone may have other pairs


def test_a_judge_that_answers_nonsense_stops_the_run(new_run, fault_server, capfd):
    server = fault_server(mood="prose")
    run = new_run(server.url)
    assert run.stage(*FEW, "--concurrency", "1", "--max_failures_in_a_row", "3", "--max_reasks", "1") == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "3 rows in a row got no answer that can be used; the last: malformed answer: there is no compl" in errors[0]
    assert len(server.answered()) == 6
    assert not list(run.path.glob("judge/*"))


def test_nonsense_may_be_recorded_instead(new_run, fault_server, capfd):
    run = new_run(fault_server(mood="prose").url)
    flags = ("--max_failures_in_a_row", "1000", "--max_reasks", "0", "--conditions", "item_shown")
    assert run.stage(*FEW, *flags) == 0
    of = run.scores()["judges"]["first"]["item_shown"]
    assert of["n"] == of["settled"] < 20
    assert of["without_verdict"] == 20 - of["n"]
    assert run.scores()["agreement"] == []


def test_the_budget_is_that_of_each_judge(new_run, fault_server, capfd):
    server = fault_server()
    run = new_run(server.url)
    prices = ("--price_per_million_input", "10", "--price_per_million_output", "10")
    assert run.stage(*FEW, *prices, "--max_cost", "0.05") == 2
    said = capfd.readouterr().err
    assert "the budget is used up" in said
    assert "raise max_cost, or lower num_judged" in said
    stored = rows(run.path / "answers" / "judge_first.jsonl")
    cost = sum(row["answer"]["prompt_tokens"] + row["answer"]["completion_tokens"] for row in stored) * 10 / 1e6
    assert 0.01 < cost <= 0.05
    assert len(server.answered()) == len(stored)
    assert run.stage(*FEW, *prices, "--max_cost", "50") == 0
    assert len(server.answered()) == len(set(server.answered()))


def test_a_dry_run_asks_nothing(new_run, fault_server, capfd):
    server = fault_server()
    run = new_run(server.url)
    assert run.stage(*FEW, "--dry_run") == 0
    said = capfd.readouterr().err
    assert "judge first:" in said
    assert "calls to make: " in said
    assert "Recommended product:" in said
    assert server.answered() == []
    assert not list(run.path.glob("judge/*"))


def test_batch_files_end_with_the_same_verdicts(new_run, fault_server, capfd):
    live = new_run(fault_server().url, "live")
    assert live.stage(*FEW) == 0
    run = new_run("http://127.0.0.1:9/v1", "batch")
    for judge in ("first", "second"):
        assert run.stage(*FEW, "--judged_by", "batch") == 2
        folder = run.path / "answers" / f"judge_{judge}_batch"
        assert f"judge_{judge}_batch/requests-0001.jsonl" in capfd.readouterr().err
        lines = []
        for request in rows(folder / "requests-0001.jsonl"):
            body = completion(request["body"], random.Random(f"0 {request['custom_id']}"), 0)
            lines.append({"custom_id": request["custom_id"], "response": {"status_code": 200, "body": body}})
        (folder / "results-0001.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run.stage(*FEW, "--judged_by", "batch") == 0
    assert run.results() == live.results()
