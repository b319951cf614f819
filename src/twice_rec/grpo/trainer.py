"""TRL's GRPO trainer with one difference: what a group's samples begin with is computed once, not once a sample."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from twice_rec.errors import InputError
from twice_rec.llm.shared_prefix import SharedRows, token_scores

Batch = dict[str, Any]


@functools.cache
def grpo_trainer(share_prefixes: bool) -> type:
    """TRL's `GRPOTrainer`, or `SharedPrefixGRPOTrainer`, made on demand: its parent comes with all of TRL."""
    from trl import GRPOTrainer

    if not share_prefixes:
        return GRPOTrainer

    class SharedPrefixGRPOTrainer(GRPOTrainer):
        """TRL's `GRPOTrainer` that groups the samples of a micro-batch by prompt and computes each beginning once.

        Log-probabilities and entropies, of the policy, the old policy and the reference, are those of the parent, in
        its shape, zeros at padding; rewards, advantages and the loss are the parent's own code. With dropout, what
        several samples begin with draws once for all of them instead of once a sample.

        Raises:
            InputError: for models with images or with experts, whose forward gives more than scores of tokens.
        """

        def __init__(self, *arguments: Any, **keywords: Any):
            super().__init__(*arguments, **keywords)
            if self._is_vlm or self.aux_loss_enabled:
                raise InputError(
                    f"share_prefixes is for dense models of text, found {type(self.model).__name__}; set it to false"
                )

        def _get_per_token_logps_and_entropies(
            self,
            model: torch.nn.Module,
            input_ids: Tensor,
            attention_mask: Tensor,
            logits_to_keep: int,
            batch_size: int | None = None,
            compute_entropy: bool = False,
            **_: Any,
        ) -> tuple[Tensor, Tensor | None, None]:
            """As the parent's: [B, P + T] tokens, T = logits_to_keep -> log-probabilities and entropies, [B, T]."""
            parts = []
            for ids, mask in zip(
                input_ids.split(batch_size or len(input_ids)),
                attention_mask.bool().split(batch_size or len(input_ids)),
                strict=True,
            ):
                with self.accelerator.autocast():
                    parts.append(padded_scores(model, ids, mask, logits_to_keep))
            log_probabilities, entropies = zip(*parts, strict=True)
            return torch.cat(log_probabilities), torch.cat(entropies) if compute_entropy else None, None

        def _prepare_inputs(self, generation_batch: Any) -> Batch:
            """As the parent's, with the samples of a prompt brought together within each optimizer step.

            The parent shuffles the samples over all its micro-batches, which would leave a group little to share.
            Here each sample stays in the optimizer step the shuffle gave it; only the division of that step into
            micro-batches changes. The losses average over samples, or divide by a number of tokens that is fixed for
            the step, and gradients of micro-batches add up, so the step's gradient is the same. Only bnpo, TRL 0.16's
            loss, counts a micro-batch's own tokens; TRL 0.16 did not shuffle, so micro-batches of whole groups are what
            it had. Where the entropies of a micro-batch decide (a bonus on them, only the most uncertain tokens), the
            shuffle stands as it is.
            """
            before = self._buffered_inputs
            inputs = super()._prepare_inputs(generation_batch)
            compares_entropies = self._entropy_bonus_enabled or self.top_entropy_quantile < 1
            if self._buffered_inputs is before or compares_entropies:
                return inputs
            together = math.gcd(self.args.steps_per_generation, self.args.gradient_accumulation_steps)
            self._buffered_inputs = [
                batch
                for start in range(0, len(self._buffered_inputs), together)
                for batch in groups_together(self._buffered_inputs[start : start + together])
            ]
            return self._buffered_inputs[self._step % self.args.steps_per_generation]

    return SharedPrefixGRPOTrainer


def padded_scores(
    model: torch.nn.Module, input_ids: Tensor, mask: Tensor, completion_length: int
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and entropies of completions as TRL holds them, through rows with shared prompts.

    Args:
        model: see `token_scores`.
        input_ids: int64 [B, P + T], prompts padded on the left and completions on the right.
        mask: bool [B, P + T], False at padding; a completion may be masked altogether.
        completion_length: T.

    Returns:
        float32 [B, T] each, 0 where the mask is False; the entropies are None where the head has none.
    """
    prompts: dict[tuple[int, ...], list[int]] = {}
    prompt_length = input_ids.size(1) - completion_length
    tokens = [
        (tuple(ids[:prompt_length][kept[:prompt_length]].tolist()), ids[prompt_length:][kept[prompt_length:]].tolist())
        for ids, kept in zip(input_ids.cpu(), mask.cpu(), strict=True)
    ]
    for sample, (prompt, _) in enumerate(tokens):
        prompts.setdefault(prompt, []).append(sample)
    groups = [(prompt, [tokens[sample][1] for sample in samples]) for prompt, samples in prompts.items()]
    scores = token_scores(model, SharedRows.of(groups, input_ids.device))

    order = torch.tensor([sample for samples in prompts.values() for sample in samples], device=input_ids.device)
    kept = mask[order, prompt_length:]
    back = order.argsort()
    log_probabilities, entropies = (
        None if values is None else values.new_zeros(kept.shape).masked_scatter(kept, values)[back] for values in scores
    )
    return log_probabilities, entropies


def groups_together(batches: list[Batch]) -> list[Batch]:
    """The same samples in as many batches of the same sizes, those of one prompt side by side.

    Prompts stand in the order in which they first appear. What is no tensor of samples is left as it is.
    """
    prompts = torch.cat([batch["prompt_ids"] for batch in batches])
    numbers: dict[tuple[int, ...], int] = {}
    group = torch.tensor([numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts.tolist()])
    sizes = [len(batch["prompt_ids"]) for batch in batches]
    orders = group.argsort(stable=True).to(prompts.device).split(sizes)

    def rearranged(name: str) -> list[Any]:
        values = [batch[name] for batch in batches]
        if not isinstance(values[0], Tensor) or values[0].ndim == 0:
            return values
        whole = torch.cat(values)
        return [whole[order] for order in orders]

    columns = {name: rearranged(name) for name in batches[0]}
    return [{name: values[i] for name, values in columns.items()} for i in range(len(batches))]
