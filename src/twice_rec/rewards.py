"""The rewards of stage 3: pure functions of parsed answers, outcomes and confidences (the paper, Eqs. 2-5).

`Scored` holds everything a reward may look at for one completion; `score_completions` fills it for a whole step, asking
the CF model once. Each reward is a function of one `Scored`; `REWARDS` names them for recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from twice_rec.catalog import ItemCatalog, Outcome
from twice_rec.tags import WITH_RATIONALE, ParsedAnswer, closing, opening, parse


class ConfidenceModel(Protocol):
    """What the rewards need of a CF model; `sasrec.scorer.SasRecScorer` has it."""

    def confidences(
        self, histories: Sequence[Sequence[int]], candidates: NDArray[np.int64], kind: str, debiased: bool
    ) -> NDArray[np.float32]:
        """Confidence in each candidate: item indices [B, C] -> float32 [B, C] in [0, 1]."""
        ...


@dataclass(frozen=True, slots=True)
class Scored:
    """One completion, as the rewards see it.

    Args:
        answer: its parsed text.
        outcome: hit, miss, outside the candidates, or malformed.
        confidence: the CF model's confidence in the recommended item; 0 where there is none, or it is no candidate.
    """

    answer: ParsedAnswer
    outcome: Outcome
    confidence: float


@dataclass(frozen=True, slots=True)
class RewardSettings:
    """lambda and tau of Eq. 2."""

    lambda_: float
    tau: float


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


REWARDS: Mapping[str, Callable[[Scored, RewardSettings], float]] = {
    function.__name__: function
    for function in (collaborative, match, cf, structure, tags, tags_release, only_expected_tags)
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


class StepRewards:
    """The rewards of a recipe as the functions that TRL's GRPOTrainer calls, all of one step scored together.

    Args:
        names: of `REWARDS`.
        settings: lambda and tau.
        catalog, model, kind, debiased: see `score_completions`.
    """

    def __init__(
        self,
        names: Sequence[str],
        settings: RewardSettings,
        catalog: ItemCatalog,
        model: ConfidenceModel,
        kind: str,
        debiased: bool,
    ):
        self._settings = settings
        self._score = lambda texts, columns: score_completions(
            texts, columns["candidates"], columns["target"], columns["history"], catalog, model, kind, debiased
        )
        self._last: tuple[Any, list[Scored]] | None = None
        self.functions = [self._named(name) for name in names]

    def _named(self, name: str) -> Callable[..., list[float]]:
        def reward(prompts: Any, completions: Sequence[Any], log_metric: Any = None, **columns: Any) -> list[float]:
            scored = self._of_step(completions, log_metric, columns)
            return [REWARDS[name](entry, self._settings) for entry in scored]

        reward.__name__ = name
        return reward

    def _of_step(self, completions: Sequence[Any], log_metric: Any, columns: Mapping[str, Any]) -> list[Scored]:
        """The step's completions, scored when the first reward asks."""
        if self._last is None or self._last[0] is not completions:
            texts = [completion[0]["content"] for completion in completions]
            scored = self._score(texts, columns)
            self._last = (completions, scored)
            if log_metric is not None:
                for name, value in outcome_rates(scored).items():
                    log_metric(name, value)
        return self._last[1]


def outcome_rates(scored: Sequence[Scored]) -> dict[str, float]:
    """Share of each outcome, and the mean confidence of hits and of misses where there are any."""
    rates = {f"outcome/{outcome.value}": 0.0 for outcome in Outcome}
    for entry in scored:
        rates[f"outcome/{entry.outcome.value}"] += 1 / len(scored)
    for outcome in (Outcome.HIT, Outcome.MISS):
        confidences = [entry.confidence for entry in scored if entry.outcome is outcome]
        if confidences:
            rates[f"confidence/{outcome.value}"] = sum(confidences) / len(confidences)
    return rates
