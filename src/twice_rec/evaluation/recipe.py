"""The settings of stages 4, 5 and 7."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import ValidationError

from twice_rec.cf.baselines import BASELINES
from twice_rec.cf.recbole_models import RECBOLE_MODELS
from twice_rec.cf.recipe import HintConfig, RankedList
from twice_rec.data.candidates import ListKind
from twice_rec.data.dataset import KNOWN_SCORES
from twice_rec.grpo.recipe import is_grpo_variant
from twice_rec.llm.recipe import ANOTHER_MODEL, ModelConfig, PromptConfig
from twice_rec.rationales.recipe import ClientConfig, SamplingConfig
from twice_rec.recipe import DeviceConfig, Recipe, Settings, is_named, key, rule
from twice_rec.records import Condition
from twice_rec.sft.recipe import is_sft_variant

_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def _is_ours(variant: str) -> bool:
    return variant in ("base", *KNOWN_SCORES) or is_sft_variant(variant) or is_grpo_variant(variant)


# Settings of an evaluation that say how a language model was asked and ranked; results of others are not its equals.
TERMS = (
    "ranking", "num_samples", "temperature", "top_p", "with_rationale", "item_first", "max_prompt_tokens",
    "max_new_tokens", "vote_ties", "permutations", "cf_hints",
)  # fmt: skip


def _named_twice(settings: Settings, *keys: str) -> str | None:
    """Return which of some keys with lists names something twice, in words; None if none does."""
    for name in keys:
        if len(set(getattr(settings, name))) < len(getattr(settings, name)):
            return f"{name} names one twice: {', '.join(getattr(settings, name))}"
    return None


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
    permutations: int = key(
        1,
        "orders of the candidates in which every question is asked: as stored, the others drawn by seed; the ranking "
        "is that of all their votes, or of their mean probabilities",
        ge=1,
    )


class EvaluateRecipe(Recipe, LLMRankingConfig, ModelConfig, PromptConfig, HintConfig, DeviceConfig):
    """Stage 4: the same test questions to every variant."""

    RENAMED: ClassVar = {"outside_scores": "precomputed_scores"}

    variants: list[str] = key(
        ["base", "stage2", "stage3"],
        "what is evaluated: base; stage2, stage2_NAME (sft's variant); stage3, stage3_NAME (grpo's); for the synthetic "
        f"domain {', '.join(KNOWN_SCORES)}; or a name in precomputed_scores",
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
    suffix: str | None = key(
        None,
        "added to the names of language models' results, for those that are asked in another way: item_only writes "
        "stage2 to stage2_item_only; null for none",
        changes_result=False,
    )
    batch_size: int = key(8, "questions per batch", ge=1)

    def lists_of(self, variant: str) -> list[RankedList]:
        """Return the lists that a score file ranks: of what is truly known, those that favour no item."""
        if variant not in KNOWN_SCORES:
            return self.score_lists
        return [kind for kind in self.score_lists if kind in ("uniform", "full")]

    def result_name(self, variant: str, ranking: str) -> str:
        """Return the name of a language model's results under eval/."""
        last = None if ranking == self.rankings[0] else ranking
        return "_".join(part for part in (variant, self.suffix, last) if part is not None)

    def ranking_settings(self, ranking: str) -> dict[str, Any]:
        """Return what changes the results of a language model by one ranking."""
        reads = ["num_users", "lists", "with_rationale", "max_prompt_tokens", "max_new_tokens", "batch_size", "dtype"]
        reads += ["item_first", "seed", "permutations"]
        reads += ["num_samples", "temperature", "top_p", "vote_ties"] if ranking == "sampled" else []
        hints = f"{self.cf_hints} of {self.cf_model}" if self.cf_hints else 0
        return {"ranking": ranking, **{key: getattr(self, key) for key in reads}, "cf_hints": hints}

    @property
    def settings_alone(self) -> list[str]:
        """See `ModelConfig`; a question is always computed once for its completions."""
        return [ANOTHER_MODEL]

    @rule
    def suffix_is_part_of_a_name(self) -> str | None:
        if self.suffix is None or (self.suffix and is_named(f"stage2_{self.suffix}", "stage2")):
            return None
        return f"suffix is {self.suffix!r}; use letters, digits, _ . - and no word sampled or likelihood at the end"

    @rule
    def something_is_ranked(self) -> str | None:
        return (
            _named_twice(self, "rankings") if self.rankings else "rankings is empty; give likelihood, sampled or both"
        )

    @rule
    def the_base_is_named(self) -> str | None:
        if "base" in self.variants and self.model_name_or_path is None:
            return "variants names base: set model_name_or_path to the model that stage 2 starts from"
        return None

    @rule
    def variants_differ(self) -> str | None:
        return _named_twice(self, "variants")

    @rule
    def precomputed_scores_have_names_of_their_own(self) -> str | None:
        if any(map(_is_ours, self.precomputed_scores)):
            return "precomputed_scores uses a name of ours (base, stage2, stage3, oracle, ceiling_...); choose another"
        for name in self.precomputed_scores:
            if not _FOLDER.fullmatch(name):
                return f"precomputed_scores has the name {name!r}; it names a folder: letters, digits, _ . -"
            if name.lower() in (*BASELINES, *RECBOLE_MODELS, "sasrec") or name.lower().startswith(
                ("base_", "stage2", "stage3")
            ):
                return f"precomputed_scores has the name {name!r}, which other results have; choose another"
        return None

    @rule
    def variants_are_known(self) -> str | None:
        if unknown := [v for v in self.variants if not _is_ours(v) and v not in self.precomputed_scores]:
            return (
                f"variants names {', '.join(unknown)}; known are base, stage2, stage2_NAME, stage3, stage3_NAME, "
                f"{', '.join(KNOWN_SCORES)} and the names in precomputed_scores"
            )
        return None


