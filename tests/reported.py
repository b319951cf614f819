"""A small run by hand, for the report: data, evaluations, stage 3's log, a CF model, a judge, an A/B test."""

import hashlib
import json

import numpy as np

from twice_rec.catalog import ItemCatalog
from twice_rec.cf.sasrec import SASRec, SASRecConfig, SASRecScorer
from twice_rec.files import write_records
from twice_rec.manifest import Manifest
from twice_rec.records import CandidateLists, Interaction, Item, Prediction, UserSequence

ASKED = {"ranking": "likelihood", "with_rationale": True, "max_prompt_tokens": None, "max_new_tokens": 100}
VOTES = {**ASKED, "ranking": "sampled", "num_samples": 5}
ALONE = {**ASKED, "with_rationale": False}
EVIL = '<b onclick="alert(1)">Tea</b> </script><script>alert(2)</script> <!-- & "quoted" ${x}'
ITEMS = [Item("I1", EVIL, brand="Yogi & Co"), *(Item(f"I{i}", f"Thing {i}", brand="B") for i in range(2, 7))]
USERS = [f"u{i}" for i in range(1, 9)]
GRPO = {
    "domain": "D", "seed": 42,
    "reward_funcs": ["collaborative", "structure"], "reward_weights": [4.0, 1.0], "reward_lambda": 3.0,
    "reward_tau": 0.3, "cf_model": "sasrec", "confidence": "sigmoid", "confidence_debiased": False,
}  # fmt: skip


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def prepared(run_dir):
    """The data: each user's history is I1 I2 I3, then I4 for validation; the target is I5 or, for odd users, I6."""
    folder = run_dir / "data"
    ItemCatalog(ITEMS).save(folder / "catalog.jsonl")
    review = {"rating": 5.0, "review_title": "liked <i>it</i>"}
    sequences, lists = [], {"train": [], "valid": [], "test": []}
    for number, user in enumerate(USERS, start=1):
        target = "I6" if number % 2 else "I5"
        ids = ["I1", "I2", "I3", "I4", target]
        sequences.append(UserSequence(user, tuple(Interaction(i, n + 1, **review) for n, i in enumerate(ids)), 3, 3, 4))
        for split, of_split in (("train", "I3"), ("valid", "I4"), ("test", target)):
            others = [i for i in ("I5", "I6") if i != target]
            lists[split].append(CandidateLists(user, of_split, {"uniform": tuple(sorted([of_split, *others]))}))
    write_records(folder / "sequences.jsonl", sequences)
    for split, rows in lists.items():
        write_records(folder / f"candidates.{split}.jsonl", rows)
    return folder


def target_of(user):
    return "I6" if int(user[1:]) % 2 else "I5"


def evaluated(run_dir, variant, ranks, asked=None, seed=42, rationale="because", **inputs):
    """An evaluation; `ranks` are those of `USERS`, 1 or 2. Whoever was asked for a rationale wrote one."""
    rows = []
    for user, rank in zip(USERS, ranks, strict=True):
        target, text = target_of(user), ()
        order = (target, "I5" if target == "I6" else "I6")
        order = order if rank == 1 else order[::-1]
        if asked and asked["with_rationale"]:
            said = f"<think> {rationale} {user} </think> <item_nm> Thing {order[0][1]} </item_nm>"
            text = (f"{said} <item_id> {order[0]} </item_id>",)
        ranking = order if asked else ()
        rows.append(Prediction(user, target, {"uniform": rank}, seed, ranking, text))
    folder = run_dir / "eval" / variant
    write_records(folder / "predictions.jsonl", rows)
    (folder / "metrics.json").write_text("{}")
    data = {name: digest(run_dir / "data" / name) for name in ("catalog.jsonl", "sequences.jsonl")}
    data["candidates.test.jsonl"] = digest(run_dir / "data" / "candidates.test.jsonl")
    rests_on = {**{f"data/{name}": value for name, value in data.items()}, **inputs}
    outputs = {f"eval/{variant}/predictions.jsonl": digest(folder / "predictions.jsonl")}
    Manifest("evaluate", asked or {}, rests_on, outputs, {}, {}, rests_on).save(folder)


