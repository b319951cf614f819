"""The settings of stages 4, 5 and 7."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from twice_rec.cf.baselines import BASELINES
from twice_rec.cf.recipe import RankedList
from twice_rec.data.candidates import ListKind
from twice_rec.data.dataset import KNOWN_SCORES
from twice_rec.grpo.recipe import is_grpo_variant
from twice_rec.llm.recipe import ModelConfig, PromptConfig
from twice_rec.recipe import DeviceConfig, Recipe, Settings, key, rule


def _is_ours(variant: str) -> bool:
    return variant in ("base", "stage2", *KNOWN_SCORES) or is_grpo_variant(variant)


class LLMRankingConfig(Settings):
    """How a language model is asked, and how its completions become a ranking."""

    with_rationale: bool = key(True, "ask for a rationale first (task 3), or for the item alone (task 2)")
    num_samples: int = key(5, "ranking sampled: completions per question", ge=1)
    temperature: float = key(0.9, "ranking sampled: temperature of the sampling", gt=0)
    top_p: float = key(
        1.0, "ranking sampled: sample from the likeliest tokens that together have this probability", gt=0, le=1
    )
    vote_ties: Literal["against_target", "listed"] = key(
        "against_target",
        "ranking sampled: rank of a target that ties with others, mostly all without a vote: behind them, or as listed",
    )
    max_new_tokens: int = key(300, "longest completion in tokens", ge=1)


class EvaluateRecipe(Recipe, LLMRankingConfig, ModelConfig, PromptConfig, DeviceConfig):
    """Stage 4: the same test questions to every variant."""

    RENAMED: ClassVar = {"outside_scores": "precomputed_scores"}

    variants: list[str] = key(
        ["base", "stage2", "stage3"],
        "what is evaluated: base, stage2, stage3 or stage3_NAME (grpo's variant); for the synthetic domain "
        f"{', '.join(KNOWN_SCORES)}; or a name in precomputed_scores",
    )
    model_name_or_path: str | None = key(None, "variant base: the model that stage 2 starts from")
    precomputed_scores: dict[str, str] = key(
        {}, "score files of other models: variant name -> .npz with `scores` [users, items]"
    )
    num_users: int | None = key(
        None, "language models are asked about this many test users, drawn by seed; null for all", ge=1
    )
    lists: list[ListKind] = key(["uniform"], "candidate lists that language models are asked about")
    score_lists: list[RankedList] = key(
        ["uniform", "full"], "lists that the oracle, ceilings and precomputed scores rank"
    )
    rankings: list[Literal["likelihood", "sampled"]] = key(
        ["likelihood"],
        "how completions become a ranking; the first keeps the variant's name, the second is <variant>_<ranking>",
    )
    batch_size: int = key(8, "questions per batch", ge=1)

    @rule
    def something_is_ranked(self) -> str | None:
        return None if self.rankings else "rankings is empty; give likelihood, sampled or both"

    @rule
    def the_base_is_named(self) -> str | None:
        if "base" in self.variants and self.model_name_or_path is None:
            return "variants names base: set model_name_or_path to the model that stage 2 starts from"
        return None

    @rule
    def variants_differ(self) -> str | None:
        repeated = len(set(self.variants)) < len(self.variants)
        return f"variants names one twice: {', '.join(self.variants)}" if repeated else None

    @rule
    def precomputed_scores_have_names_of_their_own(self) -> str | None:
        if any(map(_is_ours, self.precomputed_scores)):
            return "precomputed_scores uses a name of ours (base, stage2, stage3, oracle, ceiling_...); choose another"
        for name in self.precomputed_scores:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
                return f"precomputed_scores has the name {name!r}; it names a folder: letters, digits, _ . -"
            if name.lower() in (*BASELINES, "sasrec") or name.lower().startswith(("base_", "stage2", "stage3")):
                return f"precomputed_scores has the name {name!r}, which other results have; choose another"
        return None

    @rule
    def variants_are_known(self) -> str | None:
        if unknown := [v for v in self.variants if not _is_ours(v) and v not in self.precomputed_scores]:
            return (
                f"variants names {', '.join(unknown)}; known are base, stage2, stage3, stage3_NAME, "
                f"{', '.join(KNOWN_SCORES)} and the names in precomputed_scores"
            )
        return None


class ReportRecipe(Recipe):
    """Stage 5: tables of everything under eval/."""

    other_runs: list[str] = key([], "run folders of other seeds on the same data, averaged with run_dir's")
    comparisons: list[list[str]] = key([], "pairs of variants, [a, b], that are compared on the users both have")
    comparison_metric: str = key("uniform/hr@1", "metric of the comparisons")
    bootstrap_samples: int = key(1000, "resamples behind each 95 % interval", ge=100)

    @rule
    def comparisons_are_pairs(self) -> str | None:
        pairs = all(len(pair) == 2 for pair in self.comparisons)
        return None if pairs else "comparisons holds something that is not a pair [a, b]"


class AbTestRecipe(Recipe, DeviceConfig):
    """Stage 7: an A/B test: a simulation on the synthetic domain's click model, or the log of a real test."""

    arms: dict[str, float] = key(
        {"random": 0.0851, "sasrec": 0.8702, "stage3": 0.0447},
        "simulation: arm -> share of the visits; an arm is random, a language model or CF model under eval/, or oracle",
    )
    visits: int = key(355_150, "simulation: visits, each of which shows one item", ge=1)
    shown_list: ListKind = key("uniform", "simulation: candidate list of which an arm shows the first of its ranking")
    latency_calls: int = key(
        50, "simulation: real calls per arm, one user at a time, whose latency is measured; 0 for none", ge=0
    )
    impressions_file: str | None = key(
        None, "log of a real test instead of the simulation: JSON lines with arm and clicked (true, false, 0, 1)"
    )
    looks: int = key(20, "peeking: how often p is looked at in a simulated A/A test with the same traffic", ge=1)
    aa_tests: int = key(2000, "peeking: number of simulated A/A tests", ge=100)

    @rule
    def arms_share_the_visits(self) -> str | None:
        if len(self.arms) < 2:
            return f"arms has {', '.join(self.arms) or 'nothing'}; a test needs at least two arms"
        if wrong := [name for name in self.arms if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name)]:
            return f"arms has the name {wrong[0]!r}; it names a folder under eval/: letters, digits, _ . -"
        if any(share <= 0 for share in self.arms.values()) or abs(sum(self.arms.values()) - 1) > 1e-6:
            shares = " + ".join(f"{share:g}" for share in self.arms.values())
            return f"arms has the shares {shares}; they must be above 0 and sum to 1"
        return None
