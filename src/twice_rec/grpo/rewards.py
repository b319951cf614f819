"""The rewards of stage 3: pure functions of parsed answers, outcomes and confidences (the paper, Eqs. 2-5).

`Scored` holds everything a reward may look at for one completion; `score_completions` fills it for a whole step, asking
the CF model once. Each reward is a function of one `Scored`; `REWARDS` names them for recipes. `StepRewards` is what
the trainer calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from twice_rec.answer_format import WITH_RATIONALE, ParsedAnswer, closing, opening, parse, without_tags
from twice_rec.catalog import ItemCatalog, Outcome
from twice_rec.config import GrpoRecipe
from twice_rec.data.dataset import PreparedData
from twice_rec.metrics import ranks_from_scores
from twice_rec.prompts import Message, rationale_answer


class ConfidenceModel(Protocol):
    """What the rewards need of a CF model; `sasrec.scorer.SasRecScorer` has it."""

    def confidences(
        self, histories: Sequence[Sequence[int]], candidates: NDArray[np.int64], kind: str, debiased: bool
    ) -> NDArray[np.float32]:
        """Confidence in each candidate: item indices [B, C] -> float32 [B, C] in [0, 1]."""
        ...


class Policy(Protocol):
    """What the reward `rank` needs of the model in training; `llm.generation.PolicyScorer` has it."""

    def score(self, prompt: Sequence[Message], answers: Sequence[str]) -> Sequence[float]:
        """Log-probability of each answer to one prompt, up to a constant they share."""
        ...


@dataclass(frozen=True, slots=True)
class Scored:
    """One completion, as the rewards see it.

    Args:
        answer: its parsed text.
        outcome: hit, miss, outside the candidates, or malformed.
        confidence: the CF model's confidence in the recommended item; 0 where there is none, or it is no candidate.
        target_rank: rank of the target among the candidates by the policy's likelihood of each candidate's answer after
            this completion's rationale, 1 is best; None where there is no rationale, or no reward asks for it.
    """

    answer: ParsedAnswer
    outcome: Outcome
    confidence: float
    target_rank: int | None = None


@dataclass(frozen=True, slots=True)
class RewardSettings:
    """lambda and tau of Eq. 2; what the reward `rank` makes of the target's rank."""

    lambda_: float
    tau: float
    rank_metric: Literal["reciprocal_rank", "ndcg"]


def match(scored: Scored, settings: RewardSettings) -> float:
    """1 if the recommended item is the target, else 0."""
    return float(scored.outcome is Outcome.HIT)


def cf(scored: Scored, settings: RewardSettings) -> float:
    """The CF model's confidence in the recommended candidate, else 0."""
    return scored.confidence


def collaborative(scored: Scored, settings: RewardSettings) -> float:
    """Eq. 2: a hit earns 1, and lambda * confidence more where the CF model is confident; a miss its confidence.

    Below tau a hit earns 1 and a miss 0. An item outside the candidate list, and a malformed answer, earn 0 (the
    release pays confidence for any catalogue title).
    """
    if scored.outcome is Outcome.HIT:
        return 1.0 + (settings.lambda_ * scored.confidence if scored.confidence >= settings.tau else 0.0)
    if scored.outcome is Outcome.MISS and scored.confidence >= settings.tau:
        return scored.confidence
    return 0.0


def structure(scored: Scored, settings: RewardSettings) -> float:
    """Eq. 3: 1 if both a complete item and a complete rationale are there, else 0."""
    return float(scored.answer.is_complete(WITH_RATIONALE))


# The paper's four tags, with the element that decides (the id) for its single <item>; and the release's six.
_FOUR_TAGS = tuple(tag for field in ("think", "item_id") for tag in (opening(field), closing(field)))
_SIX_TAGS = tuple(tag for field in WITH_RATIONALE for tag in (opening(field), closing(field)))


def tags(scored: Scored, settings: RewardSettings) -> float:
    """Eq. 4: a quarter for each of the four tags that is there exactly once, so at most 1."""
    return 0.25 * sum(scored.answer.counts.get(tag, 0) == 1 for tag in _FOUR_TAGS)


