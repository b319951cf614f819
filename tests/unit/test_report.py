"""Several runs in one report: averaged user by user, and only where they were asked the same questions."""

import json

import numpy as np
import pytest

from twice_rec.errors import InputError
from twice_rec.evaluation.report import compare, read_variants, summarise_variants


def evaluated(run_dir, variant, ranks, seed=42, candidates="same"):
    """An evaluation as stage 4 leaves it; `ranks`: user -> rank."""
    folder = run_dir / "eval" / variant
    folder.mkdir(parents=True)
    manifest = {"inputs": {"data/candidates.test.jsonl": candidates, f"{variant}/merged": str(run_dir)}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    rows = [{"user_id": u, "target": "B1", "ranks": {"uniform": rank}, "seed": seed} for u, rank in ranks.items()]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_runs_of_other_seeds_are_averaged_user_by_user(tmp_path):
    runs = [tmp_path / name for name in ("tiny", "tiny_1")]
    evaluated(runs[0], "stage2", {"a": 1, "b": 2, "c": 3})
    evaluated(runs[1], "stage2", {"c": 1, "a": 1, "b": 5})
    evaluated(runs[0], "popularity", {"a": 2, "b": 1, "c": 2})
    evaluated(runs[1], "stage3", {"a": 1, "b": 1, "c": 1})
    variants = read_variants(runs)
    assert list(variants) == ["popularity", "stage2", "stage3"]
    assert variants["stage2"].column("uniform/hr@1", ["a", "b", "c"]).tolist() == [1, 0, 0.5]
    assert {name: row["runs"] for name, row in summarise_variants(variants, None, 100).items()} == {
        "popularity": 1, "stage2": 2, "stage3": 1,
    }  # fmt: skip
    difference = compare(variants, "stage3", "stage2", "uniform/hr@1", 100)["difference"]
    assert difference == pytest.approx(np.mean([0, 1, 0.5]))


def test_trainings_within_one_folder_count_too(tmp_path):
    evaluated(tmp_path, "sasrec", {"a": 1, "b": 2})
    path = tmp_path / "eval" / "sasrec" / "predictions.jsonl"
    path.write_text(path.read_text() + path.read_text().replace('"seed": 42', '"seed": 43'))
    assert read_variants([tmp_path])["sasrec"].runs == 2


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"ranks": {"a": 1}}, "evaluate all of them on the same users and lists"),
        ({"ranks": {"a": 1, "d": 1}}, "some users have no rank for uniform in some of the 2 runs"),
        ({"ranks": {"a": 1, "b": 1}, "candidates": "others"}, r"different data/candidates\.test\.jsonl"),
    ],
)
def test_runs_that_were_asked_something_else_are_refused(tmp_path, other, says):
    runs = [tmp_path / name for name in ("tiny", "tiny_1")]
    evaluated(runs[0], "stage2", {"a": 1, "b": 2})
    evaluated(runs[1], "stage2", **other)
    with pytest.raises(InputError, match=says):
        read_variants(runs)


def test_a_run_without_evaluations_is_named(tmp_path):
    evaluated(tmp_path / "tiny", "stage2", {"a": 1})
    with pytest.raises(InputError, match="tiny_1/eval: nothing was evaluated yet"):
        read_variants([tmp_path / "tiny", tmp_path / "tiny_1"])
