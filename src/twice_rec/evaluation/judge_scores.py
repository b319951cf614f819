"""The sums of verdicts: distributions, shares, agreement; and their tables.

Every figure stands beside the number of rows that it is a mean of, and the number of those without a verdict, which no
mean has. Intervals are 95 % bootstrap intervals over users.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from twice_rec.evaluation.agreement import agreement
from twice_rec.evaluation.judge import SCORED, JudgedRow
from twice_rec.markdown import markdown_table
from twice_rec.metrics import bootstrap_intervals, paired_bootstrap
from twice_rec.prompts import LEVELS

VERDICTS, SCORES = "verdicts.jsonl", "scores.json"
BEST = max(LEVELS)

Scores = dict[str, Any]


def scores_of(
    rows: Sequence[JudgedRow],
    num_candidates: Mapping[str, int],
    humans: Mapping[str, Mapping[tuple[str, str], int]],
    seed: int,
) -> Scores:
    """Return what `scores.json` holds of the verdicts of one variant, but for the costs.

    Args:
        rows: of all judges and conditions.
        num_candidates: user -> length of the candidate list.
        humans: name -> (user, condition) -> score.
    """
    judges = list(dict.fromkeys(row.judge for row in rows))
    by_judge: dict[str, Any] = {}
    for judge in judges:
        own = [row for row in rows if row.judge == judge]
        conditions = list(dict.fromkeys(row.condition for row in own))
        found = {}
        for condition in conditions:
            of = [row for row in own if row.condition == condition]
            found[condition] = _scored(of) if condition in SCORED else _chosen(of, num_candidates)
        if set(SCORED) <= found.keys():
            found["counterfactual"]["difference"] = _difference(own)
        by_judge[judge] = found
    return {
        "users": len({row.user_id for row in rows}),
        "judges": by_judge,
        "agreement": _agreements(rows, humans, seed),
    }


def _counts(rows: Sequence[JudgedRow]) -> Scores:
    return {
        "n": sum(row.has_verdict for row in rows),
        "without_verdict": sum(not row.has_verdict for row in rows),
        "settled": sum(row.is_settled for row in rows),  # of n
    }


def _mean(values: Sequence[float], name: str) -> Scores:
    """Return a mean and its interval under a name; null if there is nothing to average."""
    if not values:
        return {name: None, f"{name}_ci95": None}
    (interval,) = bootstrap_intervals(np.array(values, dtype=np.float64)[:, None])
    return {name: float(np.mean(values)), f"{name}_ci95": interval.tolist()}


def _scored(rows: Sequence[JudgedRow]) -> Scores:
    scores = [row.score for row in rows if row.score is not None]
    distribution = {str(level): scores.count(level) for level in LEVELS}
    best = [float(score == BEST) for score in scores]
    return {**_counts(rows), "distribution": distribution, **_mean(scores, "mean"), **_mean(best, f"share_{BEST}")}


def _chosen(rows: Sequence[JudgedRow], num_candidates: Mapping[str, int]) -> Scores:
    judged = [row for row in rows if row.has_verdict]
    hits = [float(row.choice == row.item_id and row.choice is not None) for row in judged]
    chances = [1 / num_candidates[row.user_id] for row in judged]
    return {**_counts(rows), **_mean(hits, "share"), "chance": float(np.mean(chances)) if chances else None}


def _difference(rows: Sequence[JudgedRow]) -> Scores:
    """Return what the score loses with another user's rationale: counterfactual less item_shown, user by user.

    Settled rows have no part in it: they have the same score in both, whatever is judged.
    """
    judged = [row for row in rows if row.score is not None and not row.is_settled]
    shown, other = ({row.user_id: row.score for row in judged if row.condition == condition} for condition in SCORED)
    both = [user for user in shown if user in other]
    if not both:
        return {"n": 0, "mean": None, "ci95": None, "p": None}
    found = paired_bootstrap([other[user] for user in both], [shown[user] for user in both])
    return {"n": len(both), "mean": found.difference, "ci95": list(found.ci95), "p": found.p}


def _agreements(rows: Sequence[JudgedRow], humans: Mapping[str, Any], seed: int) -> list[Scores]:
    """Return the agreement of every two judges, human or not, per condition; settled rows have no judge."""
    given: dict[str, dict[tuple[str, str], int]] = {}
    for row in rows:
        of = given.setdefault(row.judge, {})
        if row.score is not None and not row.is_settled:
            of[row.user_id, row.condition] = row.score
    asked = set().union(*given.values()) if given else set()
    given |= {name: {key: score for key, score in of.items() if key in asked} for name, of in humans.items()}
    found = []
    for (a, of_a), (b, of_b) in itertools.combinations(given.items(), 2):
        for condition in SCORED:
            both = [key for key in of_a if key in of_b and key[1] == condition]
            if both:
                two = agreement([of_a[key] for key in both], [of_b[key] for key in both], seed)
                interval = list(two.ci95) if two.ci95 else None
                about = {"a": a, "b": b, "condition": condition, "n": two.n, "same": two.same}
                found.append({**about, "kappa": two.kappa, "ci95": interval})
    return found


def table_of(variant: str, scores: Scores) -> str:
    """Return the tables of one variant for the terminal."""
    header = ["judge", "condition", "n", "no verdict", *map(str, LEVELS), "mean", f"score {BEST}", "names the item"]
    rows = []
    for judge, conditions in scores["judges"].items():
        for condition, of in conditions.items():
            begin = [judge, condition, str(of["n"]), str(of["without_verdict"])]
            if condition in SCORED:
                levels = [str(count) for count in of["distribution"].values()]
                rows.append([*begin, *levels, _shown(of, "mean"), _shown(of, f"share_{BEST}"), "-"])
            else:
                chance = f", chance {of['chance']:.3f}" if of["chance"] is not None else ""
                rows.append([*begin, *["-"] * (len(LEVELS) + 2), _shown(of, "share") + chance])
    lines = [f"{variant}, {scores['users']:,} users:", "", markdown_table(header, rows)]
    for judge, conditions in scores["judges"].items():
        if (of := conditions.get("counterfactual", {}).get("difference", {})).get("n"):
            difference = f"{of['mean']:+.3f} [{of['ci95'][0]:+.3f}, {of['ci95'][1]:+.3f}]"
            lines += ["", f"{judge}: another user's rationale changes the mean score by {difference}, n {of['n']}"]
    for of in scores["agreement"]:
        kappa = f"{of['kappa']:.3f} [{of['ci95'][0]:.3f}, {of['ci95'][1]:.3f}]" if of["ci95"] else "not defined"
        pair = f"{of['a']} and {of['b']}, {of['condition']}"
        lines += ["", f"{pair}: quadratic kappa {kappa}, the same score in {of['same']:.3f}, n {of['n']}"]
    return "\n".join(lines)


def _shown(of: Mapping[str, Any], name: str) -> str:
    if of[name] is None:
        return "-"
    return f"{of[name]:.3f} [{of[f'{name}_ci95'][0]:.3f}, {of[f'{name}_ci95'][1]:.3f}]"
