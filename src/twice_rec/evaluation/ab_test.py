"""RQ5: an A/B test, simulated on the synthetic domain's click model, or read from the log of a real one.

The simulation. A visit is a user, drawn with replacement, who brings the candidate list of their test question. An arm,
drawn by its share of the traffic, shows the one candidate that it ranks first. **Click model**: the visitor clicks with
the probability that, of these candidates, they would pick the shown one: softmax over the list of the domain's true
utilities, which the oracle's scores are. Nothing but that is simulated: no position, no habit, no effect of one visit
on the next. All arms draw from the users about whom every language model among them was asked.

The intervals of rates and tests cover what visits draw, not which users were asked; `over_users` has the differences'
intervals over users, by which the paper's claims are judged. It is no evidence about a shop.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twice_rec.errors import InputError
from twice_rec.evaluation.proportions import false_alarms, two_proportions, wilson
from twice_rec.evaluation.recipe import AbTestRecipe
from twice_rec.evaluation.tables import show
from twice_rec.files import read_jsonl
from twice_rec.markdown import markdown_table
from twice_rec.metrics import paired_bootstrap
from twice_rec.random_streams import random_stream

CLICK_MODEL = (
    "a visitor clicks with the probability that, of the candidates in their list, they would pick the shown one: "
    "softmax of the synthetic domain's true utilities over the list"
)
PEEKING = (
    "Peeking: where both arms are the same, {looks} looks at p, each of which may end the test, raise a false alarm in "
    "the share of tests that the last column shows, instead of 5 %. Fix the number of visits before, and look once."
)


@dataclass(frozen=True)
class Traffic:
    """What an arm got."""

    arm: str
    impressions: int
    clicks: int


def simulate(
    choices: Mapping[str, NDArray[np.int64] | None], clicks: NDArray[np.float64], recipe: AbTestRecipe
) -> list[Traffic]:
    """Draw the visits.

    Args:
        choices: arm -> the column that it shows each user, [U]; None if it draws one of them at every visit.
        clicks: [U, C], probability of a click per user and candidate.

    Raises:
        InputError: if an arm got no visit.
    """
    rng, (users, candidates) = random_stream(recipe.seed, "visits of the A/B test"), clicks.shape
    arm = rng.choice(len(choices), size=recipe.visits, p=np.array([recipe.arms[name] for name in choices]))
    user, drawn = rng.integers(users, size=recipe.visits), rng.integers(candidates, size=recipe.visits)  # [visits]
    luck = rng.random(recipe.visits)
    traffic = []
    for number, (name, chosen) in enumerate(choices.items()):
        rows = np.flatnonzero(arm == number)
        if not len(rows):
            raise InputError(f"arm {name} got none of {recipe.visits:,} visits; raise visits, or its share in arms")
        shown = drawn[rows] if chosen is None else chosen[user[rows]]
        clicked = luck[rows] < clicks[user[rows], shown]
        traffic.append(Traffic(name, len(rows), int(clicked.sum())))
    return traffic


def expected_rate(chosen: NDArray[np.int64] | None, clicks: NDArray[np.float64]) -> float:
    """Return the click rate that an arm has on average over visits, exactly; see `simulate`."""
    return float(clicks.mean() if chosen is None else clicks[np.arange(len(clicks)), chosen].mean())


def over_users(
    a: NDArray[np.int64] | None, b: NDArray[np.int64] | None, clicks: NDArray[np.float64], seed: int
) -> dict[str, Any]:
    """Return the difference of two arms' exact click rates with its interval over users, see `expected_rate`.

    However many visits are drawn, they are visits of these users: this interval says what other users would do.
    """
    left, right = (clicks.mean(axis=1) if of is None else clicks[np.arange(len(clicks)), of] for of in (a, b))  # [U]
    return {**asdict(paired_bootstrap(left, right, seed=seed)), "n": len(clicks)}


def read_log(path: Path) -> list[Traffic]:
    """Count a real test's log: JSON lines with `arm` (text) and `clicked` (true, false, 0 or 1), one per impression.

    Raises:
        InputError: for a line that has not these two, or if there are fewer than two arms.
    """
    counts: dict[str, list[int]] = {}
    for line, row in read_jsonl(path):
        arm, clicked = row.get("arm"), row.get("clicked")
        if not isinstance(arm, str) or not arm or clicked not in (0, 1) or isinstance(clicked, float):
            raise InputError(
                f"{path}, line {line}: expected arm (text) and clicked (true, false, 0 or 1), found arm {arm!r} and "
                f"clicked {clicked!r}"
            )
        of_arm = counts.setdefault(arm, [0, 0])
        of_arm[0] += 1
        of_arm[1] += int(clicked)
    if len(counts) < 2:
        raise InputError(f"{path}: expected at least two arms, found {', '.join(counts)}")
    return [Traffic(arm, *of_arm) for arm, of_arm in counts.items()]


def analyse(traffic: list[Traffic], recipe: AbTestRecipe) -> dict[str, Any]:
    """Return arms with intervals, all pairs of them compared, and for each pair what peeking would do to it."""
    arms = [
        {**asdict(one), "ctr": one.clicks / one.impressions, "ci95": wilson(one.clicks, one.impressions)}
        for one in traffic
    ]
    comparisons = []
    for b, a in itertools.combinations(traffic, 2):
        pooled = (a.clicks + b.clicks) / (a.impressions + b.impressions)
        once, peeking = false_alarms(a.impressions, b.impressions, pooled, recipe.looks, recipe.aa_tests, recipe.seed)
        tested = two_proportions(a.clicks, a.impressions, b.clicks, b.impressions)
        alarms = {"false_alarms_once": once, "false_alarms_peeking": peeking}
        comparisons.append({"a": a.arm, "b": b.arm, **asdict(tested), **alarms})
    return {"arms": arms, "comparisons": comparisons, "looks": recipe.looks, "aa_tests": recipe.aa_tests}


def show_ab_test(result: Mapping[str, Any]) -> None:
    """Print the arms, their comparisons, and the warning about peeking."""
    columns = ["arm", "impressions", "clicks", "CTR", "95 % interval", "expected CTR", "latency mean", "p95"]
    rows = []
    for arm in result["arms"]:
        low, high = arm["ci95"]
        expected, latency = arm.get("expected_ctr"), arm.get("latency_ms")
        row = [arm["arm"], f"{arm['impressions']:,}", f"{arm['clicks']:,}", f"{arm['ctr']:.4f}"]
        row += [f"[{low:.4f}, {high:.4f}]", "-" if expected is None else f"{expected:.4f}"]
        rows.append(row + ([f"{latency['mean']:,.1f} ms", f"{latency['p95']:,.1f} ms"] if latency else ["-", "-"]))
    simulated = all("over_users" in c for c in result["comparisons"])
    pairs = [
        [
            f"{c['a']} - {c['b']}",
            f"{c['difference']:+.4f}",
            "[{:+.4f}, {:+.4f}]".format(*c["ci95"]),
            *(["[{:+.4f}, {:+.4f}]".format(*c["over_users"]["ci95"])] if simulated else []),
            f"{c['z']:+.2f}",
            f"{c['p']:.4f}" if c["p"] >= 0.0001 else "< 0.0001",
            f"{c['false_alarms_once']:.3f}",
            f"{c['false_alarms_peeking']:.3f}",
        ]
        for c in result["comparisons"]
    ]
    over = ["95 % over visits", "95 % over users"] if simulated else ["95 % interval"]
    header = ["comparison", "difference", *over, "z", "p", "false alarms", f"with {result['looks']} looks"]
    parts = [result["title"], markdown_table(columns, rows), markdown_table(header, pairs)]
    show("\n\n".join([*parts, PEEKING.format(looks=result["looks"])]))
