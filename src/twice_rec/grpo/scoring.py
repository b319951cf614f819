"""From a step's completions to rewards: parse, judge, ask the CF model once, apply the functions of `rewards`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from twice_rec.answer_format import parse, without_tags
from twice_rec.catalog import ItemCatalog, Outcome
from twice_rec.cf.confidence import ConfidenceModel
from twice_rec.cf.held_out import prompted
from twice_rec.cf.recipe import ConfidenceConfig
from twice_rec.data.dataset import PreparedData
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.grpo.rewards import REWARDS, ScoredCompletion
from twice_rec.metrics import ranks_from_scores
from twice_rec.prompts import rationale_answer
from twice_rec.records import SPLITS

if TYPE_CHECKING:
    from twice_rec.llm.generation import PolicyScorer  # imports torch

Columns = Mapping[str, Any]  # name -> one value per completion, as TRL passes them to reward functions


def _confidences(
    asked: Iterable[Sequence[Iterable[str]]], catalog: ItemCatalog, model: ConfidenceModel, config: ConfidenceConfig
) -> NDArray[np.float32]:
    """Return the confidences for pairs of history and candidates, which are item ids: [pairs, C]."""
    histories, candidates = zip(*([catalog.indices(ids) for ids in pair] for pair in asked), strict=True)
    return model.confidences(list(histories), np.array(candidates), config.confidence, config.confidence_debiased)


def score_completions(
    texts: Sequence[str], columns: Columns, catalog: ItemCatalog, model: ConfidenceModel, config: ConfidenceConfig
) -> list[ScoredCompletion]:
    """Parse and judge a step's B completions, without target ranks; ask the CF model once, for the different prompts.

    Args:
        columns: B values each: `candidates` and `history` (item ids), `target` (item id), and `completion_ids` (token
            ids), which may be missing.
    """
    prompts: dict[tuple[tuple[str, ...], tuple[str, ...]], int] = {}  # (history, candidates) -> row of the CF model
    rows = [
        prompts.setdefault((tuple(history), tuple(shown)), len(prompts))
        for history, shown in zip(columns["history"], columns["candidates"], strict=True)
    ]
    confidences = _confidences(prompts, catalog, model, config)  # [prompts, C]
    lengths = [len(ids) for ids in columns["completion_ids"]] if "completion_ids" in columns else [None] * len(texts)
    scored = []
    parts = zip(texts, columns["candidates"], columns["target"], rows, lengths, strict=True)
    for text, shown, target, row, num_tokens in parts:
        answer = parse(text)
        outcome = catalog.outcome(answer, shown, target)
        names_candidate = outcome in (Outcome.HIT, Outcome.MISS)
        confidence = float(confidences[row, list(shown).index(answer.item_id or "")]) if names_candidate else 0.0
        scored.append(ScoredCompletion(text, answer, outcome, confidence, num_tokens=num_tokens))
    return scored


def with_target_ranks(
    scored: Sequence[ScoredCompletion], prompts: Any, columns: Columns, catalog: ItemCatalog, policy: PolicyScorer
) -> Iterator[ScoredCompletion]:
    """Give each completion with a rationale its `target_rank`, as evaluation ranks by likelihood.

    Ties count against the target. The policy scores all candidates of one completion at once. Each completion is scored
    apart, since each has its own rationale. `prompts` are messages, one list per completion.
    """
    for prompt, one, shown, target in zip(prompts, scored, columns["candidates"], columns["target"], strict=True):
        if not one.answer.rationale:
            yield one
            continue
        rationale = without_tags(one.answer.rationale)
        logprobs = policy.score(prompt, [rationale_answer(rationale, catalog[item_id]) for item_id in shown])
        (rank,) = ranks_from_scores([list(logprobs)], [list(shown).index(target)])
        yield replace(one, target_rank=int(rank))


def with_certainties(
    scored: Sequence[ScoredCompletion], prompts: Any, columns: Columns, policy: PolicyScorer
) -> list[ScoredCompletion]:
    """Give each completion its `self_certainty`; the completions of a prompt are asked about together."""
    groups: dict[tuple[str, ...], list[int]] = {}  # prompt -> its completions
    for number, prompt in enumerate(prompts):
        groups.setdefault(tuple(message["content"] for message in prompt), []).append(number)
    found = list(scored)
    for numbers in groups.values():
        values = policy.certainties(prompts[numbers[0]], [columns["completion_ids"][number] for number in numbers])
        for number, value in zip(numbers, values, strict=True):
            found[number] = replace(scored[number], self_certainty=value)
    return found


class StepRewards:
    """The rewards of a recipe as the functions that TRL's GRPOTrainer calls; a step is scored once for all of them.

    With each step's completions TRL keeps these columns: `outcome`, `target` (its id), `recommended` (the id of the
    recommended candidate, or empty), `confidence`, `log_popularity` (natural logarithm of 1 + the recommended
    candidate's training interactions; NaN without one), and `policy_version` and `truncated` if the rollout gives them.

    Args:
        recipe: names the rewards and has their parameters; a tau that is given as a quantile is resolved in `config`.
        data: the catalogue, the training histories, and the validation candidates for that quantile.
        model: gives the confidences.
        policy: the model in training; only a reward that needs the policy asks it.

    Raises:
        ValueError: if a reward needs the policy and there is none.
    """

    def __init__(self, recipe: GRPORecipe, data: PreparedData, model: ConfidenceModel, policy: PolicyScorer | None):
        asking = [name for name in recipe.reward_funcs if REWARDS[name].needs_policy]
        if asking and policy is None:
            raise ValueError(f"the reward {asking[0]} needs the policy")
        self.config = recipe.model_copy(update={"reward_tau": tau_of(recipe, data, model)})
        self._catalog, self._model = data.catalog, model
        self._policy, self._asked = policy, {REWARDS[name].needs_policy for name in asking}
        _, items = data.training_histories().flat()
        self._log_popularity = np.log1p(np.bincount(items, minlength=len(data.catalog) + 1))  # [N + 1]
        self._last: tuple[Any, list[ScoredCompletion]] = (None, [])  # a step's completions as they came, and scored
        self.functions = [self._named(name) for name in recipe.reward_funcs]

    def _named(self, name: str) -> Callable[..., list[float]]:
        def reward(prompts: Any, completions: Sequence[Any], log_extra: Any = None, **columns: Any) -> list[float]:
            scored = self._of_step(prompts, completions, log_extra, columns)
            return [REWARDS[name].function(one, self.config) for one in scored]

        reward.__name__ = name  # TRL logs it under this name
        return reward

    def _of_step(self, prompts: Any, completions: Sequence[Any], log_extra: Any, columns: Columns) -> list[Any]:
        """Score the step's completions when its first reward asks."""
        if self._last[0] is not completions:
            texts = [completion[0]["content"] for completion in completions]
            scored = score_completions(texts, columns, self._catalog, self._model, self.config)
            if self._policy is not None and "target_rank" in self._asked:
                scored = list(with_target_ranks(scored, prompts, columns, self._catalog, self._policy))
            if self._policy is not None and "self_certainty" in self._asked:
                scored = with_certainties(scored, prompts, columns, self._policy)
            self._last = (completions, scored)
            if log_extra is not None:
                for name, values in self._kept(scored, columns).items():
                    log_extra(name, values)
        return self._last[1]

    def _kept(self, scored: Sequence[ScoredCompletion], columns: Columns) -> dict[str, list[Any]]:
        named = [one.answer.item_id if one.outcome in (Outcome.HIT, Outcome.MISS) else None for one in scored]
        return {
            "outcome": [one.outcome.value for one in scored],
            "target": list(columns["target"]),
            "recommended": [item_id or "" for item_id in named],
            "confidence": [one.confidence for one in scored],
            "log_popularity": [
                float(self._log_popularity[self._catalog.index(item_id)]) if item_id else math.nan for item_id in named
            ],
            **{name: list(columns[name]) for name in ("policy_version", "truncated") if name in columns},
        }


def tau_of(recipe: GRPORecipe, data: PreparedData, model: ConfidenceModel) -> float:
    """Return tau as the recipe gives it, or the recipe's quantile of the confidences in all validation candidates."""
    if recipe.reward_tau is not None:  # by a rule of RewardConfig one of the two is given, not both
        return recipe.reward_tau
    (kind,) = data.list_kinds("train")
    asked = data.questions("valid", [kind])
    confidences = model.confidences(
        asked.histories, asked.candidates[kind], recipe.confidence, recipe.confidence_debiased
    )  # [users, C]
    return float(np.quantile(confidences, recipe.reward_tau_quantile))


def targets_first(
    recipe: GRPORecipe, data: PreparedData, model: ConfidenceModel, users: int = 5000
) -> dict[str, float]:
    """Return in which share of the lists the CF model puts the target first: of the prompts, of validation, of test.

    What the prompts have above the others is memory: the model was trained on their targets. Per split at most `users`
    are looked at; ties count against the target.
    """
    (kind,) = data.list_kinds("train")
    shares = {}
    for split in SPLITS:
        if kind not in data.list_kinds(split):
            continue
        asked = data.questions(split, [kind])
        rows = np.arange(len(asked.users))
        if split == "train":
            rows = prompted(len(rows), recipe.train_fraction, recipe.seed)
        asked = asked.take(rows[:users])
        shown = asked.candidates[kind].astype(np.int64)  # [U, C]
        column = (shown == asked.targets[:, None]).argmax(axis=1)  # [U]
        ranks = ranks_from_scores(model.logits(asked.histories, shown), column)  # [U]
        shares[f"target_first/{split}"] = float((ranks == 1).mean())
    return shares
