"""A loss on all candidates after a sampled rationale; ours, off in the paper's recipe.

GRPO learns from the one item that a completion names. Here the policy says how likely each candidate is as the answer
that follows the completion's rationale, so that one rationale teaches about all of them:

    p_c = softmax over the candidates of log policy(answer with c | prompt, rationale)

`expected_reward` maximises the sum over c of p_c times the advantage of c: what the rewards that depend on the item
alone would pay for it, less their mean over the candidates, divided by their standard deviation. It is GRPO's own
objective for the item, with its exact expectation in place of samples. `distillation` minimises the cross-entropy of p
against

    softmax over the candidates of candidate_cf_weight * a z_c + candidate_start_weight * log p_c of the start model

with the CF model's score z and its calibration a. Without the start model it is the CF model's distribution: how well a
policy can learn what the CF model knows. With it, it is the policy that has the highest expected a z less a divergence
from the start model: it adds what the CF model knows to what the start model read in the prompt.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twice_rec.answer_format import parse, without_tags
from twice_rec.catalog import ItemCatalog, Outcome
from twice_rec.cf.confidence import ConfidenceModel
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.grpo.rewards import REWARDS, ScoredCompletion
from twice_rec.llm.shared_prefix import Group, SharedRows, token_scores
from twice_rec.llm.tokens import encode_chat
from twice_rec.prompts import rationale_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]  # of `prompt_rows`
Floats = NDArray[np.float32]


def item_advantages(rows: Sequence[Row], catalog: ItemCatalog, model: ConfidenceModel, recipe: GRPORecipe) -> Floats:
    """Return each candidate's advantage by the rewards that depend on the item alone: float32 [rows, C].

    Args:
        recipe: with a tau that is a value.
    """
    histories, shown = _indices(rows, catalog)
    confidences = model.confidences(histories, shown, recipe.confidence, recipe.confidence_debiased)  # [rows, C]
    pairs = zip(recipe.reward_funcs, recipe.reward_weights, strict=True)
    weights = {name: weight for name, weight in pairs if REWARDS[name].depends_on_item}
    earned = np.zeros(shown.shape)  # [rows, C]
    for number, row in enumerate(rows):
        for place, item_id in enumerate(row["candidates"]):
            outcome = Outcome.HIT if item_id == row["target"] else Outcome.MISS
            named = ScoredCompletion("", parse(""), outcome, float(confidences[number, place]))
            earned[number, place] = sum(w * REWARDS[name].function(named, recipe) for name, w in weights.items())
    spread = earned.std(axis=1, keepdims=True)
    return ((earned - earned.mean(axis=1, keepdims=True)) / (spread + 1e-4)).astype(np.float32)


def cf_scores(rows: Sequence[Row], catalog: ItemCatalog, model: ConfidenceModel) -> Floats:
    """Return the CF model's scores of each row's candidates, times the calibration's scale: float32 [rows, C]."""
    histories, shown = _indices(rows, catalog)
    return model.scaled_logits(histories, shown)


def _indices(rows: Sequence[Row], catalog: ItemCatalog) -> tuple[list[list[int]], NDArray[np.int64]]:
    return [catalog.indices(row["history"]) for row in rows], np.array([catalog.indices(r["candidates"]) for r in rows])


def make_candidate_loss(
    recipe: GRPORecipe,
    rows: Sequence[Row],
    catalog: ItemCatalog,
    model: ConfidenceModel,
    tokenizer: PreTrainedTokenizerBase,
) -> CandidateLoss | None:
    """Return the loss that the recipe, whose tau is a value, names; None for `none`."""
    if recipe.candidate_loss == "none":
        return None
    if recipe.candidate_loss == "expected_reward":
        values, start_weight = item_advantages(rows, catalog, model, recipe), None
    else:
        values = recipe.candidate_cf_weight * cf_scores(rows, catalog, model)
        start_weight = recipe.candidate_start_weight
    weight, rationales = recipe.candidate_weight, recipe.candidate_rationales
    return CandidateLoss(weight, rationales, rows, values, start_weight, catalog, tokenizer)


