"""What our rollouts share: prompts in groups, seeds, columns for the rewards, figures for the log."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from twice_rec.grpo.trl_private import metrics
from twice_rec.llm.generation import Completion
from twice_rec.llm.tokens import encode_chat
from twice_rec.random_streams import stream_seed


class Group(NamedTuple):
    """The completions of one prompt in one process."""

    prompt_ids: list[int]
    positions: list[int]  # of the completions in the step, within this process
    number: int  # in the whole call, over all processes; the parts of a group that is split have the same
    first: int  # place of its first completion among all that this policy was asked for, over all processes


class Rollouts(ABC):
    """Samples completions when TRL's `rollout_func` hook asks; subclasses say how.

    `seed` and the step decide what is drawn; nothing depends on the state of a global generator.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int):
        self._tokenizer, self._seed = tokenizer, seed
        self._calls = (-1, -1)  # step, calls since it began
        self._asked = 0  # completions that were asked for since the step began, over all processes
        self._sync_seconds = 0.0

    @abstractmethod
    def attach(self, trainer: Any) -> None:
        """Join a trainer, before it trains.

        Raises:
            InputError: if the trainer's settings do not fit.
        """

    @abstractmethod
    def _sample(self, groups: Sequence[Group], trainer: Any, version: int, call: int) -> list[list[Completion]]:
        """Return the completions of each group.

        Args:
            version: of the policy: optimizer steps that made it.
            call: number of this call within the step.
        """

    def __call__(self, prompts: Sequence[Sequence[Mapping[str, str]]], trainer: Any) -> dict[str, list[Any]]:
        """Sample one completion per entry of `prompts`; TRL repeats each prompt once per completion of its group.

        Returns:
            One value per entry, in order: `prompt_ids`, `completion_ids`, `logprobs` (at the sampling temperature), and
            for the reward functions `policy_version` and `truncated`.
        """
        version, started = trainer.state.global_step, time.perf_counter()
        if self._calls[0] != version:
            self._calls, self._asked = (version, -1), 0
        self._calls = (version, self._calls[1] + 1)
        groups = self._groups(prompts, trainer)
        self._asked += trainer.accelerator.num_processes * len(prompts)
        entries: list[Any] = [None] * len(prompts)  # (prompt ids, completion)
        for group, completions in zip(groups, self._sample(groups, trainer, version, self._calls[1]), strict=True):
            for position, completion in zip(group.positions, completions, strict=True):
                entries[position] = (group.prompt_ids, completion)
        seconds, tokens = time.perf_counter() - started, sum(len(completion.token_ids) for _, completion in entries)
        metrics(trainer)["rollout/seconds"].append(seconds)
        metrics(trainer)["rollout/tokens_per_second"].append(tokens / seconds)
        metrics(trainer)["rollout/sync_seconds"].append(self._sync_seconds)
        metrics(trainer)["rollout/policy_version"].append(version)
        self._sync_seconds = 0.0
        return {
            "prompt_ids": [prompt_ids for prompt_ids, _ in entries],
            "completion_ids": [completion.token_ids for _, completion in entries],
            "logprobs": [completion.logprobs for _, completion in entries],
            "policy_version": [version] * len(entries),
            "truncated": [completion.truncated for _, completion in entries],
        }

    def _groups(self, prompts: Sequence[Sequence[Mapping[str, str]]], trainer: Any) -> list[Group]:
        """Collect each group's prompts; TRL deals a call's completions to the processes in order, a group's together.

        A prompt that was drawn twice makes two groups.
        """
        num_generations = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        first = trainer.accelerator.process_index * len(prompts)
        groups: dict[int, Group] = {}
        for position, prompt in enumerate(prompts):
            number = (first + position) // num_generations
            if number not in groups:
                ids = encode_chat(self._tokenizer, [dict(message) for message in prompt])
                groups[number] = Group(ids, [], number, self._asked + first + position)
            groups[number].positions.append(position)
        return list(groups.values())

    def _seed_of(self, version: int, *place: int) -> int:
        """Return 31 bits from seed, step, and a place within the step, such as call and process."""
        return stream_seed(self._seed, "completions of stage 3", version, *place)


def batches(groups: Sequence[Group], size: int) -> list[list[Group]]:
    """Return whole groups in batches of at most `size` completions; a larger group is a batch of its own."""
    found: list[list[Group]] = []
    room = 0
    for group in groups:
        if len(group.positions) > room:
            found.append([])
            room = size
        found[-1].append(group)
        room -= len(group.positions)
    return found
