"""What the confidences of a SASRec with the release's settings are, on a run that was prepared from the same files."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from twice_rec.answer_format import parse
from twice_rec.catalog import Outcome, normalised
from twice_rec.cf.confidence import Histories, sigmoid
from twice_rec.cf.sasrec import SASRecScorer
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.data.sources.release import ReleaseSource
from twice_rec.errors import InputError
from twice_rec.evaluation.release import Finding
from twice_rec.grpo.rewards import RewardConfig, ScoredCompletion, collaborative
from twice_rec.item_sequences import Questions
from twice_rec.metrics import bootstrap_intervals, per_user, ranks_from_scores
from twice_rec.random_streams import random_stream
from twice_rec.run import require

SASREC = "sasrec_release"  # folder of the model in the run
LIST = "uniform"

_TAU, _COMPLETIONS = 0.3, 16  # of the release's reward, and of its groups
_LAMBDAS = ((3.0, 1.0), (3.0, 5.0))  # compared
_EPSILON = 1e-4  # TRL adds it to a group's deviation

Floats = NDArray[np.floating]


def files_of_run(run_dir: Path) -> list[Path]:
    """Return what `findings_of_sasrec` reads of a run; InputError if one is missing, naming what makes it."""
    lists = [dataset.candidates_file("train"), dataset.candidates_file("test")]
    data = dataset.required_files(run_dir, dataset.CATALOG, dataset.SEQUENCES, *lists)
    return [*data, require(run_dir / SASREC / "model.safetensors", "sasrec.sh recipes/grocery/sasrec_release.yaml")]


def findings_of_sasrec(source: ReleaseSource, run_dir: Path, seed: int = 0) -> list[Finding]:
    """Return the figures that take the confidences of the run's `sasrec_release`, that of the first seed.

    Raises:
        InputError: if the run was prepared from other files, or lacks its lists.
    """
    data = PreparedData(run_dir / "data")
    if data.catalog.ids != tuple(item.item_id for item in source.items(set())):
        raise InputError(
            f"{run_dir / 'data'} has another catalogue than {source.folder}; give a run that was prepared from it: "
            f"bash prepare.sh recipes/grocery/prepare.yaml --source_dir {source.folder}"
        )
    scorer = SASRecScorer.load(run_dir / SASREC / "model.safetensors", data.catalog)
    test, train = data.questions("test", [LIST]), data.questions("train", [LIST])
    z, z_train = (scorer.logits(asked.histories, asked.candidates[LIST]) for asked in (test, train))  # [B, C] each
    share = scorer.popularity_share(test.histories)
    _, trained = data.training_histories().flat()
    counts = np.bincount(trained, minlength=len(data.catalog) + 1).astype(np.float64)  # [N + 1]
    return [
        _hit_rate("training", f"its HR@1 in lists of {z.shape[1]}, uniform negatives", z, test, seed),
        _hit_rate("training", "HR@1 of popularity in these lists", counts[test.candidates[LIST]], test, seed),
        Finding("popularity", "share of its scores' variance that the item alone explains", share),
        *_of_tau(z, test),
        _hit_rate("memory", "SASRec's HR@1 in lists with the targets of its training", z_train, train, seed),
        _hit_rate("memory", "the same in test lists", z, test, seed),
        *_of_titles(scorer, data, test.histories),
        *_of_outside(scorer, test),
        *_of_lambda(z_train, train, seed),
    ]


def _hit_rate(defect: str, counted: str, scores: Floats, asked: Questions, seed: int) -> Finding:
    """Return HR@1 by the scores of each user's candidates, [B, C]; ties count against the target."""
    places = (asked.candidates[LIST] == asked.targets[:, None]).argmax(axis=1)  # [B]
    hits = per_user("hr@1", ranks_from_scores(scores, places))  # [B]
    low, high = bootstrap_intervals(hits[:, None], seed=seed)[0]
    return Finding(defect, counted, float(hits.mean()), ci95=(float(low), float(high)))