class CandidateLoss:
    """The loss of a micro-batch, for `SharedPrefixGRPOTrainer`.

    Args:
        rationales: how many different rationales of a prompt count per micro-batch, the first ones; None for all.
        rows: the prompts of stage 3. Of those with equal prompts, the first one's values count.
        values: float32 [rows, C], `item_advantages`, or weighted `cf_scores`.
        start_weight: weight of the start model's log-probabilities beside such scores; None for `expected_reward`.

    Attributes:
        asks_start: whether the start model is asked.
    """

    def __init__(
        self,
        weight: float,
        rationales: int | None,
        rows: Sequence[Row],
        values: Floats,
        start_weight: float | None,
        catalog: ItemCatalog,
        tokenizer: PreTrainedTokenizerBase,
    ):
        self._weight, self._limit, self._start_weight = weight, rationales, start_weight
        self.asks_start = bool(start_weight)
        self._catalog, self._tokenizer = catalog, tokenizer
        self._rows: dict[bytes, tuple[Row, Floats]] = {}  # hash of a prompt's token ids -> the row, its values [C]
        for row, of_row in zip(rows, values, strict=True):
            self._rows.setdefault(_hash(encode_chat(tokenizer, row["prompt"])), (row, of_row))

    def __call__(
        self,
        model: torch.nn.Module,
        batch: Mapping[str, Tensor],
        start: Callable[[Sequence[Group]], Tensor] | None = None,
        laid_out: Callable[[SharedRows], None] | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the mean loss of a micro-batch's rationales, times the weight, and figures for the log.

        Args:
            model, laid_out: see `token_scores`.
            batch: `prompt_ids`, `prompt_mask` [B, P], `completion_ids`, `completion_mask` [B, T] as TRL has them.
            start: gives the start model's logprobs of all tokens of groups, [N], if `asks_start`.
        """
        groups, sizes = list[Group](), list[int]()  # per prompt; per continuation
        values, targets = [], []  # per rationale
        of_prompts = self._rationales(batch)
        for prompt, rationales in of_prompts.items():
            if not rationales:
                continue
            row, of_row = self._rows[_hash(prompt)]
            answers = [
                encode_chat(self._tokenizer, row["prompt"], rationale_answer(rationale, self._catalog[item_id]))
                for rationale in rationales
                for item_id in row["candidates"]
            ]
            groups.append((prompt, [answer[len(prompt) :] for answer in answers]))
            sizes += [len(answer) - len(prompt) for answer in answers]
            values += [torch.as_tensor(of_row)] * len(rationales)
            targets += [row["candidates"].index(row["target"])] * len(rationales)
        if not groups:  # all completions are malformed; the other processes' forwards may wait for this one's
            prompt = next(iter(of_prompts))
            return 0.0 * token_scores(model, [(prompt, [prompt[-1:]])], laid_out)[0].sum(), {}

        def over_candidates(of_tokens: Tensor) -> Tensor:
            logprobs = torch.stack([part.sum() for part in of_tokens.split(sizes)])  # [continuations]
            return logprobs.view(len(values), -1).log_softmax(dim=1)  # [R, C]

        logp = over_candidates(token_scores(model, groups, laid_out)[0])  # [R, C]
        value = torch.stack(values).to(logp.device)  # [R, C]
        if self._start_weight is None:
            loss = -(logp.exp() * value).sum(dim=1).mean()
        else:
            if start is not None and self.asks_start:
                value = value + self._start_weight * over_candidates(start(groups))
            loss = -(logp * value.softmax(dim=1)).sum(dim=1).mean()
        on_target = logp.detach().gather(1, torch.tensor(targets, device=logp.device)[:, None]).exp().mean()
        return self._weight * loss, {"candidates/loss": loss.item(), "candidates/target_probability": on_target.item()}

    def _rationales(self, batch: Mapping[str, Tensor]) -> dict[tuple[int, ...], list[str]]:
        """Return the different complete rationales of each prompt, in the order of the micro-batch."""
        found: dict[tuple[int, ...], dict[str, None]] = defaultdict(dict)
        columns = [batch[name].cpu() for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")]
        for prompt, of_prompt, completion, of_completion in zip(*columns, strict=True):
            ids = completion[of_completion.bool()].tolist()
            rationale = parse(self._tokenizer.decode(ids, skip_special_tokens=True)).rationale
            of_this = found[tuple(prompt[of_prompt.bool()].tolist())]
            if rationale and (self._limit is None or len(of_this) < self._limit):
                of_this[without_tags(rationale)] = None
        return {prompt: list(rationales) for prompt, rationales in found.items()}


def _hash(ids: Sequence[int]) -> bytes:
    return hashlib.sha256(np.array(ids, dtype=np.int64).tobytes()).digest()
