"""Where a step's answers come from: the trainer's own process, or vLLM servers that get each new policy as an adapter.

Both kinds are called by TRL's `rollout_func` hook with the step's prompts, each standing there once for every answer
that is wanted, and return token ids, their log-probabilities at the sampling temperature, and for the reward functions
the columns `policy_version` (optimizer steps that made the policy) and `truncated`.

TRL 1.16 applies its importance-sampling correction only where it runs a vLLM of its own (`use_vllm`). The servers
therefore take the place of TRL's own vLLM in the trainer: TRL asks it for `sync_weights()` whenever the policy has
changed, calls the hook, and corrects with the log-probabilities that the hook returns.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from twice_rec.config import GrpoRecipe
from twice_rec.errors import InputError
from twice_rec.llm.generation import Completion, sample_completions
from twice_rec.llm.tokens import encode_chat, stop_token_ids


@dataclass(frozen=True, slots=True)
class Group:
    """The answers that one prompt gets in one process.

    Args:
        prompt_ids: token ids.
        positions: where the answers stand in the step.
        number: of the group in the whole step, over all processes: a group that is split has one number.
    """

    prompt_ids: list[int]
    positions: list[int]
    number: int


class Rollouts(ABC):
    """What both kinds share. Subclasses sample.

    Args:
        tokenizer: of the policy.
        seed: of the sampling, together with step and process; nothing depends on the state of a global generator.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int):
        self._tokenizer = tokenizer
        self._seed = seed
        self._calls = (-1, -1)  # step, calls since it began
        self._sync_seconds = 0.0

    @abstractmethod
    def attach(self, trainer: Any) -> None:
        """Join a trainer, before it trains; InputError where the two do not fit."""

    @abstractmethod
    def _sample(self, groups: Sequence[Group], trainer: Any, version: int, call: int) -> list[list[Completion]]: ...

    def __call__(self, prompts: Sequence[Sequence[Mapping[str, str]]], trainer: Any) -> dict[str, list[Any]]:
        """TRL's hook: one answer for each entry of `prompts`, in order."""
        version, started = trainer.state.global_step, time.perf_counter()
        self._calls = (version, self._calls[1] + 1 if self._calls[0] == version else 0)
        groups = self._groups(prompts, trainer)
        answers: list[Any] = [None] * len(prompts)
        for group, samples in zip(groups, self._sample(groups, trainer, version, self._calls[1]), strict=True):
            for position, sample in zip(group.positions, samples, strict=True):
                answers[position] = (group.prompt_ids, sample)
        seconds, tokens = time.perf_counter() - started, sum(len(sample.token_ids) for _, sample in answers)
        for name, value in (
            ("seconds", seconds),
            ("tokens_per_second", tokens / seconds),
            ("sync_seconds", self._sync_seconds),
            ("policy_version", version),
        ):
            record(trainer, f"rollout/{name}", value)
        self._sync_seconds = 0.0
        return {
            "prompt_ids": [prompt for prompt, _ in answers],
            "completion_ids": [sample.token_ids for _, sample in answers],
            "logprobs": [sample.logprobs for _, sample in answers],
            "policy_version": [version] * len(answers),
            "truncated": [sample.truncated for _, sample in answers],
        }

    def _groups(self, prompts: Sequence[Sequence[Mapping[str, str]]], trainer: Any) -> list[Group]:
        """Equal prompts together; TRL deals a step's answers to the processes in order, a prompt's side by side."""
        copies = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        first = trainer.accelerator.process_index * len(prompts)
        groups: dict[tuple[tuple[str, str], ...], Group] = {}
        for position, prompt in enumerate(prompts):
            name = tuple((message["role"], message["content"]) for message in prompt)
            if name not in groups:
                ids = encode_chat(self._tokenizer, [dict(message) for message in prompt])
                groups[name] = Group(ids, [], (first + position) // copies)
            groups[name].positions.append(position)
        return list(groups.values())

    def _seed_of(self, version: int, call: int, number: int) -> int:
        """31 bits from seed, step, call within the step, and process or group."""
        return int(np.random.SeedSequence([self._seed, version, call, number]).generate_state(1)[0]) >> 1


class InProcessRollouts(Rollouts):
    """The trainer's model answers itself, by `generation.sample_completions`."""

    def attach(self, trainer: Any) -> None:
        """Raises InputError where the recipe asks for a sampling that is not done here."""
        arguments = trainer.args
        plain = {"top_p": (1.0,), "top_k": (0, None), "min_p": (0.0, None), "repetition_penalty": (1.0,)}
        for name, off in {**plain, "generation_kwargs": (None, {})}.items():
            value = getattr(arguments, name)
            if value not in off:
                raise InputError(
                    f"{name} is {value}; with rollout: transformers only {off[0]} is possible; drop the key, or "
                    "use --rollout vllm_server"
                )

    def _sample(self, groups: Sequence[Group], trainer: Any, version: int, call: int) -> list[list[Completion]]:
        from trl.models.utils import unwrap_model_for_generation

        arguments, device = trainer.args, trainer.accelerator.device
        generator = torch.Generator(device)
        generator.manual_seed(self._seed_of(version, call, trainer.accelerator.process_index))
        answers: list[list[Completion]] = []
        with unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=arguments.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=arguments.gradient_checkpointing_kwargs,
        ) as model:
            was_training = model.training
            model.eval()
            stop = stop_token_ids(model, self._tokenizer)
            with _merged(model):
                for batch in _batches(groups, arguments.per_device_train_batch_size):
                    answers += sample_completions(
                        model,
                        [group.prompt_ids for group in batch],
                        [len(group.positions) for group in batch],
                        stop,
                        trainer.max_completion_length,
                        trainer.temperature,
                        generator,
                    )
            model.train(was_training)
        return answers


