"""Tables of documents come from the files in results/, and the documents in this repository are up to date."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from twice_rec.errors import InputError
from twice_rec.evaluation.quotation import fill, quotation
from twice_rec.manifest import Manifest

ROOT = Path(__file__).parents[2]
RESULTS = {
    "variants": {
        "sasrec": {
            "metrics": {"uniform/hr@1": 0.227712345, "full/ndcg@10": 0.02516},
            "ci95": {"uniform/hr@1": [0.2213, 0.2345], "full/ndcg@10": [0.02, 0.03]},
            "n": 11334,
            "runs": 3,
        }
    },
    "comparisons": [
        {"a": "stage3", "b": "stage2", "metric": "uniform/hr@1", "n": 500, "difference": 0.0214, "ci95": [0.001, 0.04],
         "p": 0.04, "p_holm": 0.08},
    ],
    "left_out": ["not quoted"],
}  # fmt: skip


def test_a_quotation_has_seven_digits_and_says_what_made_it(tmp_path):
    run_dir = tmp_path / "run"
    for name, stage, seed in (("sasrec", "sasrec", 42), ("eval/sasrec", "sasrec", 42), ("report", "report", 42)):
        about = {"command": ["twice-rec", stage, "r.yaml", "--epochs", "9"], "commit": "abc", "recipe": {"seed": seed}}
        (run_dir / name).mkdir(parents=True)
        Manifest(stage, {}, {}, {}, {}, about).save(run_dir / name)
    quoted = quotation(RESULTS, [run_dir], "Grocery")
    assert quoted["variants"]["sasrec"]["metrics"]["uniform/hr@1"] == 0.2277123
    assert "left_out" not in quoted
    assert quoted["about"]["commands"] == ["bash sasrec.sh r.yaml --epochs 9"]
    assert (quoted["about"]["commits"], quoted["about"]["seeds"]) == (["abc"], [42])
    assert json.dumps(quoted)


def test_a_quotation_names_the_machines_that_measured_and_changes_that_no_commit_has(tmp_path):
    for name, cpus, changed in (("sasrec", 2, False), ("eval/sasrec", 2, False), ("eval/base", 64, True)):
        about = {"command": ["twice-rec", "sasrec", "r.yaml"], "commit": "abc", "machine": {"cpus": cpus}}
        (tmp_path / name).mkdir(parents=True)
        Manifest("sasrec", {}, {}, {}, {}, {**about, "uncommitted_changes": changed}).save(tmp_path / name)
    about = quotation(RESULTS, [tmp_path], "Grocery")["about"]
    assert about["machine"] == [{"cpus": 2}, {"cpus": 64}]
    assert about["commits"] == ["abc", "abc and changes"]


def test_a_table_without_its_end_takes_no_text_with_it(document):
    path = document("one.json comparisons")
    path.write_text("<!-- numbers one.json comparisons -->\nprose\n" + path.read_text())
    with pytest.raises(InputError, match="2 tables begin by .* what stands between them would be lost"):
        fill(path)


@pytest.fixture
def document(tmp_path):
    def write(words, table="old\n"):
        (tmp_path / "one.json").write_text(json.dumps(RESULTS))
        path = tmp_path / "D.md"
        path.write_text(f"before\n<!-- numbers {words} -->\n{table}<!-- end of numbers -->\nafter\n")
        return path

    return write


def test_tables_are_made_anew(document):
    text = fill(document("one.json variants sasrec uniform/hr@1 full/ndcg@10"))
    assert text.startswith("before\n<!-- numbers one.json variants sasrec uniform/hr@1 full/ndcg@10 -->\n| model")
    assert text.endswith("|\n<!-- end of numbers -->\nafter\n")
    assert "SASRec | .2277 [.2213, .2345] |        .0252 | 11,334 |     3 |" in text
    assert "full NDCG@10" in text
    assert "+0.0214 | [+0.0010, +0.0400]" in fill(document("one.json comparisons"))
    assert "+0.0214" not in fill(document("one.json comparisons stage2"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("two.json variants sasrec uniform/hr@1", "two.json: no such file"),
        ("one.json variants ease uniform/hr@1", "there is no 'ease'"),
        ("one.json variants sasrec uniform/hr@7", "there is no 'uniform/hr@7'"),
        ("one.json tables", "there is no 'tables'"),
    ],
)
def test_what_is_not_there_is_named(document, words, says):
    with pytest.raises(InputError, match=says):
        fill(document(words))


def test_the_documents_are_up_to_date():
    command = [sys.executable, "results/fill.py", "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
