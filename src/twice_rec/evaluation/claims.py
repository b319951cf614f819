"""What the paper claims of its method, and what the results here say of each claim.

A claim names two variants and which of them is better. The verdict comes from the 95 % interval of their paired
difference, or of a share: `shown` if the interval lies on the claimed side, `contradicted` if it lies on the other,
`not shown` if it holds both, and `not run` if a result is missing. Such an interval is over users and says nothing of
other seeds, so with several seeds each one's own difference must lie on that side too. Nothing here is typed by hand
but the claims.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twice_rec.evaluation.equals import usable_json
from twice_rec.evaluation.names import RANKINGS, SUFFIXES
from twice_rec.evaluation.paper import SATISFYING_SHARE
from twice_rec.evaluation.recipe import ReportRecipe
from twice_rec.evaluation.report import Variant, compare, unequal
from twice_rec.evaluation.trainings import ANY, other_than_promised, trained_otherwise
from twice_rec.evaluation.trials import difference_of, is_simulated, judged_of
from twice_rec.manifest import Hashes, making_command
from twice_rec.metrics import holm

SHOWN, NOT_SHOWN, CONTRADICTED, NOT_RUN = "shown", "not shown", "contradicted", "not run"
VERDICTS = (SHOWN, NOT_SHOWN, CONTRADICTED, NOT_RUN)


@dataclass(frozen=True)
class Claim:
    """One claim of the paper: variant `a` is better than variant `b`, or at least as good if `or_equal`."""

    id: str
    question: str
    short: str
    says: str
    a: str
    b: str
    or_equal: bool = False
    but_for: tuple[str, ...] = ()  # how the two are asked differently, because the claim is about that
    apart: tuple[str, ...] = ()  # how the two are trained differently, because the claim is about that


_WITHOUT_RATIONALE = ("with_rationale",)
_REWARDS = ("reward_funcs", "reward_weights", "reward_lambda")

# Variant -> keys of its training that a claim about it rests on.
PROMISED: Mapping[str, Mapping[str, Any]] = {
    **{f"stage3_lambda{value}": {"reward_lambda": float(value)} for value in range(6)},
    "stage3_C": {"model_name_or_path": ANY},
    "stage2_no_rationale": {"rationale_rows": 0},
}

CLAIMS: tuple[Claim, ...] = (
    Claim("table1_sasrec", "Table 1", "TWiCE-Rec > SASRec", "TWiCE-Rec ranks better than SASRec.", "stage3", "sasrec"),
    Claim("rq3_b_a", "RQ3", "B > A", "Stage 2 helps: B is above A, the base model.", "stage2", "base"),
    Claim("rq3_e_b", "RQ3", "E > B", "Stage 3 helps: E is above B.", "stage3", "stage2"),
    Claim("rq3_e_d", "RQ3", "E > D", "CF in the reward helps: E is above D, without CF.", "stage3", "stage3_D",
          apart=_REWARDS),
    Claim("rq3_d_b", "RQ3", "D > B", "Stage 3 helps without CF too: D is above B.", "stage3_D", "stage2"),
    Claim("rq3_c_a", "RQ3", "C > A", "Stage 3 helps without stage 2: C is above A.", "stage3_C", "base"),
    Claim("rq3_b_c", "RQ3", "B > C", "Stage 2 alone is above stage 3 alone: B is above C.", "stage2", "stage3_C"),
    Claim("rq4_3_0", "RQ4", "lambda 3 > 0", "Lambda 3 is above lambda 0.", "stage3", "stage3_lambda0",
          apart=("reward_lambda",)),
    Claim(
        "rq4_3_5", "RQ4", "lambda 3 >= 5", "Lambda 3 is not below lambda 5.",
        "stage3", "stage3_lambda5", or_equal=True, apart=("reward_lambda",),
    ),
    Claim(
        "rq6_a_b_stage2", "RQ6", "A > B, stage 2",
        "Writing a rationale first helps stage 2: A is above B, asked for the item alone.",
        "stage2", "stage2_item_only", but_for=_WITHOUT_RATIONALE,
    ),
    Claim(
        "rq6_a_b_stage3", "RQ6", "A > B, stage 3",
        "Writing a rationale first helps stage 3: A is above B, asked for the item alone.",
        "stage3", "stage3_item_only", but_for=_WITHOUT_RATIONALE,
    ),
    Claim(
        "rq6_b_c", "RQ6", "B > C", "Training on rationales helps an answer without one: B is above C, trained without.",
        "stage2_item_only", "stage2_no_rationale", apart=("rationale_rows", "rationale_weight"),
    ),
)  # fmt: skip

# What the arms of the A/B test are in the paper -> the names that they may have here, see stage `ab_test`.
ARMS: Mapping[str, tuple[str, ...]] = {
    "full": ("full", "stage3", "twice_rec"),
    "ML": ("ML", "ml", "sasrec"),
    "random": ("random",),
}
_CTR_CLAIMS = (
    ("rq5_full_ml", "CTR full > ML", "Shoppers click on TWiCE-Rec more often than on SASRec.", "full", "ML"),
    ("rq5_ml_random", "CTR ML > random", "Shoppers click on SASRec more often than on random items.", "ML", "random"),
)

# The stage that makes a variant's evaluation; all others come from a study.
_MADE_BY = {"sasrec": "sasrec", "base": "evaluate", "stage2": "evaluate", "stage3": "evaluate"}


def verdict(low: float, high: float, or_equal: bool = False, by_seed: Sequence[float] = ()) -> str:
    """Return what an interval of a claimed difference says: it is above 0, or at least 0 if `or_equal`.

    Args:
        by_seed: the difference of each seed, if there are several.
    """
    if low > 0 or (or_equal and low >= 0):
        return SHOWN if all(of > 0 or (or_equal and of >= 0) for of in by_seed) else NOT_SHOWN
    return CONTRADICTED if high < 0 and all(of < 0 for of in by_seed) else NOT_SHOWN


def claims_of(variants: Mapping[str, Variant], recipe: ReportRecipe, hashes: Hashes) -> list[dict[str, Any]]:
    """Return one row per claim, for `results.json`; Holm's p-values are over all rows that have one.

    A claim about two language models has a row more for each second ranking that both have, such as by votes.
    """
    run_dir = recipe.run_path
    rows = [_compared(claim, suffix, variants, recipe) for claim, suffix in _with_rankings(variants)]
    rows += [*_judged(run_dir, hashes), *_clicked(run_dir, hashes)]
    with_p = [row for row in rows if row.get("p") is not None]
    for row, adjusted in zip(with_p, holm([row["p"] for row in with_p]), strict=True):
        row["p_holm"] = float(adjusted)
    return rows


def _with_rankings(variants: Mapping[str, Variant]) -> Iterator[tuple[Claim, str]]:
    """Yield every claim, and again for each second ranking of its language models."""
    for claim in CLAIMS:
        yield claim, ""
        for suffix in SUFFIXES:
            if {claim.a + suffix, _ranked(claim.b, suffix)} <= variants.keys():
                yield claim, suffix


def _ranked(variant: str, suffix: str) -> str:
    return variant if variant == "sasrec" else variant + suffix  # a CF model has one ranking only


def _compared(claim: Claim, suffix: str, variants: Mapping[str, Variant], recipe: ReportRecipe) -> dict[str, Any]:
    a, b, metric = claim.a + suffix, _ranked(claim.b, suffix), recipe.comparison_metric
    row = {**_row(claim.id, claim.question, claim.short, claim.says, a, b, metric), "id": claim.id + suffix}
    if missing := [name for name in (a, b) if name not in variants]:
        stages = dict.fromkeys(_MADE_BY.get(name, "study") for name in missing)
        commands = [making_command(recipe.run_path, stage) for stage in stages]
        return {**row, "why": f"{' and '.join(missing)} not evaluated", "commands": commands}
    differs = (
        unequal(variants, a, b, metric, claim.but_for)
        or _hinted(a, variants[a])
        or _trained_for_another(claim, variants[a], variants[b])
    )
    if differs:
        return {**row, "why": differs, "commands": []}
    found = compare(variants, a, b, metric, recipe.bootstrap_samples, recipe.seed)
    return {
        **row,
        **{name: found[name] for name in ("difference", "ci95", "n", "p", "by_seed")},
        "runs": len(found["by_seed"]) or min(variants[a].runs, variants[b].runs),
        "way": RANKINGS.get(variants[a].terms[0].asked.get("ranking", ""), ""),
        "verdict": verdict(*found["ci95"], claim.or_equal, found["by_seed"]),
    }


def _hinted(name: str, variant: Variant) -> str | None:
    """Return that a variant's prompts told what a CF model expects, in words; the paper's do not."""
    hints = variant.terms[0].asked.get("cf_hints")
    return f"{name} was asked with cf_hints {hints}, and the paper's prompts have none" if hints else None


def _trained_for_another(claim: Claim, a: Variant, b: Variant) -> str | None:
    """Return why two variants were not trained as the claim says, in words; None if they were."""
    for name, variant in ((claim.a, a), (claim.b, b)):
        promised = PROMISED.get(name, {})
        if claim.question == "RQ4" and name == "stage3":
            promised = {"reward_lambda": 3.0}
        if differs := other_than_promised(name, variant, promised):
            return differs
    return trained_otherwise(a, b, claim.apart)


def _row(claim_id: str, question: str, short: str, says: str, a: str, b: str, metric: str) -> dict[str, Any]:
    """A row of a claim that was not run; what was found is put over it."""
    empty = dict.fromkeys(("difference", "ci95", "n", "runs", "p", "p_holm"))
    return {
        "id": claim_id, "claim": claim_id, "question": question, "short": short, "says": says, "way": "",
        "a": a, "b": b, "metric": metric, **empty, "verdict": NOT_RUN,
    }  # fmt: skip


def _judged(run_dir: Path, hashes: Hashes, variant: str = "stage3") -> list[dict[str, Any]]:
    """Return RQ2's rows: the share of satisfying rationales less the paper's, one row per judge."""
    percent = f"{100 * SATISFYING_SHARE:.2f} %"
    says = f"A judge finds {percent} of the rationales satisfying (score 3)."
    row = _row("rq2_share3", "RQ2", f"score 3 in {percent}", says, variant, "paper", "judge/share_3")
    found, why = usable_json(run_dir / "judge" / variant / "scores.json", hashes)
    rows = []
    for of in judged_of(found or {}):
        if of.condition == "item_shown" and of.share:
            low, high = (bound - SATISFYING_SHARE for bound in of.share["ci95"])
            rows.append(
                {
                    **row, "id": f"rq2_share3_{of.judge}", "way": f"judge {of.judge}",
                    "difference": of.share["mean"] - SATISFYING_SHARE, "ci95": [low, high], "n": of.n, "runs": 1,
                    "value": of.share["mean"], "value_ci95": of.share["ci95"], "paper": SATISFYING_SHARE,
                    "verdict": verdict(low, high, or_equal=True),
                }
            )  # fmt: skip
    return rows or [{**row, "why": why or "no score", "commands": [making_command(run_dir, "judge")]}]


def _clicked(run_dir: Path, hashes: Hashes) -> Iterator[dict[str, Any]]:
    """Yield RQ5's rows: differences of click-through rates in the A/B test, which is mostly simulated."""
    found, why = usable_json(run_dir / "ab_test" / "ab_test.json", hashes)
    for claim_id, short, says, a, b in _CTR_CLAIMS:
        row = _row(claim_id, "RQ5", short, says, a, b, "ctr")
        if test := difference_of(found or {}, ARMS[a], ARMS[b]):
            way = "in a simulation" if is_simulated(found or {}) else ""
            yield {**row, **test, "way": way, "runs": 1, "verdict": verdict(*test["ci95"])}
        else:
            yield {**row, "why": why or "the test has no such arms", "commands": [making_command(run_dir, "ab_test")]}


def counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return verdict -> how many rows have it."""
    return {name: sum(row["verdict"] == name for row in rows) for name in VERDICTS}
