"""Training rows as token ids with labels, and how long they are."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from twice_rec.errors import InputError
from twice_rec.llm.tokens import encode_chat, encode_text, end_of_turn_ids
from twice_rec.random_streams import random_stream
from twice_rec.sft.dataset import Row

EncodedRow = dict[str, NDArray[np.int32]]
IGNORED = -100  # the label of a token without loss
_QUANTILES = {"50 %": 50, "90 %": 90, "99 %": 99, "max": 100}
LENGTH_HEADER = ["task", "rows", *(f"{part} {name}" for part in ("prompt", "completion") for name in _QUANTILES)]


def encode_rows(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row], max_length: int | None) -> list[EncodedRow]:
    """Return `input_ids` and `labels`, int32 [L], of every row: prompt, completion, end of the turn.

    The prompt is encoded as generation sees it. Labels are the ids of completion and end of turn, so only these have
    loss. The chat template does not write the completion, since templates change it: Qwen3's moves think elements.

    Raises:
        InputError: if a row is longer than `max_length`; nothing is cut.
    """
    end = end_of_turn_ids(tokenizer)
    encoded = []
    for row in rows:
        prompt, completion = encode_chat(tokenizer, row.prompt), [*encode_text(tokenizer, row.completion), *end]
        length = len(prompt) + len(completion)
        if max_length is not None and length > max_length:
            raise InputError(
                f"a row of task {row.task} has {len(prompt)} tokens of prompt and {len(completion)} of completion, "
                f"{length} in all, but max_length is {max_length}; raise it, or lower max_prompt_tokens"
            )
        values = {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}
        encoded.append({name: np.array(column, dtype=np.int32) for name, column in values.items()})
    return encoded


Pack = dict[str, list[Any]]  # input_ids and labels of groups of rows, and lengths, a list of lengths for each group


def share_prefixes(rows: Sequence[Row], encoded: Sequence[EncodedRow]) -> list[Pack]:
    """Group the rows of each user, and keep once what their prompts have in common; a row without a user stays alone.

    Returns:
        Packs of one group each, in the order of their first rows. A group is [common, rest of row 1, rest of row 2,
        ...]; `lengths` are those of the parts. The rest of a row begins at least one token before its completion, since
        that token predicts the completion's first one.
    """
    by_user: dict[str, list[EncodedRow]] = {}
    for position, (row, entry) in enumerate(zip(rows, encoded, strict=True)):
        by_user.setdefault(row.user_id or f"row {position}", []).append(entry)
    groups = []
    for entries in by_user.values():
        shortest = min(int((entry["labels"] == IGNORED).sum()) for entry in entries) - 1
        first = entries[0]["input_ids"][:shortest]
        alike = np.logical_and.reduce([entry["input_ids"][:shortest] == first for entry in entries])  # [shortest]
        common = shortest if alike.all() else int(alike.argmin())
        parts = [(entries[0], slice(common)), *((entry, slice(common, None)) for entry in entries)]
        group = {n: np.concatenate([e[n][part] for e, part in parts]).tolist() for n in ("input_ids", "labels")}
        groups.append({**group, "lengths": [[len(entry["labels"][part]) for entry, part in parts]]})
    return groups


def alone(encoded: Sequence[EncodedRow]) -> list[Pack]:
    """Return a pack for each row."""
    return [{**{n: values.tolist() for n, values in row.items()}, "lengths": [[len(row["labels"])]]} for row in encoded]


def pack(groups: Sequence[Pack], max_tokens: int, seed: int) -> list[Pack]:
    """Put groups together into packs of at most `max_tokens`; a longer group stays alone.

    Groups come in a random order, and each goes into the fullest of the open packs that has room for it.
    """
    packs: list[Pack] = []
    room: list[tuple[int, int]] = []  # of the open packs: tokens left, index; the least room first
    for position in random_stream(seed, "packs of stage 2").permutation(len(groups)):
        group = groups[position]
        length = len(group["labels"])
        place = bisect_left(room, (length, 0))
        left, index = room.pop(place) if place < len(room) else (max_tokens, len(packs))
        if index == len(packs):
            packs.append({name: [] for name in group})
        for name, values in group.items():
            packs[index][name] += values
        if left > length:
            insort(room, (left - length, index))
    return packs


def length_table(rows: Sequence[Row], encoded: Sequence[EncodedRow]) -> list[list[str]]:
    """Return the tokens of prompts and completions per task: number of rows, then the quantiles of `LENGTH_HEADER`."""
    table = []
    for task in dict.fromkeys(row.task for row in rows):
        of_task = [e["labels"] for row, e in zip(rows, encoded, strict=True) if row.task == task]
        prompts = np.array([int((labels == IGNORED).sum()) for labels in of_task])
        completions = np.array([len(labels) for labels in of_task]) - prompts
        quantiles = [q for tokens in (prompts, completions) for q in np.percentile(tokens, list(_QUANTILES.values()))]
        table.append([task, f"{len(of_task):,}", *(f"{q:,.0f}" for q in quantiles)])
    return table
