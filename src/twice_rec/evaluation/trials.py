"""What judges and the A/B test found, read from their files for claims, figures and tables.

The files are those of the stages `judge` (`judge/<variant>/scores.json`) and `ab_test` (`ab_test/ab_test.json`). What
is not there is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEVELS = 4  # scores 0 to 3
BEST = f"share_{LEVELS - 1}"

Value = Mapping[str, Any]  # mean, ci95


@dataclass(frozen=True)
class Judged:
    """What one judge said under one condition.

    Args:
        condition: `item_shown`, `counterfactual` (another user's rationale) or `item_hidden` (which item is it about?).
        share: of satisfying rationales, score 3; if the item is hidden, of rationales that point to their item.
        distribution: number of rationales with each score; empty if the item is hidden.
        chance: of pointing to the item by a guess; None unless the item is hidden.
    """

    judge: str
    condition: str
    n: int
    without_verdict: int
    share: Value | None
    distribution: tuple[int, ...] = ()
    chance: float | None = None


def judged_of(scores: Mapping[str, Any]) -> list[Judged]:
    """Return what `scores.json` holds, judge by judge."""
    found = []
    for judge, conditions in scores.get("judges", {}).items():
        for condition, of in conditions.items():
            levels = of.get("distribution") or {}
            distribution = tuple(int(levels.get(str(level), 0)) for level in range(LEVELS)) if levels else ()
            share = _value(of, BEST if levels else "share")
            counts = int(of.get("n", 0)), int(of.get("without_verdict", 0))
            found.append(Judged(str(judge), condition, *counts, share, distribution, of.get("chance")))
    return found


def _value(of: Mapping[str, Any], name: str) -> Value | None:
    mean, interval = of.get(name), of.get(f"{name}_ci95")
    return None if mean is None or interval is None else {"mean": float(mean), "ci95": [float(x) for x in interval]}


def difference_of(tests: Mapping[str, Any], firsts: Sequence[str], seconds: Sequence[str]) -> dict[str, Any] | None:
    """Return the comparison of two arms in an A/B test, the first less the second; None if there is none.

    Of a simulation it is that over users: its visits are many visits of a few users. `counted` says what `n` counts.

    Args:
        tests: what `ab_test.json` holds.
        firsts, seconds: names that the arms may have.
    """
    shown = {row["arm"]: row["impressions"] for row in tests.get("arms", [])}
    for row in tests.get("comparisons", []):
        a, b = row["a"], row["b"]
        found = {"n": shown.get(a, 0) + shown.get(b, 0), "p": row.get("p"), "counted": "impressions"}
        if of_users := row.get("over_users"):
            row, found = of_users, {"n": of_users["n"], "p": of_users["p"], "counted": "users"}
        low, high = row["ci95"]
        if a in firsts and b in seconds:
            return {**found, "a": a, "b": b, "difference": row["difference"], "ci95": [low, high]}
        if b in firsts and a in seconds:
            return {**found, "a": b, "b": a, "difference": -row["difference"], "ci95": [-high, -low]}
    return None


def is_simulated(tests: Mapping[str, Any]) -> bool:
    """Return whether nobody was asked."""
    return bool(tests.get("kind", "simulation") == "simulation")
