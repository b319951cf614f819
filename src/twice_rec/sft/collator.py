"""Batches of stage 2 in which the rows of a user share their prompt (`share_prefixes`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from transformers import PreTrainedModel

from twice_rec.llm.shared_prefix import attention_masks


class SharedPrefixCollator:
    """Puts groups of rows that share a beginning into one row; the loss is that of the rows one by one.

    The model's attention must be one of `llm.recipe.TAKES_MASKS`.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model

    def __call__(self, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return `input_ids`, `labels`, `position_ids`, int64 [1, L], and masks of groups from `share_prefixes`."""
        columns: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        ends = list[int]()
        for group in groups:
            common, *lengths = group["lengths"]
            _, *behind = accumulate(group["lengths"], initial=len(ends))  # the column after each part
            columns["input_ids"] += group["input_ids"]
            columns["labels"] += group["labels"]
            columns["position_ids"] += [*range(common), *(p for n in lengths for p in range(common, common + n))]
            ends += [behind[-1]] * common  # all parts of the group see the beginning
            ends += [end for n, end in zip(lengths, behind[1:], strict=True) for _ in range(n)]
        batch = {name: torch.tensor([values]) for name, values in columns.items()}  # [1, L] each
        masks = attention_masks(self._model, torch.tensor([ends]), batch["position_ids"])  # [1, 1, L, L] each
        return {**batch, "attention_mask": masks}
