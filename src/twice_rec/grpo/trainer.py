"""TRL's GRPO trainer, and one that computes a prompt once per group, not once per completion.

This module imports TRL; import it late.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import trl
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from twice_rec.errors import InputError
from twice_rec.grpo.candidate_loss import CandidateLoss
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.grpo.rollout.base import Rollouts
from twice_rec.grpo.trl_private import Batch, PromptHook, TrainerHooks, is_dense_text_model, metrics, shards_weights
from twice_rec.llm.fused import fuse_on_gpu
from twice_rec.llm.shared_prefix import Group, SharedRows, token_scores
from twice_rec.llm.throughput import Metered


def padded_scores(
    model: torch.nn.Module,
    input_ids: Tensor,
    mask: Tensor,
    completion_length: int,
    laid_out: Callable[[SharedRows], None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return logprobs and entropies of completions as TRL holds them, computed in rows with shared prompts.

    Args:
        model: see `token_scores`.
        input_ids: int64 [B, P + T], prompts padded on the left and completions on the right.
        mask: bool [B, P + T], False at padding; a completion may be masked altogether.
        completion_length: T.
        laid_out: see `token_scores`.

    Returns:
        float32 [B, T] each, 0 where the mask is False; the entropies are None if the model's head has none.
    """
    prompt_length = input_ids.size(1) - completion_length  # P
    rows: dict[tuple[int, ...], list[int]] = {}  # prompt -> the rows of its completions
    completions = []
    for row, (ids, kept) in enumerate(zip(input_ids.cpu(), mask.cpu(), strict=True)):
        prompt = tuple(ids[:prompt_length][kept[:prompt_length]].tolist())
        rows.setdefault(prompt, []).append(row)
        completions.append(ids[prompt_length:][kept[prompt_length:]].tolist())
    groups = [(prompt, [completions[row] for row in of_prompt]) for prompt, of_prompt in rows.items()]
    logprobs, entropies = token_scores(model, groups, laid_out)  # [N] each, group by group

    # Put the values into the kept places of rows in group order, then bring the rows back into their order.
    order = torch.tensor([row for of_prompt in rows.values() for row in of_prompt], device=input_ids.device)  # [B]
    kept = mask[order, prompt_length:]  # [B, T]
    back = order.argsort()  # [B]

    def padded(values: Tensor) -> Tensor:
        return values.new_zeros(kept.shape).masked_scatter(kept, values)[back]  # [B, T]

    return padded(logprobs), None if entropies is None else padded(entropies)


def in_pieces(input_ids: Tensor, mask: Tensor, completion_length: int, tokens: int | None) -> list[Tensor]:
    """Return the completions in pieces that have at most so many tokens each, a piece's prompts counted once.

    Those of one prompt are neighbours; if they are in several pieces, the prompt is in each. A piece has at least one
    completion, however long. Padding does not count.

    Args:
        input_ids, mask, completion_length: as in `padded_scores`.
        tokens: None for one piece.

    Returns:
        Per piece the rows of its completions, int64.
    """
    if tokens is None:
        return [torch.arange(len(input_ids), device=input_ids.device)]
    prompt_length = input_ids.size(1) - completion_length  # P
    rows: dict[tuple[int, ...], list[int]] = {}  # prompt, with its padding -> the rows of its completions
    for row, ids in enumerate(input_ids[:, :prompt_length].tolist()):
        rows.setdefault(tuple(ids), []).append(row)
    prompts, completions = mask[:, :prompt_length].sum(1).tolist(), mask[:, prompt_length:].sum(1).tolist()  # B each
    pieces: list[list[int]] = [[]]
    held = 0  # tokens of the last piece
    for of_prompt in rows.values():
        in_last = False  # whether the last piece has the prompt
        for row in of_prompt:
            more = completions[row] + (0 if in_last else prompts[row])
            if pieces[-1] and held + more > tokens:
                pieces, held, more = [*pieces, []], 0, completions[row] + prompts[row]
            pieces[-1].append(row)
            held, in_last = held + more, True
    return [torch.tensor(piece, device=input_ids.device) for piece in pieces]


def groups_together(batches: list[Batch]) -> list[Batch]:
    """Return the same completions in as many batches of the same sizes, those of one prompt side by side.

    Prompts come in the order in which they first appear. What is no tensor over completions stays as it is.

    Args:
        batches: columns over completions, [B, ...] each, of several micro-batches; `prompt_ids` is [B, P].
    """
    prompts = torch.cat([batch["prompt_ids"] for batch in batches])  # [all B, P]
    numbers: dict[tuple[int, ...], int] = {}
    group = torch.tensor([numbers.setdefault(tuple(ids), len(numbers)) for ids in prompts.tolist()])  # [all B]
    sizes = [len(batch["prompt_ids"]) for batch in batches]
    orders = group.argsort(stable=True).to(prompts.device).split(sizes)  # one [B] per batch

    def rearranged(name: str) -> list[Any]:
        values = [batch[name] for batch in batches]
        if not isinstance(values[0], Tensor) or values[0].ndim == 0:
            return values
        whole = torch.cat(values)  # [all B, ...]
        return [whole[order] for order in orders]  # one [B, ...] per batch

    columns = {name: rearranged(name) for name in batches[0]}
    return [{name: values[i] for name, values in columns.items()} for i in range(len(batches))]


class GRPOTrainer(Metered, PromptHook, trl.GRPOTrainer):
    """TRL's trainer; it encodes prompts as the rest of this package does, and its log says how fast it trains."""


