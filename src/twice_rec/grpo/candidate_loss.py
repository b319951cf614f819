"""A loss on all candidates after a sampled rationale; ours, off in the paper's recipe.

GRPO learns from the one item that a completion names. Here the policy says how likely each candidate is as the answer
that follows the completion's rationale, so that one rationale teaches about all of them:

    p_c = softmax over the candidates of log policy(answer with c | prompt, rationale)

`expected_reward` maximises the sum over c of p_c times the advantage of c: what the rewards that depend on the item
alone would pay for it, less their mean over the candidates, divided by their standard deviation. It is GRPO's own
objective for the item, with its exact expectation in place of samples. `distillation` minimises the cross-entropy of p
against the CF model's calibrated softmax over the candidates: how well a policy can learn what the CF model knows, an
upper bound for its rewards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twice_rec.answer_format import parse, without_tags
from twice_rec.catalog import ItemCatalog, Outcome
from twice_rec.cf.confidence import ConfidenceModel, softmax
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.grpo.rewards import REWARDS, ScoredCompletion
from twice_rec.llm.shared_prefix import SharedRows, token_scores
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


def cf_distributions(rows: Sequence[Row], catalog: ItemCatalog, model: ConfidenceModel) -> Floats:
    """Return the CF model's softmax over each row's candidates, calibrated on validation: float32 [rows, C]."""
    histories, shown = _indices(rows, catalog)
    scale, _ = model.calibration["raw"]
    return softmax(scale * model.logits(histories, shown)).astype(np.float32)


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
        values = item_advantages(rows, catalog, model, recipe)
    else:
        values = cf_distributions(rows, catalog, model)
    kind, weight, rationales = recipe.candidate_loss, recipe.candidate_weight, recipe.candidate_rationales
    return CandidateLoss(kind, weight, rationales, rows, values, catalog, tokenizer)


class CandidateLoss:
    """The loss of a micro-batch, for `SharedPrefixGRPOTrainer`.

    Args:
        kind: `expected_reward` or `distillation`.
        rows: the prompts of stage 3. Of those with equal prompts, the first one's values count.
        values: float32 [rows, C], `item_advantages` or `cf_distributions`.
        rationales: different rationales of a prompt that are used in a micro-batch, the first ones; None for all.
    """

    def __init__(
        self,
        kind: Literal["expected_reward", "distillation"],
        weight: float,
        rationales: int | None,
        rows: Sequence[Row],
        values: Floats,
        catalog: ItemCatalog,
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.weight, self._kind, self._limit = weight, kind, rationales
        self._catalog, self._tokenizer = catalog, tokenizer
        self._rows: dict[tuple[int, ...], tuple[Row, Floats]] = {}  # token ids of a prompt -> the row, its values [C]
        for row, of_row in zip(rows, values, strict=True):
            self._rows.setdefault(tuple(encode_chat(tokenizer, row["prompt"])), (row, of_row))

    def __call__(
        self, model: torch.nn.Module, batch: Mapping[str, Tensor], laid_out: Callable[[SharedRows], None] | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the mean loss of a micro-batch's rationales, times the weight, and figures for the log.

        Args:
            model, laid_out: see `token_scores`.
            batch: `prompt_ids`, `prompt_mask` [B, P], `completion_ids`, `completion_mask` [B, T] as TRL has them.
        """
        groups, values, targets, sizes = [], [], [], []  # per prompt; per rationale; per rationale; per continuation
        for prompt, rationales in self._rationales(batch).items():
            row, of_row = self._rows[prompt]
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
            prompt = next(iter(self._rows))
            return 0.0 * token_scores(model, [(prompt, [prompt[-1:]])], laid_out)[0].sum(), {}
        of_tokens = token_scores(model, groups, laid_out)[0]  # [N]
        logprobs = torch.stack([part.sum() for part in of_tokens.split(sizes)]).view(len(values), -1)  # [R, C]
        logp, value = logprobs.log_softmax(dim=1), torch.stack(values).to(logprobs.device)  # [R, C] each
        weights = logp.exp() if self._kind == "expected_reward" else logp
        loss = -(weights * value).sum(dim=1).mean()
        on_target = logp.detach().gather(1, torch.tensor(targets, device=logp.device)[:, None]).exp().mean()
        return self.weight * loss, {"candidates/loss": loss.item(), "candidates/target_probability": on_target.item()}

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
        return {prompt: list(rationales) for prompt, rationales in found.items() if rationales}
