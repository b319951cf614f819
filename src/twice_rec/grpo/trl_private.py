"""Everything that touches private parts of TRL's GRPOTrainer, and internal modules of TRL.

Written against TRL 1.16.0. If TRL is updated, read each function's line "relies on" against the new version; the tests
in tests/unit/test_grpo_trainer.py compare whole training runs with TRL's own trainer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twice_rec.grpo.recipe import ADDITIVE_LOSSES
from twice_rec.llm.tokens import encode_chat

Batch = dict[str, Any]


def metrics(trainer: Any) -> dict[str, list[float]]:
    """Return name -> values since the trainer's last log line. The next line has the mean of each list; append to it.

    Relies on: `_metrics["train" | "eval"]`, each a `defaultdict(list)`.
    """
    return trainer._metrics["train" if trainer.model.training else "eval"]


def newest_completions(trainer: Any) -> dict[str, Sequence[Any]]:
    """Return the batch of completions that was sampled last, of all processes, as columns; empty before the first.

    Relies on: `_logs`, which holds prompts, completions, rewards by name, the columns that reward functions log by
    name, and advantages, each as long as one sampled batch.
    """
    logs = trainer._logs
    columns = {"prompt": logs["prompt"], "completion": logs["completion"], **logs["rewards"], **logs["extra"]}
    return columns | {"advantage": logs["advantages"]}


def save_checkpoint(trainer: Any) -> None:
    """Write a checkpoint now; every process calls this.

    Relies on: `_save_checkpoint(model, trial)`.
    """
    trainer._save_checkpoint(trainer.model, trial=None)


def take_the_place_of_vllm(trainer: Any, rollouts: Any) -> None:
    """Let the trainer use `rollouts` as if it were TRL's own vLLM.

    TRL then calls `rollouts.sync_weights()` after each change of the policy, and corrects the loss with the logprobs
    that its `rollout_func` returns, which it does for `use_vllm` only.
    Relies on: `vllm_generation`, `use_vllm`, and `_last_loaded_step`, the step whose weights the vLLM has.
    """
    trainer.vllm_generation, trainer.use_vllm, trainer._last_loaded_step = rollouts, True, -1


def model_for_generation(trainer: Any) -> contextlib.AbstractContextManager[Any]:
    """Enter to get the trainer's model without wrappers, whole under ZeRO-3, gradient checkpointing off.

    Relies on: `trl.models.utils.unwrap_model_for_generation`.
    """
    from trl.models.utils import unwrap_model_for_generation

    return unwrap_model_for_generation(
        trainer.model_wrapped,
        trainer.accelerator,
        gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
        gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
    )


def save_adapter(trainer: Any, folder: Path) -> None:
    """Write the LoRA adapter, whole also under ZeRO-3; every process calls this.

    Relies on: `trl.distributed.DistributedBackend(accelerator).is_zero3`.
    """
    from trl.distributed import DistributedBackend

    model = trainer.accelerator.unwrap_model(trainer.model)
    gathered: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if DistributedBackend(trainer.accelerator).is_zero3:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters([p for p in model.parameters() if p.requires_grad])
    with gathered:
        if trainer.is_world_process_zero():
            model.save_pretrained(folder, selected_adapters=["default"])


def is_dense_text_model(trainer: Any) -> bool:
    """Return whether the model takes text alone and has no experts, whose balance TRL adds to the loss.

    Relies on: `_is_vlm` and `aux_loss_enabled`.
    """
    return not (trainer._is_vlm or trainer.aux_loss_enabled)


def shards_weights(trainer: Any) -> bool:
    """Return whether each process holds a part of the weights, so that every forward waits for all processes.

    Relies on: `trl.distributed.DistributedBackend(accelerator)`, `is_zero3` and `is_fsdp`.
    """
    from trl.distributed import DistributedBackend

    backend = DistributedBackend(trainer.accelerator)
    return backend.is_zero3 or backend.is_fsdp


class PromptHook:
    """Prompts encoded as everywhere here, so that text of a user never becomes a control token, with every rollout.

    Inherit this first, then TRL's GRPOTrainer. Relies on the overridden methods; TRL calls the first without
    `rollout_func`.
    """

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], None, dict[str, Any]]:
        """As the parent's: token ids of each prompt; no images, no other fields."""
        return [encode_chat(self.processing_class, prompt) for prompt in prompts], None, {}

    def _get_per_token_logps_and_entropies(
        self, model: torch.nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *a: Any, **k: Any
    ) -> Any:
        """As the parent's; what goes through the model is counted."""
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # [B, P + T]
        predicted = attention_mask[:, -logits_to_keep:].sum()
        self.meter.count(positions, predicted, attention_mask.bool(), training=torch.is_grad_enabled())
        return super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, logits_to_keep, *a, **k)


class TrainerHooks:
    """Two public hooks in TRL's GRPOTrainer: inherit this first, then the trainer, and set them.

    Relies on, beside the two overridden methods: `_buffered_inputs`, the micro-batches of the newest sampled batch;
    `_step`, the number of micro-batches so far; `_entropy_bonus_enabled`; and the losses in `_compute_loss`.
    """

    # (model, ids [B, P + T], mask [B, P + T], T) -> logprobs and entropies of the completions, [B, T] each
    completion_scores: Callable[[torch.nn.Module, Tensor, Tensor, int], tuple[Tensor, Tensor | None]]
    # micro-batches of one optimizer step -> the same completions in another order
    regrouped: Callable[[list[Batch]], list[Batch]]

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
        """As the parent's: logprobs and entropies, [B, T] each with T = logits_to_keep; no loss of experts."""
        size = batch_size or len(input_ids)
        parts = []
        for ids, mask in zip(input_ids.split(size), attention_mask.bool().split(size), strict=True):
            with self.accelerator.autocast():
                parts.append(self.completion_scores(model, ids, mask, logits_to_keep))
        logprobs, entropies = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropies) if compute_entropy else None, None

    def _prepare_inputs(self, generation_batch: Any) -> Batch:
        """Return the next micro-batch, as the parent does; each newly sampled batch is regrouped first.

        The parent shuffles the completions over all micro-batches. Each completion stays in the optimizer step that the
        shuffle gave it. The shuffle stays as it is if the gradient depends on who shares a micro-batch.
        """
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before or not self._micro_batches_add_up():
            return inputs
        per_step = math.gcd(self.args.steps_per_generation, self.args.gradient_accumulation_steps)
        self._buffered_inputs = [
            batch
            for start in range(0, len(self._buffered_inputs), per_step)
            for batch in self.regrouped(self._buffered_inputs[start : start + per_step])
        ]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _micro_batches_add_up(self) -> bool:
        """Return whether a step's gradient does not depend on which completions share a micro-batch.

        It does if the loss counts a micro-batch's tokens, and if the entropies within a micro-batch decide: a bonus on
        them, or only the most uncertain tokens count.
        """
        by_entropy = self._entropy_bonus_enabled or self.top_entropy_quantile < 1
        return self.loss_type in ADDITIVE_LOSSES and not by_entropy
