"""Answers of a language model in this process, and the likelihood of given answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from twice_rec.errors import InputError
from twice_rec.llm.models import encode_chat, stop_token_ids
from twice_rec.llm.sampling import Sample, sample_answers
from twice_rec.llm.shared_prefix import continuation_log_probabilities
from twice_rec.prompts import Message


@dataclass(frozen=True, slots=True)
class Generation:
    """One sampled or greedy answer.

    Args:
        text: without special tokens.
        mean_log_probability: over its tokens, the one that ended it included, at the sampling temperature.
        truncated: it ran into the length limit instead of ending with a stop token.
    """

    text: str
    mean_log_probability: float
    truncated: bool


class TransformersGenerator:
    """Generates and scores with transformers.

    Args:
        model: on its device.
        tokenizer: padding on the left.
        max_new_tokens: longest answer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self._stop = stop_token_ids(model, tokenizer)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[Message]],
        num_samples: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> list[list[Generation]]:
        """Answer every prompt `num_samples` times.

        Args:
            seed: of the sampling; None decodes greedily (and allows one sample only).

        Returns:
            For each prompt its answers.
        """
        if seed is None and num_samples != 1:
            raise ValueError("greedy decoding gives one answer; pass a seed to sample several")
        generator = None if seed is None else torch.Generator(self.model.device).manual_seed(seed)
        answers = sample_answers(
            self.model,
            [encode_chat(self.tokenizer, prompt) for prompt in prompts],
            [num_samples] * len(prompts),
            self._stop,
            self.max_new_tokens,
            temperature,
            generator,
            top_p,
        )
        return [[self._generation(sample) for sample in samples] for samples in answers]

    def _generation(self, sample: Sample) -> Generation:
        text = self.tokenizer.decode(
            sample.token_ids if sample.truncated else sample.token_ids[:-1], skip_special_tokens=True
        )
        return Generation(text, sum(sample.log_probabilities) / len(sample.log_probabilities), sample.truncated)

    @torch.inference_mode()
    def score(self, prompt: Sequence[Message], answers: Sequence[str]) -> list[float]:
        """Log-probability of each answer to one prompt, up to a constant that all of them share.

        The answers are encoded whole, as in training; what their tokens have in common with the prompt is computed
        once and adds the same to all of them, so it is left out.
        """
        rows = [encode_chat(self.tokenizer, prompt, answer) for answer in answers]
        shortest = min(map(len, rows))
        shared = next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest - 1)
        values = continuation_log_probabilities(self.model, rows[0][:shared], [row[shared:] for row in rows])
        return [float(value.sum()) for value in values]


class Policy:
    """A model in training as the judge of given answers; its training mode is afterwards what it was.

    Args:
        model: the module that the adapter is injected into, or whose own weights are trained.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self._model = model
        self._tokenizer = tokenizer

    def score(self, prompt: Sequence[Message], answers: Sequence[str]) -> list[float]:
        """See `TransformersGenerator.score`.

        Raises:
            InputError: under ZeRO-3, where no process has the whole model.
        """
        if is_deepspeed_zero3_enabled():
            raise InputError(
                "the reward rank needs the whole model in every process, which ZeRO-3 splits; use "
                "recipes/accelerate_configs/zero2.yaml, or leave rank out of reward_funcs"
            )
        training = self._model.training
        try:
            return TransformersGenerator(self._model, self._tokenizer, max_new_tokens=1).score(prompt, answers)
        finally:
            self._model.train(training)
