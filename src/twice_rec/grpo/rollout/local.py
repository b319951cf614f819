"""Rollouts in the trainer's own process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from twice_rec.grpo.rollout.base import Group, Rollouts, batches
from twice_rec.grpo.trl_private import model_for_generation
from twice_rec.llm.generation import Completion, sample_completions
from twice_rec.llm.tokens import stop_token_ids


class InProcessRollouts(Rollouts):
    """The trainer's model samples, by `sample_completions`: a prompt is computed once per group."""

    def attach(self, trainer: Any) -> None:
        """Nothing is to be joined: the trainer's own model samples."""

    def _sample(self, groups: Sequence[Group], trainer: Any, version: int, call: int) -> list[list[Completion]]:
        seed = self._seed_of(version, call, trainer.accelerator.process_index)
        generator = torch.Generator(trainer.accelerator.device).manual_seed(seed)
        completions: list[list[Completion]] = []
        with model_for_generation(trainer) as model:
            was_training = model.training
            model.eval()
            stop = stop_token_ids(model, self._tokenizer)
            with merged(model):
                for batch in batches(groups, trainer.args.per_device_train_batch_size):
                    completions += sample_completions(
                        model,
                        [group.prompt_ids for group in batch],
                        [len(group.positions) for group in batch],
                        stop,
                        trainer.max_completion_length,
                        trainer.temperature,
                        generator,
                    )
            model.train(was_training)
        return completions


@contextmanager
def merged(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Add the LoRA adapter to the weights, which saves three small products per layer; afterwards restore the tensors.

    Quantised weights, and those that DeepSpeed has gathered for now, stay as they are.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    weights = [layer.get_base_layer().weight for layer in layers]
    if not layers or any(not weight.is_floating_point() or hasattr(weight, "ds_id") for weight in weights):
        yield
        return
    tensors = [weight.data for weight in weights]
    model.merge_adapter(safe_merge=True)  # into copies
    try:
        yield
    finally:
        model.unmerge_adapter()
        for weight, tensor in zip(weights, tensors, strict=True):
            weight.data = tensor
