"""The rewards of stage 3: pure functions of one scored completion and the settings (the paper, Eqs. 2-5).

To add a reward, write one function here and mark it with `@reward()`. Its name is then a choice of `reward_funcs` and a
column of the completions. If it has a parameter, add a key to `RewardConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from twice_rec.answer_format import WITH_RATIONALE, ParsedAnswer, closing, opening
from twice_rec.catalog import Outcome
from twice_rec.recipe import Settings, key, rule


class RewardConfig(Settings):
    """The parameters of the rewards."""

    reward_lambda: float = key(3.0, "Eq. 2: weight of the confidence that a confident hit earns beside its 1", ge=0)
    reward_tau: float | None = key(
        0.3, "Eq. 2: confidence from which on it counts; null to set reward_tau_quantile", ge=0, le=1
    )
    reward_tau_quantile: float | None = key(
        None, "tau as a quantile of the confidences in the validation candidates", ge=0, le=1
    )
    reward_rank: Literal["reciprocal_rank", "ndcg"] = key(
        "reciprocal_rank", "what the reward rank computes from the target's rank"
    )

    @rule
    def one_tau(self) -> str | None:
        """Tau is a value or a quantile."""
        if (self.reward_tau is None) == (self.reward_tau_quantile is None):
            found = f"reward_tau is {self.reward_tau} and reward_tau_quantile {self.reward_tau_quantile}"
            return f"{found}; set one of them and the other to null"
        return None


@dataclass(frozen=True, slots=True)
class ScoredCompletion:
    """One completion, as the rewards see it.

    Args:
        text: what the policy wrote, without special tokens.
        answer: the parsed text.
        outcome: hit, miss, outside the candidates, or malformed.
        confidence: the CF model's confidence in the recommended candidate, in [0, 1]; 0 without one.
        target_rank: rank of the target among the candidates, 1 is best, by the policy's likelihood of each candidate's
            answer after this completion's rationale; None without a rationale, or if no reward needs it.
        self_certainty: the policy's, in nats, see `certainty`; None if no reward needs it.
        num_tokens: length of the completion in tokens; None if the caller does not know it.
    """

    text: str
    answer: ParsedAnswer
    outcome: Outcome
    confidence: float
    target_rank: int | None = None
    num_tokens: int | None = None
    self_certainty: float | None = None


PolicyField = Literal["target_rank", "self_certainty"]  # what of a `ScoredCompletion` the policy is asked for
RewardFunction = Callable[[ScoredCompletion, RewardConfig], float]


@dataclass(frozen=True, slots=True)
class Reward:
    """A registered reward."""

    function: RewardFunction
    depends_on_item: bool  # on the recommended item, and on nothing else in the text
    needs_policy: PolicyField | None  # the field that it reads and for which the policy is asked


REWARDS: dict[str, Reward] = {}  # name -> reward, in the order of this file


def reward(
    *, depends_on_item: bool = False, needs_policy: PolicyField | None = None
) -> Callable[[RewardFunction], RewardFunction]:
    """Register a reward under its function's name; see `Reward` for the marks."""

    def register(function: RewardFunction) -> RewardFunction:
        REWARDS[function.__name__] = Reward(function, depends_on_item, needs_policy)
        return function

    return register


@reward(depends_on_item=True)
def collaborative(completion: ScoredCompletion, config: RewardConfig) -> float:
    """Return the confidence-weighted reward of the paper's Eq. 2; c is the confidence.

    |         | c >= tau       | c < tau |
    |---------|----------------|---------|
    | hit     | 1 + lambda * c | 1       |
    | miss    | c              | 0       |

    An item outside the candidates and a malformed answer earn 0. (The release pays c for any title of the catalogue.)
    """
    assert config.reward_tau is not None  # scoring has resolved a quantile
    is_confident = completion.confidence >= config.reward_tau
    if completion.outcome is Outcome.HIT:
        return 1.0 + (config.reward_lambda * completion.confidence if is_confident else 0.0)
    return completion.confidence if completion.outcome is Outcome.MISS and is_confident else 0.0


@reward(depends_on_item=True)
def match(completion: ScoredCompletion, config: RewardConfig) -> float:
    """Return 1 if the recommended item is the target, else 0."""
    return float(completion.outcome is Outcome.HIT)


@reward(depends_on_item=True)
def cf(completion: ScoredCompletion, config: RewardConfig) -> float:
    """Return the CF model's confidence in the recommended candidate, 0 without one."""
    return completion.confidence


@reward()
def structure(completion: ScoredCompletion, config: RewardConfig) -> float:
    """Return the paper's Eq. 3: 1 if the answer has a complete rationale and a complete item, else 0."""
    return float(completion.answer.is_complete(WITH_RATIONALE))


# The paper has one tag for the item, the release two. Of those two, the id decides.
_FOUR_TAGS = tuple(tag for field in ("think", "item_id") for tag in (opening(field), closing(field)))
_SIX_TAGS = tuple(tag for field in WITH_RATIONALE for tag in (opening(field), closing(field)))


@reward()
def tags(completion: ScoredCompletion, config: RewardConfig) -> float:
    """Return the paper's Eq. 4: a quarter for each of its four tags that occurs exactly once, so at most 1."""
    return 0.25 * sum(completion.answer.counts.get(tag, 0) == 1 for tag in _FOUR_TAGS)


@reward()
def tags_release(completion: ScoredCompletion, config: RewardConfig) -> float:
    """Return the release's Eq. 4: a quarter for each of its six tags that occurs exactly once, so at most 1.5."""
    return 0.25 * sum(completion.answer.counts.get(tag, 0) == 1 for tag in _SIX_TAGS)


@reward()
def only_expected_tags(completion: ScoredCompletion, config: RewardConfig) -> float:
    """Return the release's third format reward: 1 if no other tag occurs, else 0."""
    counts = completion.answer.counts
    unexpected = completion.answer.other_tags + sum(count for tag, count in counts.items() if tag not in _SIX_TAGS)
    return float(unexpected == 0)


@reward(needs_policy="target_rank")
def rank(completion: ScoredCompletion, config: RewardConfig) -> float:
    """Return 1 / rank or 1 / log2(1 + rank) of the target, in [0, 1]; ours.

    The policy itself ranks the candidates after its rationale. Without a complete rationale the reward is 0.
    """
    if completion.target_rank is None:
        return 0.0
    if config.reward_rank == "reciprocal_rank":
        return 1.0 / completion.target_rank
    return 1.0 / math.log2(1 + completion.target_rank)


@reward(needs_policy="self_certainty")
def certainty(completion: ScoredCompletion, config: RewardConfig) -> float:
    """Return the policy's own certainty, after the idea of Intuitor; it knows neither the target nor a CF model.

    The mean over the completion's tokens, the stop token included, of KL(uniform || policy), in nats, at temperature 1:
    with V tokens in the vocabulary, of which v has the probability p(v), -log V - (1 / V) * sum of log p(v) over all v.
    It is 0 if all tokens are equally likely, and has no upper end. It is not scaled: its weight sets it off against the
    format rewards, and `scale_rewards` divides a group's sum by its deviation.
    """
    return completion.self_certainty or 0.0