def _of_tau(z: Floats, asked: Questions) -> list[Finding]:
    passes = sigmoid(z) >= _TAU  # [B, C]
    is_target = asked.candidates[LIST] == asked.targets[:, None]  # [B, C]
    return [
        Finding("tau", f"share of uniform negatives with at least {_TAU}", float(passes[~is_target].mean())),
        Finding("tau", f"share of targets with at least {_TAU}", float(passes[is_target].mean())),
    ]


def _of_titles(scorer: SASRecScorer, data: PreparedData, histories: Histories) -> list[Finding]:
    """Compare the confidences of items that share a title, first and second of each title."""
    having = defaultdict(list)  # title -> indices
    for index, item in enumerate(data.catalog, start=1):
        having[normalised(item.title)].append(index)
    pairs = np.array([indices[:2] for indices in having.values() if len(indices) > 1]).reshape(-1, 2)  # [P, 2]
    if not len(pairs):
        return []
    shown = np.tile(pairs.ravel(), (len(histories), 1))  # [B, 2P]
    both = sigmoid(scorer.logits(histories, shown)).reshape(len(histories), -1, 2)  # [B, P, 2]
    apart = float(np.abs(both[..., 0] - both[..., 1]).mean())
    return [Finding("title", "difference between the confidences of two items of one title, mean", apart)]


def _of_outside(scorer: SASRecScorer, asked: Questions) -> list[Finding]:
    """Count what an answer earns that always names the one item of the highest mean score."""
    item = 1 + int(scorer.item_means(asked.histories)[1:].argmax())
    confidences = sigmoid(scorer.logits(asked.histories, np.full((len(asked.histories), 1), item)))  # [B, 1]
    shown = asked.candidates[LIST] == item  # [B, C]
    says = "always the same title: share of users"
    return [
        Finding("outside", f"{says} who have it as a candidate", float(shown.any(axis=1).mean())),
        Finding("outside", f"{says} for whom it earns its confidence", float((confidences >= _TAU).mean())),
        Finding("outside", "always the same title: its confidence, mean", float(confidences.mean())),
    ]


def _of_lambda(z: Floats, asked: Questions, seed: int) -> list[Finding]:
    """Correlate the advantages of two lambdas over groups of random answers that hold a hit."""
    rng = random_stream(seed, "answers for lambda")
    drawn = rng.integers(0, z.shape[1], size=(len(z), _COMPLETIONS))  # [B, K], places in the list
    hits = np.take_along_axis(asked.candidates[LIST] == asked.targets[:, None], drawn, axis=1)  # [B, K]
    confidences = np.take_along_axis(sigmoid(z), drawn, axis=1)  # [B, K]
    with_hit = hits.any(axis=1)
    hits, confidences = hits[with_hit], confidences[with_hit]  # [G, K] each
    if not len(hits):
        return []
    nothing = parse("")
    completions = [
        ScoredCompletion("", nothing, Outcome.HIT if hit else Outcome.MISS, float(confidence))
        for hit, confidence in zip(hits.ravel(), confidences.ravel(), strict=True)
    ]

    def advantages(weight: float) -> Floats:
        config = RewardConfig(reward_lambda=weight, reward_tau=_TAU)
        rewards = np.array([collaborative(one, config) for one in completions]).reshape(hits.shape)  # [G, K]
        centred = rewards - rewards.mean(axis=1, keepdims=True)
        return (centred / (rewards.std(axis=1, ddof=1, keepdims=True) + _EPSILON)).ravel()  # [G * K]

    says = "advantages with lambda {:g} and {:g}, groups of {} random answers with a hit: correlation"
    return [
        Finding("lambda", says.format(a, b, _COMPLETIONS), float(np.corrcoef(advantages(a), advantages(b))[0, 1]))
        for a, b in _LAMBDAS
    ]