class ReportRecipe(Recipe):
    """Stage 5: tables of everything under eval/."""

    other_runs: list[str] = key([], "run folders of other seeds on the same data, averaged with run_dir's")
    domain_reports: list[str] = key(
        [],
        "finished reports of other domains, each by its folder or its run's; theirs and this run's results become one "
        "table, as the paper's Table 1",
    )
    missing_domains: list[str] = key(
        [], "domains without a report, which stand in that table as missing; a study names those that failed"
    )
    comparisons: list[list[str]] = key(
        [],
        "pairs of variants, [a, b], that are compared on the users both have; both must have been asked in the same "
        "way, but for what is named behind them: [stage2, stage2_item_only, with_rationale]",
    )
    comparison_metric: str = key("uniform/hr@1", "metric of the comparisons")
    bootstrap_samples: int = key(1000, "resamples behind each 95 % interval", ge=100)
    quote: str | None = key(
        None,
        "also write what documents quote to this JSON file: figures, comparisons and claims, with commands, commits, "
        "machine and seeds",
        changes_result=False,
    )

    @rule
    def domains_are_named_once(self) -> str | None:
        return _named_twice(self, "domain_reports", "missing_domains")

    @rule
    def comparisons_are_pairs(self) -> str | None:
        if any(len(pair) < 2 for pair in self.comparisons):
            return "comparisons holds something that is not a pair [a, b]"
        if unknown := [name for _, _, *names in self.comparisons for name in names if name not in TERMS]:
            return f"comparisons names {unknown[0]} behind a pair [a, b]; there it can be {', '.join(TERMS)}"
        return None


class JudgeConfig(SamplingConfig, ClientConfig):
    """Who judges, and how a language model is asked."""

    judged_by: Literal["rule", "openai", "batch"] = key(
        "rule",
        "who judges: rule knows the true reasons of the synthetic domain; openai asks any OpenAI-compatible server; "
        "batch writes and reads files for OpenAI's Batch API or vLLM's run_batch",
    )

    @property
    def asks_a_model(self) -> bool:
        """Whether a language model judges."""
        return self.judged_by != "rule"

    def what_decides(self) -> dict[str, Any]:
        """Return the settings on which the verdicts depend."""
        return {"judged_by": "model", **self.values_of(SamplingConfig)} if self.asks_a_model else {"judged_by": "rule"}

    @rule
    def a_model_is_named(self) -> str | None:
        return f"judged_by {self.judged_by} needs model, found null" if self.asks_a_model and not self.model else None


class JudgeRecipe(Recipe, JudgeConfig):
    """Stage 4b: what the rationales of evaluated models are worth."""

    variants: list[str] = key(["base", "stage2", "stage3"], "evaluations whose rationales are judged: folders of eval/")
    num_judged: int = key(300, "users whose answers are judged, drawn by seed, the same for all variants", ge=1)
    judged_list: ListKind = key("uniform", "candidate list that the models were asked about")
    conditions: list[Condition] = key(
        ["item_shown", "item_hidden", "counterfactual"],
        "what judges see: the recommended item and its rationale; the rationale without the item, to find it; the item "
        "and another user's rationale, as a control",
    )
    judges: dict[str, dict[str, Any]] = key(
        {"rule": {}}, "judges by name, each with the keys in which it differs from the recipe's", hidden=True
    )
    human_labels: str | None = key(None, "file of scores that humans gave, whose agreement is measured; null for none")
    export_for_labels: str | None = key(
        None, "only write the file that humans fill in, without scores, to this path", changes_result=False
    )
    dry_run: bool = key(False, "only say how many calls, tokens and how much money it takes", changes_result=False)

    @property
    def configs(self) -> Mapping[str, JudgeConfig]:
        """The settings of each judge; ValidationError if a judge's own keys cannot be."""
        shared = self.values_of(JudgeConfig)
        return {name: JudgeConfig.model_validate({**shared, **own}) for name, own in self.judges.items()}

    @rule
    def something_is_judged(self) -> str | None:
        empty = [name for name in ("variants", "conditions", "judges") if not getattr(self, name)]
        return f"{', '.join(empty)} is empty; there is nothing to judge" if empty else None

    @rule
    def nothing_is_judged_twice(self) -> str | None:
        return _named_twice(self, "variants", "conditions")

    @rule
    def variants_are_folders(self) -> str | None:
        wrong = [name for name in self.variants if not _FOLDER.fullmatch(name)]
        return f"variants holds {wrong[0]!r}, which is no folder of eval/: letters, digits, _ . -" if wrong else None

    @rule
    def judges_can_be_asked(self) -> str | None:
        shared = self.values_of(JudgeConfig)
        for name, own in self.judges.items():
            if not _FOLDER.fullmatch(name):
                return f"judges has the name {name!r}; it names a file: letters, digits, _ . -"
            if unknown := sorted(own.keys() - shared.keys()):
                return f"judges: {name}: unknown key {unknown[0]}; a judge may have the keys {', '.join(shared)}"
            try:
                JudgeConfig.model_validate({**shared, **own})
            except ValidationError as error:
                fault = error.errors(include_input=False)[0]
                where = ".".join(map(str, fault["loc"][:1]))
                return f"judges: {name}: {where}{': ' if where else ''}{fault['msg'].removeprefix('Value error, ')}"
        return None


class AbTestRecipe(Recipe, DeviceConfig):
    """Stage 4c: an A/B test: a simulation on the synthetic domain's click model, or the log of a real test."""

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
