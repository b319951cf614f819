"""Many sampled answers a prompt, by the model in this process: the prompt computed once, its cache read by all of them.

`model.generate` computes a prompt anew for each of its answers and copies the whole cache to append one token. Here a
prompt and its answers are one row of the batch, as in `shared_prefix.py`: each step takes the next token of every
answer, and the attention mask lets an answer see the prompt and itself. The chosen tokens are the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from twice_rec.config import TAKES_MASKS
from twice_rec.llm.shared_prefix import as_attention_mask, layer_windows


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer.

    Args:
        token_ids: its tokens, the stop token that ended it included.
        log_probabilities: of the tokens, at the sampling temperature, whatever top-p left out.
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
    top_p: float = 1.0,
) -> list[list[Sample]]:
    """Answer each prompt as often as `copies` says.

    Args:
        model: a causal language model or a PEFT model around one, without dropout (`eval()`).
        prompts: token ids, of any lengths.
        copies: at least 1 each; best all alike, since every prompt is computed as if it had the most.
        stop: the ids that end an answer.
        temperature: the logits are divided by it.
        generator: of the sampling, on the model's device; None decodes greedily.
        top_p: what is sampled from are the likeliest tokens that together have at least this probability.

    Returns:
        The answers to each prompt.
    """
    with _with_masks(model):
        device, longest, most = model.device, max(map(len, prompts)), max(copies)
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
        ).logits.expand(-1, most, -1)
        cache.layers = [_RoomyLayer(layer, most * max_new_tokens) for layer in cache.layers]
        rows = torch.arange(len(prompts), device=device)  # the prompts with answers that go on
        lengths, mask = mask.sum(1), mask.bool()
        stop_ids = torch.tensor(sorted(stop), device=device)
        tokens = padded.new_zeros(len(prompts), most, max_new_tokens)
        values = torch.zeros(tokens.shape, device=device)
        ended = torch.arange(most, device=device) >= torch.tensor(copies, device=device)[:, None]
        ends = torch.full_like(tokens[..., 0], max_new_tokens)
        for step in range(max_new_tokens):
            scores = torch.log_softmax(logits.float() / temperature, dim=-1)
            if generator is None:
                chosen = scores.argmax(dim=-1)
            else:
                weights = _nucleus(scores.exp(), top_p).flatten(0, 1)
                chosen = torch.multinomial(weights, 1, generator=generator).view(scores.shape[:2])
            tokens[rows, :, step] = chosen
            values[rows, :, step] = scores.gather(2, chosen[..., None])[..., 0]
            stopped = torch.isin(chosen, stop_ids)
            ends[rows] = torch.where(stopped & ~ended[rows], step + 1, ends[rows])
            ended[rows] |= stopped
            going = (~ended[rows].all(1)).nonzero()[:, 0]
            if not len(going) or step + 1 == max_new_tokens:
                break
            if len(going) < len(rows):
                rows, chosen = rows[going], chosen[going]
                cache.batch_select_indices(going)
            logits = model(
                input_ids=chosen,
                attention_mask=_step_masks(model, mask[rows], step, most, cache),
                position_ids=(lengths[rows, None] + step).expand(-1, most),
                past_key_values=cache,
                use_cache=True,
            ).logits
    stops, answers = set(stop), list[list[Sample]]()
    for prompt, count in enumerate(copies):
        held = (tokens[prompt, :count].tolist(), values[prompt, :count].tolist(), ends[prompt, :count].tolist())
        answers.append(
            [Sample(ids[:n], logps[:n], ids[n - 1] not in stops) for ids, logps, n in zip(*held, strict=True)]
        )
    return answers


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The same, 0 for every token behind those that together have the probability `top_p`."""
    if top_p >= 1.0:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True)
    return probabilities.scatter(-1, order, ordered.where(ordered.cumsum(-1) - ordered < top_p, 0.0))


def _step_masks(
    model: PreTrainedModel, prompt_mask: Tensor, step: int, answers: int, cache: DynamicCache
) -> Tensor | dict[str, Tensor]:
    """What the tokens of a step see, in each kind of layer: [prompts, 1, answers, cached tokens].

    Args:
        prompt_mask: bool [prompts, longest], false at the padding on the left.
        step: of the tokens, from 0.
    """
    device, longest = prompt_mask.device, prompt_mask.shape[1]
    column = torch.arange((step + 1) * answers, device=device)  # each step appends one token of every answer
    own = column % answers == torch.arange(answers, device=device)[:, None]
    past = prompt_mask[:, None, None].expand(-1, 1, answers, -1)
    sees = torch.cat([past, own.expand(len(past), 1, -1, -1)], dim=-1)
    age = torch.cat([longest + step - torch.arange(longest, device=device), step - column // answers])
    config, masks = model.config.get_text_config(), dict[str, Tensor]()
    held = {kind: cache.layers[index].held for index, kind in enumerate(getattr(config, "layer_types", None) or [""])}
    for kind, window in layer_windows(config).items():
        seen = sees if window is None else (sees & (age < window))
        if kind in held:
            masks[kind] = as_attention_mask(model, seen[..., seen.shape[-1] - held[kind] - answers :])
    return masks.get("", masks)


@contextmanager
def _with_masks(model: PreTrainedModel) -> Iterator[None]:
    """Kernels that take no mask of ours (flash, flex) make room for sdpa."""
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    implementation = bare.config._attn_implementation
    if implementation in TAKES_MASKS:
        yield
        return
    bare.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        bare.set_attn_implementation(implementation)


class _RoomyLayer(DynamicLayer):
    """A cache layer that writes new keys and values into space it has, instead of copying all it holds.

    Args:
        filled: the layer after the prompt; of a sliding window, it holds the window's last tokens.
        room: for how many more tokens.
    """

    def __init__(self, filled: Any, room: int):
        super().__init__()
        self.lazy_initialization(filled.keys, filled.values)
        self.held = filled.keys.shape[-2]
        self._keys, self._values = (_widened(states, room) for states in (filled.keys, filled.values))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; views on everything."""
        end = self.held + key_states.shape[-2]
        self._keys[:, :, self.held : end] = key_states
        self._values[:, :, self.held : end] = value_states
        self.held = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.held

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._keys, self._values = self._keys[indices], self._values[indices]


def _widened(states: Tensor, room: int) -> Tensor:
    rows, heads, length, size = states.shape
    out = states.new_empty(rows, heads, length + room, size)
    out[:, :, :length] = states
    return out
