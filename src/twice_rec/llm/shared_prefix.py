"""Several continuations of one prompt in one row, each common beginning computed once.

A prompt and its continuations are laid out as a tree: after a beginning that several share come their different ends,
one after another. Positions count from the prompt's first token along each branch, and attention lets a token see its
own branch only, by a mask or by segments (see `varlen`). So every token gets exactly the value it would have in a row
of its own.

Shapes: G rows, L columns, N tokens of all continuations, M of them different (a shared beginning counts once).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from twice_rec.llm.attention import layer_windows
from twice_rec.llm.recipe import TAKES_MASKS, VARLEN
from twice_rec.llm.varlen import Segments, unread_mask

Group = tuple[Sequence[int], Sequence[Sequence[int]]]  # a prompt, its continuations


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Prompts with their continuations: one row per prompt, padded on the right, or all in one row, for segments.

    Args:
        input_ids: int64 [G, L].
        position_ids: int64 [G, L], along each branch.
        ends: int64 [G, L], the first column after the last branch through a token; from there on no token sees it.
        row, column: int64 [M], the place of the logits that predict each token of `targets`.
        targets: int64 [M], the different tokens of the continuations.
        places: int64 [N], for each token of the continuations, one after another, its index in `targets`.
        segments: how the only row is cut; None for rows with masks.
    """

    input_ids: Tensor
    position_ids: Tensor
    ends: Tensor
    row: Tensor
    column: Tensor
    targets: Tensor
    places: Tensor
    segments: Segments | None = None

    @classmethod
    def of(cls, groups: Sequence[Group], model: PreTrainedModel) -> SharedRows:
        """Lay out token ids as the model's attention takes them, on its device.

        A prompt has at least one token, a continuation may be empty.
        """
        trees = [_tree(prompt, continuations) for prompt, continuations in groups]
        if model.config._attn_implementation == VARLEN:
            return cls._in_one_row(groups, trees, model.device)
        length, ids, positions, ends = max(len(tree.tokens) for tree in trees), [], [], []
        rows, columns, targets, places = [], [], [], []
        for number, ((prompt, _), tree) in enumerate(zip(groups, trees, strict=True)):
            padding = range(len(tree.tokens), length)
            ids.append(tree.tokens + [0] * len(padding))
            positions.append(tree.positions + [0] * len(padding))
            ends.append(tree.ends + [column + 1 for column in padding])
            places += [len(targets) + column - len(prompt) for path in tree.paths for column in path]
            rows += [number] * len(tree.before)
            columns += tree.before
            targets += tree.tokens[len(prompt) :]
        layout = (ids, positions, ends, rows, columns, targets, places)
        return cls(*(torch.tensor(values, dtype=torch.long, device=model.device) for values in layout))

    @classmethod
    def _in_one_row(cls, groups: Sequence[Group], trees: Sequence[_Tree], device: torch.device) -> SharedRows:
        ids, positions, ends, columns, targets, places = (list[int]() for _ in range(6))
        parts = []
        for (prompt, _), tree in zip(groups, trees, strict=True):
            start, before = len(ids), len(targets)
            ids += tree.tokens
            positions += tree.positions
            ends += [end + start for end in tree.ends]
            places += [before + column - len(prompt) for path in tree.paths for column in path]
            columns += [start + column for column in tree.before]
            targets += tree.tokens[len(prompt) :]
            parts += [(np.asarray(seen, dtype=np.int64) + start, count) for seen, count in tree.segments]
        layout = ([ids], [positions], [ends], [0] * len(columns), columns, targets, places)
        tensors = (torch.tensor(values, dtype=torch.long, device=device) for values in layout)
        return cls(*tensors, Segments.of(parts, device))

    def real(self) -> Tensor | None:
        """Return where no padding is, bool [G, L]; None if there is none. A row begins in its first column."""
        if self.segments is not None:
            return None
        real = self.position_ids > 0  # [G, L]
        real[:, 0] = True
        return real

    def inputs(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return what a model's forward takes."""
        if self.segments is None:
            how = {"attention_mask": attention_masks(model, self.ends, self.position_ids)}
        else:
            how = segment_inputs(model, self.segments, self.input_ids.shape[1])
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, **how}


class _Tree(NamedTuple):
    """One row; the first three are per column."""

    tokens: list[int]
    positions: list[int]
    ends: list[int]
    before: list[int]  # per token after the prompt, the column of the token before it in its branch
    paths: list[list[int]]  # per continuation, the columns of its tokens
    segments: list[tuple[Sequence[int], int]]  # of the prompt and each branch: columns seen before it, its length