def trained(run_dir, folder="grpo", steps=24, **settings):
    """What stage 3 leaves of its log, and its settings."""
    path = run_dir / folder
    path.mkdir(parents=True)
    keys = ("reward", "outcome/hit", "groups/without_variance", "kl", "entropy", "completions/mean_length")
    log = [{"step": step, **{key: step + number for number, key in enumerate(keys)}} for step in range(1, steps + 1)]
    (path / "trainer_state.json").write_text(json.dumps({"log_history": [*log, {"step": steps, "train_loss": 1.0}]}))
    outputs = {f"{folder}/trainer_state.json": digest(path / "trainer_state.json")}
    Manifest("grpo", {**GRPO, **settings}, {}, outputs, {"tau": 0.3}).save(path)


def cf_model(run_dir):
    """An untrained SASRec of the run's catalogue, calibrated on some pairs."""
    import torch

    torch.manual_seed(0)
    catalog = ItemCatalog(ITEMS)
    scorer = SASRecScorer(SASRec(SASRecConfig(hidden_size=8, inner_size=8, num_layers=1, num_heads=1), len(catalog)))
    shown = np.array([[1, 2], [2, 3], [3, 4], [4, 5]])
    scorer.calibrate([[1, 2], [2, 3], [3], [4, 1]], shown, np.array([1, 3, 3, 5]))
    (run_dir / "sasrec").mkdir()
    scorer.save(run_dir / "sasrec" / "model.safetensors", catalog)


def scores(share, n=300):
    """A judge's scores under one condition, as `judge/<variant>/scores.json` has them."""
    satisfying = round(n * share)
    return {
        "n": n, "without_verdict": 2, "settled": 0, "distribution": {"0": 3, "1": 7, "2": n - 10 - satisfying,
        "3": satisfying}, "mean": 2.5, "mean_ci95": [2.4, 2.6], "share_3": share,
        "share_3_ci95": [share - 0.05, share + 0.05],
    }  # fmt: skip


def judged(run_dir, variant="stage3", share=0.5, judge="rules"):
    folder = run_dir / "judge" / variant
    folder.mkdir(parents=True)
    hidden = {"n": 300, "without_verdict": 0, "share": 0.6, "share_ci95": [0.5, 0.7], "chance": 0.5}
    of_judge = {"item_shown": scores(share), "counterfactual": scores(0.1), "item_hidden": hidden}
    kappa = {"a": judge, "b": "human", "condition": "item_shown", "n": 50, "kappa": 0.61, "ci95": [0.5, 0.7]}
    (folder / "scores.json").write_text(json.dumps({"users": 300, "judges": {judge: of_judge}, "agreement": [kappa]}))
    rows = [{"user_id": user, "judge": judge, "condition": "item_shown", "score": 2, "why": "dull"} for user in USERS]
    rows += [{**row, "condition": "counterfactual", "score": 0} for row in rows]
    (folder / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def clicked(run_dir, a="sasrec", b="stage3", difference=-0.02, **more):
    about = {"impressions": 1000, "clicks": 100, "ctr": 0.1, "ci95": [0.08, 0.12], "latency_ms": {"mean": 9.5}}
    arms = [{"arm": name, **about} for name in ("random", "sasrec", "stage3")]
    ci95 = sorted([difference / 2, difference * 2])
    tests = [{"a": a, "b": b, "difference": difference, "ci95": ci95, "z": 2.6, "p": 0.01, **more}]
    found = {"title": "Simulation", "kind": "simulation", "arms": arms, "comparisons": tests}
    (run_dir / "ab_test").mkdir(parents=True)
    (run_dir / "ab_test" / "ab_test.json").write_text(json.dumps(found))


def whole(run_dir):
    """A run with something for every part of the report."""
    prepared(run_dir)
    good, poor, worst = [1] * 7 + [2], [1, 2] * 4, [2] * 8
    for name, ranks in {"random": worst, "sasrec": good, "oracle": [1] * 8, "ceiling_text": poor}.items():
        evaluated(run_dir, name, ranks)
    for name, ranks in {"base": worst, "stage2": poor, "stage3_C": worst, "stage3_D": poor, "stage3": good}.items():
        evaluated(run_dir, name, ranks, ASKED, rationale=EVIL.replace("<", "&lt;") if name == "base" else EVIL)
    for value in (0, 5):
        evaluated(run_dir, f"stage3_lambda{value}", poor, ASKED)
    for name in ("stage2", "stage3"):
        evaluated(run_dir, f"{name}_item_only", worst, ALONE)
        evaluated(run_dir, f"{name}_sampled", good, VOTES)
    evaluated(run_dir, "stage2_no_rationale", worst, ALONE)
    trained(run_dir)
    trained(run_dir, "grpo_D")
    cf_model(run_dir)
    judged(run_dir)
    clicked(run_dir)
