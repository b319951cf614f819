"""Stage 1 without a server: the tiny recipe's annotator, and the authors' released rationales."""

import json
from collections import Counter

import pytest

from stages.pipeline import ROOT
from twice_rec.stages import stage0_prepare, stage1_rationales

SHARED = ROOT.parent / "shared" / "data" / "twice_grocery"
pytestmark = pytest.mark.slow


def prepare(recipes, run_dir, *flags):
    words = ["--config", str(ROOT / "recipes" / recipes / "prepare.yaml"), "--run_dir", str(run_dir)]
    assert stage0_prepare.main([*words, *flags]) == 0


def annotate(recipes, run_dir, *flags):
    words = ["--config", str(ROOT / "recipes" / recipes / "rationales.yaml"), "--run_dir", str(run_dir)]
    assert stage1_rationales.main([*words, *flags]) == 0
    folder = run_dir / "rationales"
    rows = [json.loads(line) for line in (folder / "accepted.jsonl").read_text().splitlines()]
    return rows, json.loads((folder / "report.json").read_text())


def test_the_tiny_recipe_keeps_enough_and_drops_some(tmp_path, capfd):
    prepare("tiny", tmp_path, "--synthetic_users", "5000")
    rows, report = annotate("tiny", tmp_path)
    assert len(rows) == report["accepted"] >= 1500
    assert 0.05 <= 1 - report["accepted"] / report["rows"] <= 0.4
    assert {row["annotator"] for row in rows} == {"offline"}
    assert "Leaks: share of accepted rationales that give the target away" in capfd.readouterr().err
    assert (tmp_path / "rationales" / "report.md").read_text().startswith("# Rationales: offline")


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")
def test_released_rationales_enter_the_same_files_and_leak(tmp_path):
    prepare("grocery", tmp_path, "--source_dir", str(SHARED))
    rows, report = annotate("grocery", tmp_path, "--annotator", "release", "--source_dir", str(SHARED))
    assert report["rows"] == 100
    assert len(rows) >= 90
    assert Counter(row["annotator"] for row in rows) == {"release": len(rows)}
    assert report["leaks_all"]["title"] >= 0.85
    assert report["leaks_all"]["purchase"] > 0.5
    assert report["leaks_all"]["id"] == 0
    assert report["evidence"]["purchases_cited"] > 1
    assert 130 < report["words"]["mean"] < 160