def _tree(prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> _Tree:
    """Take the continuations in sorted order, so that those with a common beginning are neighbours."""
    tokens, positions, ends, before = list(prompt), list(range(len(prompt))), [0] * len(prompt), list[int]()
    paths, previous, path = dict[tuple[int, ...], list[int]](), (), list[int]()
    segments: list[tuple[Sequence[int], int]] = [((), len(prompt))]
    for continuation in sorted(set(map(tuple, continuations))):
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(previous, continuation, strict=False)))
        for column in path[common:]:  # the branch of the one before ends here
            ends[column] = len(tokens)
        new = range(len(tokens), len(tokens) + len(continuation) - common)
        segments.append(([*range(len(prompt)), *path[:common]], len(new)))
        path = [*path[:common], *new]
        before += [path[depth - 1] if depth else len(prompt) - 1 for depth in range(common, len(path))]
        tokens += continuation[common:]
        positions += range(len(prompt) + common, len(prompt) + len(path))
        ends += [0] * len(new)
        paths[continuation], previous = path, continuation
    for column in (*range(len(prompt)), *path):
        ends[column] = len(tokens)
    in_order = [paths[tuple(continuation)] for continuation in continuations]
    return _Tree(tokens, positions, ends, before, in_order, segments)


def continuation_logprobs(
    model: PreTrainedModel, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Return the logprob of every token of every continuation, given the prompt and the tokens before it.

    Args:
        model: with full or sliding-window attention, of a kind in `recipe.SHARES_PREFIXES`.
        prompt, continuations: token ids, at least one each.

    Returns:
        One float32 tensor per continuation, with gradients if the caller allows them.
    """
    rows, logits = _predictions(model, prompt, continuations)
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, rows.targets[:, None]).squeeze(1)  # [M]
    return list(logprobs[rows.places].split([len(continuation) for continuation in continuations]))


def continuation_certainties(
    model: PreTrainedModel, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Return KL(uniform || model), in nats, where each token of each continuation is predicted.

    With logits z over V tokens it is logsumexp(z) - mean(z) - log V: 0 if all tokens are equally likely, else above.
    Arguments and result are as in `continuation_logprobs`.
    """
    rows, logits = _predictions(model, prompt, continuations)
    certainties = logits.logsumexp(-1) - logits.mean(-1) - math.log(logits.shape[-1])  # [M]
    return list(certainties[rows.places].split([len(continuation) for continuation in continuations]))


def _predictions(
    model: PreTrainedModel, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
) -> tuple[SharedRows, Tensor]:
    """Return the layout of one prompt's continuations, and the logits, float32 [M, V], that predict their tokens."""
    if not prompt or not all(continuations):
        raise ValueError("the prompt and every continuation need at least one token")
    rows = SharedRows.of([(prompt, continuations)], model)
    return rows, model(**rows.inputs(model), logits_to_keep=rows.column, use_cache=False).logits[0].float()


def token_scores(
    model: torch.nn.Module, groups: Sequence[Group], laid_out: Callable[[SharedRows], None] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return logprob and entropy of every token of the continuations, with gradients.

    TRL's fused head computes them in tiles from the hidden states, so [N, V] logits never exist as a whole. A hook
    hands it only the M positions that predict a token. All happens within one forward of the wrapped model, as
    data-parallel and ZeRO wrappers need it.

    Args:
        model: with TRL's head (`trl.trainer.utils.add_fused_lm_head`, which holds the temperature), bare or wrapped.
        groups: prompts with their continuations, see `SharedRows.of`.
        laid_out: is called with the rows that go through the model.

    Returns:
        float32 [N] each, the tokens of one continuation after another; the entropies are None if the head computes
        none.
    """
    rows, scores = _forward(model, groups, lambda rows: {"shift_labels": rows.targets[None], "fused_lm_head": True})
    if laid_out is not None:
        laid_out(rows)
    entropies = None if scores.entropy is None else scores.entropy[0, rows.places]  # [N]
    return scores.log_probs[0, rows.places], entropies  # [N] each, of [1, M]


def group_logprobs(model: torch.nn.Module, groups: Sequence[Group]) -> Tensor:
    """Return the logprob of every continuation, the sum over its tokens, with gradients: float32 [continuations].

    Arguments are as in `token_scores`, but the model has its own head, and the logits of all different tokens exist at
    the same time.
    """
    rows, output = _forward(model, groups, lambda rows: {"use_cache": False})
    logprobs = -torch.nn.functional.cross_entropy(output.logits[0].float(), rows.targets, reduction="none")  # [M]
    lengths = [len(continuation) for _, continuations in groups for continuation in continuations]
    return torch.stack([of_tokens.sum() for of_tokens in logprobs[rows.places].split(lengths)])


def _forward(
    model: torch.nn.Module, groups: Sequence[Group], keywords: Callable[[SharedRows], dict[str, Any]]
) -> tuple[SharedRows, Any]:
    """Return the layout and what a model, bare or wrapped, says where it predicts a token, [1, M, ...]."""
    bare = bare_model(model)
    rows = SharedRows.of(groups, bare)
    with predicting_at(bare, rows.row, rows.column):
        return rows, model(**rows.inputs(bare), **keywords(rows))


def bare_model(model: torch.nn.Module) -> PreTrainedModel:
    """Return the model without what wraps it: data parallelism, ZeRO, PEFT."""
    from accelerate.utils import extract_model_from_parallel

    bare = extract_model_from_parallel(model)
    return bare.get_base_model() if isinstance(bare, PeftModel) else bare


@contextmanager
def predicting_at(model: PreTrainedModel, row: Tensor, column: Tensor) -> Iterator[None]:
    """Hand a model's head only what predicts a token, so that its layers give [1, M, hidden size].

    Args:
        row, column: int64 [M], where.
    """

    def keep_what_predicts(module: torch.nn.Module, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[row, column][None]  # [1, M, hidden size]
        return output

    with model.base_model.register_forward_hook(keep_what_predicts):
        yield


def segment_inputs(model: PreTrainedModel, segments: Segments, length: int) -> dict[str, Any]:
    """Return what tells a model's layers to attend in segments: these, and a mask that no layer reads.

    Without a mask, transformers would build one from the positions; and TRL counts its ones as the row's tokens.
    """
    unread = unread_mask(length, segments.queries.device)
    kinds = layer_windows(model.config.get_text_config())
    return {**segments.keywords(), "attention_mask": unread if "" in kinds else _Masks.fromkeys(kinds, unread)}


def attention_masks(model: PreTrainedModel, ends: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
    """Return one mask, [G, 1, L, L], or one per kind of layer if the model's configuration has kinds.

    A token sees those before it whose branches have not ended, and whose positions are in the layer's sliding window.

    Args:
        ends, positions: int64 [G, L], see `SharedRows`.

    Raises:
        ValueError: if the model's attention takes no masks.
    """
    if (found := model.config._attn_implementation) not in TAKES_MASKS:
        raise ValueError(f"attention {found!r} takes no mask of its own; use {' or '.join(TAKES_MASKS)}")
    windows = layer_windows(model.config.get_text_config())
    masks = {
        kind: as_attention_mask(model, _seen(ends, positions, window)[:, None]) for kind, window in windows.items()
    }
    return masks[""] if "" in masks else _Masks(masks)


def masks_after(model: PreTrainedModel, rows: SharedRows, held: Mapping[str, int]) -> Any:
    """Return masks as `attention_masks` does, for one row that follows tokens whose keys are in a cache.

    Args:
        rows: the row's layout, whose positions count from the first token after those.
        held: kind of layer -> how many of these, the last ones, its cache holds.
    """
    device, masks = rows.ends.device, dict[str, Tensor]()
    windows = layer_windows(model.config.get_text_config())
    for kind, window in ((kind, windows[kind]) for kind in held):
        own = _seen(rows.ends, rows.position_ids, window)  # [1, L, L]
        age = rows.position_ids[..., None] + torch.arange(held[kind], 0, -1, device=device)  # [1, L, held]
        past = torch.ones_like(age, dtype=torch.bool) if window is None else age < window
        masks[kind] = as_attention_mask(model, torch.cat([past, own], dim=-1)[:, None])  # [1, 1, L, held + L]
    return masks.get("", masks)


def _seen(ends: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """Return whether a query sees a key, bool [G, queries, keys], in layers with this window."""
    order = torch.arange(ends.shape[1], device=ends.device)  # [L]
    seen = (order <= order[:, None]) & (order[:, None] < ends[:, None])  # [G, L, L]
    return seen if window is None else seen & (positions[:, :, None] - positions[:, None] < window)


class _Masks(dict):
    """Kind of layer -> mask."""

    def sum(self) -> Tensor:  # TRL's log takes the number of tokens from the sum of a plain attention mask
        return torch.tensor(next(iter(self.values())).shape[-1])


def as_attention_mask(model: PreTrainedModel, sees: Tensor) -> Tensor:
    """Return a mask [G, 1, queries, keys], true if a query sees a key, as attention in `TAKES_MASKS` takes it."""
    if model.config._attn_implementation != "eager":
        return sees
    bias = torch.zeros(sees.shape, dtype=model.dtype, device=sees.device)  # [G, 1, queries, keys]
    return bias.masked_fill(~sees, torch.finfo(model.dtype).min)
