"""Completions of a model in this process, and the likelihood of given completions.

`model.generate` computes a prompt once per completion and copies the whole cache to append one token. Here a prompt
and its completions are one row of the batch, as in `shared_prefix`: the prompt is computed once, each step takes the
next token of every completion, and the attention mask lets a completion see the prompt and itself.

Shapes: B prompts, R of them unfinished, P tokens of the longest, G completions per prompt, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer
from transformers.integrations import is_deepspeed_zero3_enabled

from twice_rec.errors import InputError
from twice_rec.llm.attention import layer_windows
from twice_rec.llm.recipe import TAKES_MASKS
from twice_rec.llm.shared_prefix import (
    SharedRows,
    as_attention_mask,
    bare_model,
    continuation_certainties,
    continuation_logprobs,
    masks_after,
)
from twice_rec.llm.tokens import encode_chat, stop_token_ids
from twice_rec.prompts import Message

_LONG = 512  # tokens
_TILE = 64  # tokens whose logits are float32 at the same time
_AT_ONCE = 1024  # tokens whose logits over the whole vocabulary exist at the same time: 1 GiB for one of 262,144


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion as tokens."""

    token_ids: list[int]  # with the stop token that ended it
    logprobs: list[float]  # of the tokens, at the sampling temperature, before top-p
    truncated: bool  # it ran into the length limit instead of ending with a stop token


@dataclass(frozen=True, slots=True)
class TextCompletion:
    """One completion as text."""

    text: str  # without special tokens
    mean_logprob: float  # over its tokens and the stop token, at the sampling temperature
    truncated: bool


@dataclass(frozen=True, slots=True)
class ReadPrompts:
    """Prompts that a model has read; they can be gone on from several times."""

    lengths: list[int]  # in tokens
    mask: Tensor  # bool [B, P], False at the padding on the left
    layers: list[Any]  # of the cache, each with keys and values [B, heads, held, D]; a sliding window holds the last
    logits: Tensor  # [B, 1, V] after them

    def cache(self, model: PreTrainedModel, room: int) -> DynamicCache:
        """Return a cache of all prompts with room for so many more tokens."""
        return _cache_of(model, [_RoomyLayer(layer.keys, layer.values, room) for layer in self.layers])

    def cache_of(self, model: PreTrainedModel, row: int, room: int) -> DynamicCache:
        """Return a cache of one prompt, without its padding."""
        one, length = slice(row, row + 1), self.lengths[row]
        states = [(layer.keys[one, :, -length:], layer.values[one, :, -length:]) for layer in self.layers]
        return _cache_of(model, [_RoomyLayer(*of_layer, room) for of_layer in states])