def tags_release(scored: Scored, settings: RewardSettings) -> float:
    """The release's form of Eq. 4: a quarter for each of its six tags that is there exactly once, so at most 1.5."""
    return 0.25 * sum(scored.answer.counts.get(tag, 0) == 1 for tag in _SIX_TAGS)


def only_expected_tags(scored: Scored, settings: RewardSettings) -> float:
    """The release's third format reward: 1 if no other tag occurs, else 0."""
    unexpected = scored.answer.other_tags + sum(n for tag, n in scored.answer.counts.items() if tag not in _SIX_TAGS)
    return float(unexpected == 0)


def rank(scored: Scored, settings: RewardSettings) -> float:
    """How high the policy itself ranks the target after its rationale: 1 / rank or 1 / log2(1 + rank), in [0, 1].

    0 without a complete rationale: there is nothing to rank after.
    """
    if scored.target_rank is None:
        return 0.0
    reciprocal = settings.rank_metric == "reciprocal_rank"
    return 1.0 / scored.target_rank if reciprocal else 1.0 / math.log2(1 + scored.target_rank)


REWARDS: Mapping[str, Callable[[Scored, RewardSettings], float]] = {
    function.__name__: function
    for function in (collaborative, match, cf, structure, tags, tags_release, only_expected_tags, rank)
}


def score_completions(
    texts: Sequence[str],
    candidates: Sequence[Sequence[str]],
    targets: Sequence[str],
    histories: Sequence[Sequence[str]],
    catalog: ItemCatalog,
    model: ConfidenceModel,
    kind: str,
    debiased: bool,
) -> list[Scored]:
    """Parse and judge a step's completions; the CF model is asked once, for the different prompts.

    Args:
        texts: one a completion; the other sequences have its prompt's candidate ids, target id and history ids.
        kind, debiased: see `sasrec.scorer`.

    Returns:
        One `Scored` a completion.
    """
    prompts: dict[tuple[tuple[str, ...], tuple[str, ...]], int] = {}
    prompt_of = [
        prompts.setdefault((tuple(history), tuple(shown)), len(prompts))
        for history, shown in zip(histories, candidates, strict=True)
    ]
    confidences = model.confidences(
        [catalog.indices(history) for history, _ in prompts],
        np.array([catalog.indices(shown) for _, shown in prompts]),
        kind,
        debiased,
    )
    scored = []
    for text, shown, target, prompt in zip(texts, candidates, targets, prompt_of, strict=True):
        answer = parse(text)
        outcome = catalog.outcome(answer, shown, target)
        names_candidate = outcome in (Outcome.HIT, Outcome.MISS)
        confidence = float(confidences[prompt, list(shown).index(answer.item_id or "")]) if names_candidate else 0.0
        scored.append(Scored(answer, outcome, confidence))
    return scored


def target_ranks(
    policy: Policy,
    prompts: Sequence[Sequence[Message]],
    scored: Sequence[Scored],
    candidates: Sequence[Sequence[str]],
    targets: Sequence[str],
    catalog: ItemCatalog,
) -> list[int | None]:
    """Each completion's `Scored.target_rank`, as evaluation ranks by likelihood; ties count against the target.

    The policy scores all candidates of a list at once, but each completion apart, since each has its own rationale.
    """
    ranks: list[int | None] = []
    for prompt, entry, shown, target in zip(prompts, scored, candidates, targets, strict=True):
        if not entry.answer.rationale:
            ranks.append(None)
            continue
        rationale = without_tags(entry.answer.rationale)
        scores = policy.score(prompt, [rationale_answer(rationale, catalog[item_id]) for item_id in shown])
        ranks.append(int(ranks_from_scores([list(scores)], [list(shown).index(target)])[0]))
    return ranks


# What a rollout may say of a completion, as columns beside it; kept with the completion.
ROLLOUT_COLUMNS = ("policy_version", "truncated")