@contextmanager
def _merged(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Sample from weights with the adapter added, three small products less a layer; then the old tensors stand again.

    Quantised weights and those that DeepSpeed has gathered for now stay as they are.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    weights = [layer.get_base_layer().weight for layer in layers]
    if not layers or any(not w.is_floating_point() or hasattr(w, "ds_id") for w in weights):
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


def _batches(groups: Sequence[Group], rows: int) -> list[list[Group]]:
    """Whole groups, together at most `rows` answers where a single one is not more."""
    batches: list[list[Group]] = []
    room = 0
    for group in groups:
        if len(group.positions) > room:
            batches.append([])
            room = rows
        batches[-1].append(group)
        room -= len(group.positions)
    return batches


def record(trainer: Any, name: str, value: float) -> None:
    """Log a value with the trainer's next line."""
    trainer._metrics["train" if trainer.model.training else "eval"][name].append(value)


def trl_arguments(recipe: GrpoRecipe, model_folder: Path) -> dict[str, Any]:
    """What TRL's configuration needs where TRL reaches vLLM itself; nothing otherwise.

    Raises:
        InputError: where TRL's server does not come up in time, or has another base model.
    """
    if recipe.rollout == "trl_colocate":
        return {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_tensor_parallel_size": recipe.rollout_tensor_parallel_size,
            "vllm_gpu_memory_utilization": recipe.rollout_gpu_memory_utilization,
            "vllm_max_model_length": recipe.rollout_max_model_len,
        }
    if recipe.rollout == "trl_server":
        from twice_rec.grpo.rollout.vllm import await_servers
        from twice_rec.grpo.rollout.vllm_client import base_name

        await_servers(recipe, base_name(model_folder))
        host, _, port = recipe.rollout_servers[0].rpartition(":")
        return {"use_vllm": True, "vllm_mode": "server", "vllm_server_host": host, "vllm_server_port": int(port)}
    return {}


def make_rollouts(recipe: GrpoRecipe, tokenizer: PreTrainedTokenizerBase, model_folder: Path) -> Rollouts | None:
    """The recipe's rollouts, or None where TRL sees to them.

    Raises:
        InputError: where a server does not come up in time, or has another base model.
    """
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # the hook may change; versions are pinned
    if recipe.rollout == "transformers":
        return InProcessRollouts(tokenizer, recipe.seed)
    if recipe.rollout != "vllm_server":
        return None
    from twice_rec.grpo.rollout.vllm import ServerRollouts

    return ServerRollouts(recipe, tokenizer, model_folder)


def attach_rollouts(trainer: Any) -> None:
    """Join our rollouts, if the trainer has them, to it before it trains; InputError where they do not fit."""
    if isinstance(trainer.rollout_func, Rollouts):
        trainer.rollout_func.attach(trainer)
