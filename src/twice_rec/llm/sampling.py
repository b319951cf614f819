"""Many sampled answers a prompt, by the model in this process: the prompt computed once, its cache shared out.

`model.generate` computes a prompt anew for each of its answers, copies the whole cache to append one token, and goes on
with answers that have ended. Here none of it happens; the chosen tokens are the same.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer.

    Args:
        token_ids: its tokens, the stop token that ended it included.
        log_probabilities: of the tokens, at the sampling temperature.
        truncated: it ran into the length limit instead of ending with a stop token.
    """

    token_ids: list[int]
    log_probabilities: list[float]
    truncated: bool


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    copies: Sequence[int],
    stop: Collection[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[Sample]:
    """Answer each prompt as often as `copies` says.

    Args:
        model: a causal language model or a PEFT model around one, without dropout (`eval()`).
        prompts: token ids, of any lengths.
        stop: the ids that end an answer.
        temperature: the logits are divided by it.
        generator: of the sampling, on the model's device; None decodes greedily.

    Returns:
        The answers, those to the first prompt first.
    """
    device, longest = model.device, max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache = DynamicCache(config=model.config.get_text_config())
    logits = model(
        input_ids=padded,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    prompt_of = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(copies)).to(device)
    _make_room(cache, prompt_of, max_new_tokens)
    logits, positions = logits[prompt_of], mask.sum(1)[prompt_of]
    mask = torch.cat([mask[prompt_of], mask.new_ones(len(prompt_of), max_new_tokens)], dim=1)
    is_padded = len(set(map(len, prompts))) > 1
    stop_ids = torch.tensor(sorted(stop), device=device)
    rows = torch.arange(len(prompt_of), device=device)  # those that go on
    tokens = padded.new_zeros(len(rows), max_new_tokens)
    values = torch.zeros(len(rows), max_new_tokens, device=device)
    lengths = torch.full((len(rows),), max_new_tokens, device=device)
    for step in range(max_new_tokens):
        scores = torch.log_softmax(logits.float() / temperature, dim=-1)
        if generator is None:
            chosen = scores.argmax(dim=-1, keepdim=True)
        else:
            chosen = torch.multinomial(scores.exp(), 1, generator=generator)
        tokens[rows, step] = chosen[:, 0]
        values[rows, step] = scores.gather(1, chosen)[:, 0]
        ended = torch.isin(chosen[:, 0], stop_ids)
        lengths[rows[ended]] = step + 1
        going = (~ended).nonzero()[:, 0]
        if not len(going) or step + 1 == max_new_tokens:
            break
        if len(going) < len(rows):
            rows, chosen = rows[going], chosen[going]
            cache.batch_select_indices(going)
        logits = model(
            input_ids=chosen,
            attention_mask=mask[rows, : longest + step + 1] if is_padded else None,
            position_ids=positions[rows, None] + step,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    stops = set(stop)
    rows_of = zip(tokens.tolist(), values.tolist(), lengths.tolist(), strict=True)
    return [Sample(ids[:n], logps[:n], ids[n - 1] not in stops) for ids, logps, n in rows_of]


def _make_room(cache: DynamicCache, prompt_of: Tensor, room: int) -> None:
    """Give every answer its prompt's keys and values, with space for `room` more tokens."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = _RoomyLayer(layer, prompt_of, room)
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = _RoomySlidingLayer(layer, prompt_of, room)
        else:
            layer.batch_select_indices(prompt_of)


class _RoomyLayer(DynamicLayer):
    """A cache layer that writes new keys and values into space it has, instead of copying all it holds."""

    def __init__(self, filled: Any, prompt_of: Tensor, room: int):
        super().__init__()
        self.lazy_initialization(filled.keys, filled.values)
        self._length = filled.keys.shape[-2]
        self._keys, self._values = (_widened(states, prompt_of, room) for states in (filled.keys, filled.values))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; views on everything."""
        end = self._length + key_states.shape[-2]
        self._keys[:, :, self._length : end] = key_states
        self._values[:, :, self._length : end] = value_states
        self._length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self._length

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._keys, self._values = self._keys[indices], self._values[indices]


class _RoomySlidingLayer(DynamicSlidingWindowLayer):
    """The same for a sliding window: views on the last tokens of what it holds."""

    def __init__(self, filled: DynamicSlidingWindowLayer, prompt_of: Tensor, room: int):
        super().__init__(filled.sliding_window)
        self.lazy_initialization(filled.keys, filled.values)
        self.cumulative_length = filled.cumulative_length
        self._length = filled.keys.shape[-2]
        self._keys, self._values = (_widened(states, prompt_of, room) for states in (filled.keys, filled.values))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; views on the new tokens and the window before them."""
        start, end = max(self._length - self.sliding_window + 1, 0), self._length + key_states.shape[-2]
        self._keys[:, :, self._length : end] = key_states
        self._values[:, :, self._length : end] = value_states
        self._length = end
        self.cumulative_length += key_states.shape[-2]
        return self._keys[:, :, start:end], self._values[:, :, start:end]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._keys, self._values = self._keys[indices], self._values[indices]


def _widened(states: Tensor, prompt_of: Tensor, room: int) -> Tensor:
    rows, (_, heads, length, size) = len(prompt_of), states.shape
    out = states.new_empty(rows, heads, length + room, size)
    out[:, :, :length] = states[prompt_of]
    return out