class StepRewards:
    """The rewards of a recipe as the functions that TRL's GRPOTrainer calls, all of one step scored together.

    With each step's completions TRL keeps these columns: `outcome`, `target` (its id), `recommended` (the id of the
    candidate that is named, or empty), `confidence`, `log_popularity` (natural logarithm of 1 + the recommended
    candidate's training purchases; NaN without one), and those of `ROLLOUT_COLUMNS` that the rollout gives.

    Args:
        names: of `REWARDS`.
        settings: lambda, tau, and the measure of `rank`.
        catalog, model, kind, debiased: see `score_completions`.
        purchases: int64 [N + 1], training purchases of each item index.
        policy: the model in training; only `rank` asks it.
    """

    def __init__(
        self,
        names: Sequence[str],
        settings: RewardSettings,
        catalog: ItemCatalog,
        model: ConfidenceModel,
        kind: str,
        debiased: bool,
        purchases: NDArray[np.int64],
        policy: Policy | None = None,
    ):
        if "rank" in names and policy is None:
            raise ValueError("the reward rank needs the policy")
        self.settings = settings
        self._catalog = catalog
        self._policy = policy if "rank" in names else None
        self._log_popularity = np.log1p(purchases)
        self._score = lambda texts, columns: score_completions(
            texts, columns["candidates"], columns["target"], columns["history"], catalog, model, kind, debiased
        )
        self._last: tuple[Any, list[Scored]] | None = None
        self.functions = [self._named(name) for name in names]

    @classmethod
    def of(cls, recipe: GrpoRecipe, data: PreparedData, model: ConfidenceModel, policy: Policy) -> StepRewards:
        """The rewards of a recipe."""
        items = [index for history in data.training_histories() for index in history]
        return cls(
            recipe.reward_funcs,
            RewardSettings(recipe.reward_lambda, tau_of(recipe, data, model), recipe.reward_rank),
            data.catalog,
            model,
            recipe.confidence,
            recipe.confidence_debiased,
            np.bincount(items, minlength=len(data.catalog) + 1),
            policy,
        )

    def _named(self, name: str) -> Callable[..., list[float]]:
        def reward(prompts: Any, completions: Sequence[Any], log_extra: Any = None, **columns: Any) -> list[float]:
            scored = self._of_step(prompts, completions, log_extra, columns)
            return [REWARDS[name](entry, self.settings) for entry in scored]

        reward.__name__ = name
        return reward

    def _of_step(
        self, prompts: Any, completions: Sequence[Any], log_extra: Any, columns: Mapping[str, Any]
    ) -> list[Scored]:
        """The step's completions, scored when the first reward asks."""
        if self._last is None or self._last[0] is not completions:
            scored = self._score([completion[0]["content"] for completion in completions], columns)
            if self._policy is not None:
                shown, targets = columns["candidates"], columns["target"]
                ranks = target_ranks(self._policy, prompts, scored, shown, targets, self._catalog)
                scored = [replace(entry, target_rank=r) for entry, r in zip(scored, ranks, strict=True)]
            self._last = (completions, scored)
            if log_extra is not None:
                for name, values in self._kept(scored, columns).items():
                    log_extra(name, values)
        return self._last[1]

    def _kept(self, scored: Sequence[Scored], columns: Mapping[str, Any]) -> dict[str, list[Any]]:
        named = [entry.answer.item_id if entry.outcome in (Outcome.HIT, Outcome.MISS) else None for entry in scored]
        return {
            "outcome": [entry.outcome.value for entry in scored],
            "target": list(columns["target"]),
            "recommended": [item_id or "" for item_id in named],
            "confidence": [entry.confidence for entry in scored],
            "log_popularity": [
                float(self._log_popularity[self._catalog.index(item_id)]) if item_id else math.nan for item_id in named
            ],
            **{name: list(columns[name]) for name in ROLLOUT_COLUMNS if name in columns},
        }


def tau_of(recipe: GrpoRecipe, data: PreparedData, model: ConfidenceModel) -> float:
    """Tau as the recipe gives it, or as a quantile of its kind of confidence in all validation candidates."""
    if recipe.reward_tau_quantile is None:
        assert recipe.reward_tau is not None  # the recipe's checks: one of the two is given
        return recipe.reward_tau
    (kind,) = data.candidates("train")[0].lists
    examples = list(data.examples("valid", kind))
    confidences = model.confidences(
        [data.catalog.indices(entry.item_id for entry in example.history) for example in examples],
        np.array([data.catalog.indices(example.candidates) for example in examples]),
        recipe.confidence,
        recipe.confidence_debiased,
    )
    return float(np.quantile(confidences, recipe.reward_tau_quantile))