@torch.no_grad()
def sample_completions(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    num_generations: Sequence[int],
    stop: Collection[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    top_p: float = 1.0,
    read: ReadPrompts | None = None,
) -> list[list[Completion]]:
    """Sample completions of every prompt, and return them per prompt.

    Args:
        model: a causal language model or a PEFT model around one, without dropout (`eval()`).
        prompts: token ids, of any lengths.
        num_generations: completions of each prompt, at least 1; every prompt is computed as if it had the most.
        stop: the ids that end a completion.
        temperature: divides the logits.
        generator: draws the tokens, on the model's device; None decodes greedily.
        top_p: draw only from the likeliest tokens that together have at least this probability.
        read: the prompts, if the model has read them.
    """
    device, group = model.device, max(num_generations)
    with mask_taking_attention(model):
        read = read or read_prompts(model, prompts)
        mask, cache = read.mask, read.cache(model, group * max_new_tokens)  # [B, P]
        logits = read.logits.expand(-1, group, -1)  # [B, G, V]
        rows = torch.arange(len(prompts), device=device)  # [R], the unfinished prompts
        tokens = rows.new_zeros(len(prompts), group, max_new_tokens)  # [B, G, T]
        logprobs = torch.zeros(tokens.shape, device=device)  # [B, G, T]
        lengths = torch.full_like(tokens[..., 0], max_new_tokens)  # [B, G]
        ended = torch.arange(group, device=device) >= torch.tensor(num_generations, device=device)[:, None]  # [B, G]
        stop_ids = torch.tensor(sorted(stop), device=device)  # [stop tokens]
        for step in range(max_new_tokens):
            scores = torch.log_softmax(logits.float() / temperature, dim=-1)  # [R, G, V]
            chosen = _choose(scores, generator, top_p)  # [R, G]
            tokens[rows, :, step] = chosen
            logprobs[rows, :, step] = scores.gather(2, chosen[..., None])[..., 0]
            stopped = torch.isin(chosen, stop_ids)  # [R, G]
            lengths[rows] = torch.where(stopped & ~ended[rows], step + 1, lengths[rows])
            ended[rows] |= stopped
            going = (~ended[rows].all(1)).nonzero()[:, 0]  # [R of the next step], positions in rows
            if not len(going) or step + 1 == max_new_tokens:
                break
            if len(going) < len(rows):
                rows, chosen = rows[going], chosen[going]
                cache.batch_select_indices(going)
            logits = _next_logits(model, chosen, mask[rows], step, cache)  # [R, G, V]
    groups = []
    for count, *columns in zip(num_generations, tokens.tolist(), logprobs.tolist(), lengths.tolist(), strict=True):
        parts = zip(*(column[:count] for column in columns), strict=True)
        groups.append([Completion(ids[:n], values[:n], ids[n - 1] not in stop) for ids, values, n in parts])
    return groups


def read_prompts(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> ReadPrompts:
    """Compute prompts, padded on the left to the longest; on CPUs long ones each by itself, which needs no mask."""
    longest = max(map(len, prompts))
    if model.device.type == "cpu" and len(prompts) > 1 and longest >= _LONG:
        return _side_by_side([read_prompts(model, [prompt]) for prompt in prompts])
    padded = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=model.device)  # [B, P]
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)  # [B, P]
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # [B, P]
    cache = DynamicCache(config=model.config.get_text_config())
    inputs = {"input_ids": padded, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
    logits = model(**inputs, use_cache=True, logits_to_keep=1).logits  # [B, 1, V]
    return ReadPrompts([len(prompt) for prompt in prompts], mask.bool(), cache.layers, logits)


def _side_by_side(alone: Sequence[ReadPrompts]) -> ReadPrompts:
    """Return prompts that were read alone as if they had been read together."""
    lengths = [one.lengths[0] for one in alone]
    order, shorter = torch.arange(max(lengths)), max(lengths) - torch.tensor(lengths)  # [P], [B]
    layers = []
    for of_prompts in zip(*(one.layers for one in alone), strict=True):
        held = max(layer.keys.shape[-2] for layer in of_prompts)
        states = ([layer.keys for layer in of_prompts], [layer.values for layer in of_prompts])
        keys, values = (torch.cat([pad(one, (0, 0, held - one.shape[-2], 0)) for one in kind]) for kind in states)
        layers.append(_States(keys, values))
    return ReadPrompts(lengths, order >= shorter[:, None], layers, torch.cat([one.logits for one in alone]))


class _States(NamedTuple):
    """A layer's part of `ReadPrompts.layers`."""

    keys: Tensor
    values: Tensor


def _cache_of(model: PreTrainedModel, layers: list[_RoomyLayer]) -> DynamicCache:
    cache = DynamicCache(config=model.config.get_text_config())
    cache.layers = layers
    return cache


def logprobs_after(
    model: PreTrainedModel,
    read: ReadPrompts,
    row: int,
    beginning: Sequence[int],
    continuations: Sequence[Sequence[int]],
) -> list[Tensor]:
    """Return what `continuation_logprobs` does, for a prompt that the model has read and a beginning after it.

    Args:
        row: number of the prompt among those that are read.
        beginning: what all continuations begin with, at least one token; it and they are all that is computed.
    """
    rows = SharedRows.of([(beginning, continuations)], model)
    cache = read.cache_of(model, row, rows.input_ids.shape[1])
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or [""]
    held = {kind: cache.layers[index].held for index, kind in enumerate(kinds)}
    how = {"attention_mask": masks_after(model, rows, held), "position_ids": rows.position_ids + read.lengths[row]}
    inputs = {"input_ids": rows.input_ids, **how, "past_key_values": cache}
    logits = model(**inputs, use_cache=True, logits_to_keep=rows.column).logits[0]  # [M, V]
    tiles = zip(logits.split(_TILE), rows.targets.split(_TILE), strict=True)
    logprobs = torch.cat([-cross_entropy(tile.float(), wanted, reduction="none") for tile, wanted in tiles])  # [M]
    return list(logprobs[rows.places].split([len(continuation) for continuation in continuations]))


def _choose(scores: Tensor, generator: torch.Generator | None, top_p: float) -> Tensor:
    """Return a token for each of the logprobs [R, G, V]: the likeliest, or one drawn from the nucleus."""
    if generator is None:
        return scores.argmax(dim=-1)  # [R, G]
    weights = scores.exp()  # [R, G, V]
    if top_p < 1.0:
        ordered, order = weights.sort(dim=-1, descending=True)  # [R, G, V]
        before = ordered.cumsum(-1) - ordered  # [R, G, V], probability of all likelier tokens
        weights = weights.scatter(-1, order, ordered.where(before < top_p, 0.0))
    return torch.multinomial(weights.flatten(0, 1), 1, generator=generator).view(scores.shape[:2])  # [R, G]


def _next_logits(model: PreTrainedModel, chosen: Tensor, mask: Tensor, step: int, cache: DynamicCache) -> Tensor:
    """Return the logits [R, G, V] after the tokens `chosen` [R, G], which step number `step` wrote.

    Args:
        mask: bool [R, P], False at the padding of a prompt.
    """
    device, group, longest = chosen.device, chosen.shape[1], mask.shape[1]
    column = torch.arange((step + 1) * group, device=device)  # [C]; each step appends one token of every completion
    own = column % group == torch.arange(group, device=device)[:, None]  # [G, C]
    past = mask[:, None, None].expand(-1, 1, group, -1)  # [R, 1, G, P]
    sees = torch.cat([past, own.expand(len(past), 1, -1, -1)], dim=-1)  # [R, 1, G, P + C]
    age = torch.cat([longest + step - torch.arange(longest, device=device), step - column // group])  # [P + C]
    config, masks = model.config.get_text_config(), dict[str, Tensor]()
    held = {kind: cache.layers[index].held for index, kind in enumerate(getattr(config, "layer_types", None) or [""])}
    for kind, window in layer_windows(config).items():
        seen = sees if window is None else (sees & (age < window))
        if kind in held:  # a sliding window's cache holds the last tokens only
            masks[kind] = as_attention_mask(model, seen[..., seen.shape[-1] - held[kind] - group :])
    positions = (mask.sum(1)[:, None] + step).expand(-1, group)  # [R, G]
    inputs = {"input_ids": chosen, "attention_mask": masks.get("", masks), "position_ids": positions}
    return model(**inputs, past_key_values=cache, use_cache=True).logits


@contextmanager
def mask_taking_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use sdpa instead of kernels that take no mask of ours (varlen)."""
    bare = bare_model(model)
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
    """A cache layer with room for more tokens, which are written into it instead of copying all it holds.

    `keys` and `values` are those after the prompt, and stay as they are; a sliding window's are the last tokens' only.
    """

    def __init__(self, keys: Tensor, values: Tensor, room: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.held = keys.shape[-2]
        self._keys, self._values = (pad(states, (0, 0, 0, room)) for states in (keys, values))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [R, heads, G, D]; return views on everything."""
        end = self.held + key_states.shape[-2]
        self._keys[:, :, self.held : end] = key_states
        self._values[:, :, self.held : end] = value_states
        self.held = end
        return self._keys[:, :, :end], self._values[:, :, :end]  # [R, heads, held, D]

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        return self.held

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._keys, self._values = self._keys[indices], self._values[indices]


class TransformersGenerator:
    """Generates and scores with transformers; sets the model to `eval()`."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self._stop = stop_token_ids(model, tokenizer)
        self._read: tuple[ReadPrompts, dict[tuple[int, ...], int]] | None = None  # what was asked last

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[Message]],
        num_generations: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> list[list[TextCompletion]]:
        """Return completions of every prompt; without a seed, the greedy one.

        The prompts need not be read again if the next call, of this or of `score`, asks them.
        """
        if seed is None and num_generations != 1:
            raise ValueError("greedy decoding gives one completion; pass a seed to sample several")
        ids = [encode_chat(self.tokenizer, prompt) for prompt in prompts]
        rows = {tuple(prompt): row for row, prompt in enumerate(ids)}
        if self._read is None or self._read[1] != rows:
            self._read = None  # frees the memory
            with mask_taking_attention(self.model):
                self._read = read_prompts(self.model, ids), rows
        groups = sample_completions(
            self.model,
            ids,
            [num_generations] * len(prompts),
            self._stop,
            self.max_new_tokens,
            temperature,
            None if seed is None else torch.Generator(self.model.device).manual_seed(seed),
            top_p,
            self._read[0],
        )
        return [[self._as_text(completion) for completion in group] for group in groups]

    def forget(self) -> None:
        """Free what was read; what `score` is asked next is read anew."""
        self._read = None

    def _as_text(self, completion: Completion) -> TextCompletion:
        ids = completion.token_ids if completion.truncated else completion.token_ids[:-1]
        mean = sum(completion.logprobs) / len(completion.logprobs)
        return TextCompletion(self.tokenizer.decode(ids, skip_special_tokens=True), mean, completion.truncated)

    @torch.inference_mode()
    def score(self, prompt: Sequence[Message], completions: Sequence[str]) -> list[float]:
        """Return the logprob of each completion of one prompt, up to a constant that all of them share.

        They are encoded whole, as in training. The tokens that all begin with are computed once; they would add the
        same to all logprobs, so they are left out.
        """
        rows = [encode_chat(self.tokenizer, prompt, completion) for completion in completions]
        shortest = min(map(len, rows))
        shared = next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest - 1)
        prompt_ids, ends = encode_chat(self.tokenizer, prompt), [row[shared:] for row in rows]
        read, numbers = self._read or (None, {})
        number = numbers.get(tuple(prompt_ids))
        if read is None or number is None or shared <= len(prompt_ids):
            logprobs = continuation_logprobs(self.model, rows[0][:shared], ends)
        else:
            with mask_taking_attention(self.model):
                logprobs = logprobs_after(self.model, read, number, rows[0][len(prompt_ids) : shared], ends)
        return [float(of_row.sum()) for of_row in logprobs]


class PolicyScorer:
    """Scores completions with a model in training, and leaves its training mode as it was.

    The model is the module that the adapter is injected into, or whose own weights are trained.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self._model, self._tokenizer = model, tokenizer

    def score(self, prompt: Sequence[Message], completions: Sequence[str]) -> list[float]:
        """Do what `TransformersGenerator.score` does.

        Raises:
            InputError: under ZeRO-3, where no process has the whole model.
        """
        with self._whole_model():
            return TransformersGenerator(self._model, self._tokenizer, max_new_tokens=1).score(prompt, completions)

    @torch.inference_mode()
    def certainties(self, prompt: Sequence[Message], completions: Sequence[Sequence[int]]) -> list[float]:
        """Return for each completion, which is token ids, the mean of `continuation_certainties`, at temperature 1.

        This takes a forward pass over the prompt for every `_AT_ONCE` tokens of its completions, since the logits
        of all their tokens exist at the same time. Raises as `score` does.
        """
        ids, found = encode_chat(self._tokenizer, prompt), list[float]()
        with self._whole_model():
            while len(found) < len(completions):
                sizes = accumulate(map(len, completions[len(found) :]))
                count = max(1, sum(size <= _AT_ONCE for size in sizes))
                batch = completions[len(found) : len(found) + count]
                found += [float(values.mean()) for values in continuation_certainties(self._model, ids, batch)]
        return found

    @contextmanager
    def _whole_model(self) -> Iterator[None]:
        """Set the model to `eval()` for a while."""
        if is_deepspeed_zero3_enabled():
            raise InputError(
                "the rewards rank and certainty need the whole model in every process, which ZeRO-3 splits; use "
                "recipes/accelerate_configs/zero2.yaml, or leave them out of reward_funcs"
            )
        training = self._model.training
        self._model.eval()
        try:
            yield
        finally:
            self._model.train(training)
