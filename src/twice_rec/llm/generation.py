"""Answers of a language model in this process, and the likelihood of given answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from twice_rec.artifacts import InputError
from twice_rec.llm.modeling import encode_chat, stop_token_ids
from twice_rec.llm.shared_prefix import continuation_log_probabilities
from twice_rec.prompts import Message


@dataclass(frozen=True, slots=True)
class Generation:
    """One sampled or greedy answer.

    Args:
        text: without special tokens.
        mean_log_probability: over its tokens, the one that ended it included, at temperature 1.
        truncated: it ran into the length limit instead of ending with a stop token.
    """

    text: str
    mean_log_probability: float
    truncated: bool


class _ChosenLogProbabilities(LogitsProcessor):
    """Keeps the log-probability of every chosen token, but never more than one step's logits.

    Processors that are passed to `generate` run before temperature and top-p, so these are the model's own values.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._chosen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._last is not None:
            self._chosen.append(self._last.gather(1, input_ids[:, -1:]))
        self._last = torch.log_softmax(scores.float(), dim=-1)
        return scores

    def finish(self, last_tokens: Tensor) -> Tensor:
        """float32 [B, T] of all steps, given the last step's tokens [B]."""
        assert self._last is not None
        return torch.cat([*self._chosen, self._last.gather(1, last_tokens[:, None])], dim=1)


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
        ids = [encode_chat(self.tokenizer, prompt) for prompt in prompts]
        longest = max(map(len, ids))
        device = self.model.device
        padded = torch.tensor(
            [[self.tokenizer.pad_token_id] * (longest - len(row)) + row for row in ids], device=device
        )
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
        recorder = _ChosenLogProbabilities()
        sampling = {} if seed is None else {"temperature": temperature, "top_p": top_p, "top_k": 0}
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed or 0)
            output = self.model.generate(
                input_ids=padded,
                attention_mask=mask,
                do_sample=seed is not None,
                num_return_sequences=num_samples,
                max_new_tokens=self.max_new_tokens,
                eos_token_id=self._stop,
                pad_token_id=self.tokenizer.pad_token_id,
                logits_processor=LogitsProcessorList([recorder]),
                **sampling,
            )
        tokens = output[:, longest:]
        log_probabilities = recorder.finish(tokens[:, -1])
        answers = []
        for row, sequence in enumerate(tokens.tolist()):
            end = next((i for i, token in enumerate(sequence) if token in self._stop), len(sequence))
            mean = float(log_probabilities[row, : end + 1].mean())
            text = self.tokenizer.decode(sequence[:end], skip_special_tokens=True)
            answers.append(Generation(text, mean, end == len(sequence)))
        return [answers[start : start + num_samples] for start in range(0, len(answers), num_samples)]

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