class SharedPrefixGRPOTrainer(TrainerHooks, GRPOTrainer):
    """TRL's `GRPOTrainer` that computes what the completions of a group begin with once.

    Logprobs and entropies of the policy, the old policy and the reference are those of the parent. Rewards, advantages
    and the loss are the parent's own code. With dropout, the shared beginning draws once per group instead of once per
    completion.

    Completions of one prompt are brought together within each optimizer step, for the parent's shuffle would leave a
    group little to share. This is done only if the step's gradient stays the same: if the loss is an average over
    completions, or divides by a number that is fixed per step (`recipe.ADDITIVE_LOSSES`), and the entropies within
    a micro-batch decide nothing. bnpo divides by the tokens of a micro-batch, so its micro-batches stay as the parent
    shuffles them; completions of one prompt share it if they meet there.

    Raises:
        InputError: if the model takes images or has experts; with `tokens_at_once`, also if weights are sharded.
    """

    regrouped = staticmethod(groups_together)

    def __init__(
        self,
        *arguments: Any,
        candidate_loss: CandidateLoss | None = None,
        tokens_at_once: int | None = None,
        **keywords: Any,
    ):
        super().__init__(*arguments, **keywords)
        self._candidate_loss = candidate_loss
        self._tokens_at_once = tokens_at_once
        self._start = None  # a copy of the model, if all its weights are trained and a loss asks for those of before
        if candidate_loss is not None and candidate_loss.asks_start and not isinstance(self.model, PeftModel):
            self._start = copy.deepcopy(self.model).eval().requires_grad_(False)
        if tokens_at_once is not None and shards_weights(self):
            raise InputError(
                "tokens_at_once gives processes different numbers of forwards, but with ZeRO stage 3 or FSDP each one "
                "gathers weights from all; use ZeRO stage 2, or set it to null and lower per_device_train_batch_size"
            )
        if not is_dense_text_model(self):
            raise InputError(
                f"share_prefixes is for dense models of text, found {type(self.model).__name__}; set it to false"
            )

    def completion_scores(
        self, model: torch.nn.Module, input_ids: Tensor, mask: Tensor, completion_length: int
    ) -> tuple[Tensor, Tensor | None]:
        """Return `padded_scores`, computed in pieces of at most `tokens_at_once`, and count the rows that it takes.

        Without gradients a piece is forgotten before the next. With gradients too: the parent's loss needs the logprobs
        of the whole micro-batch, so each piece is computed again in its backward, as with gradient checkpointing, and
        only the activations of one piece exist at a time. The loss and its gradient stay the same, whichever loss it
        is, for one more forward.
        """
        pieces = in_pieces(input_ids, mask, completion_length, self._tokens_at_once)
        again = len(pieces) > 1 and torch.is_grad_enabled()
        # A wrapper's forward waits for the other processes, and they may have another number of pieces: it runs once.
        models = iter([model])
        bare = extract_model_from_parallel(model)

        def scores(piece: Tensor) -> tuple[Tensor, Tensor | None]:
            ids, kept = input_ids[piece], mask[piece]
            counted: list[SharedRows] = []  # at the first time, not at the second, within the backward

            def count(rows: SharedRows) -> None:
                if not counted:
                    predicted, training = len(rows.targets), torch.is_grad_enabled()
                    self.meter.count(rows.position_ids, predicted, rows.real(), kept.sum(), training)
                    counted.append(rows)

            def forward() -> tuple[Tensor, Tensor | None]:
                return padded_scores(next(models, bare), ids, kept, completion_length, count)

            return checkpoint(forward, use_reentrant=False) if again else forward()

        logprobs, entropies = zip(*map(scores, pieces), strict=True)  # [piece, T] each
        back = torch.cat(pieces).argsort()  # [B]
        return torch.cat(logprobs)[back], None if entropies[0] is None else torch.cat(entropies)[back]

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Tensor:
        """Return TRL's loss of a micro-batch, and the candidates' loss added to it, if there is one."""
        loss = super().compute_loss(model, inputs, *arguments, **keywords)
        if self._candidate_loss is None:
            return loss

        def count(rows: SharedRows) -> None:
            self.meter.count(rows.position_ids, len(rows.targets), rows.real(), 0)

        with self.accelerator.autocast():
            of_candidates, figures = self._candidate_loss(model, inputs, self._start_scores, count)
        for name, value in figures.items():
            metrics(self)[name].append(value)
        return loss + of_candidates / self.current_gradient_accumulation_steps

    @torch.no_grad()
    def _start_scores(self, groups: Sequence[Group]) -> Tensor:
        """Return the logprobs of the model that training started from, see `token_scores`: float32 [N]."""
        if self._start is not None:
            return token_scores(self._start, groups)[0]
        model = extract_model_from_parallel(self.model)
        with model.disable_adapter():
            return token_scores(model, groups)[0]


def make_trainer(
    recipe: GRPORecipe, rollouts: Rollouts | None, candidate_loss: CandidateLoss | None, **keywords: Any
) -> GRPOTrainer:
    """Return the recipe's trainer with its rollouts, and on a GPU with fused layers; the keywords are TRL's."""
    if recipe.share_prefixes:
        ours: dict[str, Any] = {"candidate_loss": candidate_loss, "tokens_at_once": recipe.tokens_at_once}
        trainer: GRPOTrainer = SharedPrefixGRPOTrainer(rollout_func=rollouts, **ours, **keywords)
    else:
        trainer = GRPOTrainer(rollout_func=rollouts, **keywords)
    fuse_on_gpu(trainer.model, trainer.args.device)
    if rollouts is not None:
        rollouts.attach(trainer)
    return trainer
