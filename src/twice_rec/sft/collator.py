"""Batches of stage 2 without padding: rows of a user that share their prompt, and packs of rows (see `encoding`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from transformers import PreTrainedModel

from twice_rec.llm.recipe import VARLEN
from twice_rec.llm.shared_prefix import attention_masks, segment_inputs
from twice_rec.llm.varlen import Segments


class PackedCollator:
    """Puts packs of groups of rows that share a beginning into one row; the loss is that of the rows one by one.

    The model's attention must be varlen, or one of `llm.recipe.TAKES_MASKS`.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model

    def __call__(self, packs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return a batch of packs as `input_ids`, `labels`, `position_ids`, int64 [1, L], and how a layer attends.

        Args:
            packs: `input_ids` and `labels` of several groups, and `lengths`, a list for each group: its beginning, and
                the rest of each of its rows.
        """
        columns: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        ends, parts = list[int](), list[tuple[range, int]]()
        for pack in packs:
            columns["input_ids"] += pack["input_ids"]
            columns["labels"] += pack["labels"]
            for common, *lengths in pack["lengths"]:
                start, *behind = accumulate((common, *lengths), initial=len(ends))  # the column after each part
                columns["position_ids"] += [*range(common), *(p for n in lengths for p in range(common, common + n))]
                ends += [behind[-1]] * common  # all parts of the group see the beginning
                ends += [end for n, end in zip(lengths, behind[1:], strict=True) for _ in range(n)]
                parts += [(range(0), common), *((range(start, start + common), n) for n in lengths)]
        batch: dict[str, Any] = {name: torch.tensor([values]) for name, values in columns.items()}  # [1, L] each
        if self._model.config._attn_implementation == VARLEN:
            return batch | segment_inputs(self._model, Segments.of(parts), len(ends))
        return batch | {"attention_mask": attention_masks(self._model, torch.tensor([ends]), batch["position_ids"])}
