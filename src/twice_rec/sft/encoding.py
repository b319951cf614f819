"""Training rows as token ids with labels, and how long they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from twice_rec.errors import InputError
from twice_rec.llm.models import encode_chat, encode_text, end_of_turn_ids
from twice_rec.prompts import Message

EncodedRow = dict[str, NDArray[np.int32]]
_QUANTILES = {"50 %": 50, "90 %": 90, "99 %": 99, "max": 100}
IGNORED = -100  # the label of a token without loss


class TrainingRow(Protocol):
    """What a row has; `data.sft.Row` is one. Rows of one user may share a beginning; without a user none does."""

    @property
    def user_id(self) -> str: ...  # noqa: D102
    @property
    def task(self) -> str: ...  # noqa: D102
    @property
    def prompt(self) -> Sequence[Message]: ...  # noqa: D102
    @property
    def answer(self) -> str: ...  # noqa: D102


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[TrainingRow], max_length: int | None
) -> list[EncodedRow]:
    """`input_ids` and `labels` of every row: the prompt as generation sees it, the answer, the end of the turn.

    Labels are the ids of answer and end of turn, so the loss is on the completion only. Written here and not by the
    chat template, since templates rewrite answers: Qwen3's moves what stands in think elements.

    Raises:
        InputError: for a row longer than `max_length`; nothing is cut.
    """
    end = end_of_turn_ids(tokenizer)
    encoded = []
    for row in rows:
        prompt, answer = encode_chat(tokenizer, row.prompt), [*encode_text(tokenizer, row.answer), *end]
        length = len(prompt) + len(answer)
        if max_length is not None and length > max_length:
            raise InputError(
                f"a row of task {row.task} has {len(prompt)} tokens of prompt and {len(answer)} of answer, {length} in "
                f"all, but max_length is {max_length}; raise it, or lower max_prompt_tokens"
            )
        ids, labels = np.array(prompt + answer, dtype=np.int32), np.array([IGNORED] * len(prompt) + answer)
        encoded.append({"input_ids": ids, "labels": labels.astype(np.int32)})
    return encoded


def share_prefixes(rows: Sequence[TrainingRow], encoded: Sequence[EncodedRow]) -> list[dict[str, list[int]]]:
    """Rows of the same user as groups that hold what their prompts have in common only once.

    Returns:
        Groups in the order of their first rows: `input_ids` and `labels` of [common, rest of row 1, rest of row 2, ...]
        and `lengths`, those of the parts. The rest of a row begins before its answer, so that the token which predicts
        the answer's first one stands in it.
    """
    by_user: dict[str, list[EncodedRow]] = {}
    for position, (row, entry) in enumerate(zip(rows, encoded, strict=True)):
        by_user.setdefault(row.user_id or f"row {position}", []).append(entry)
    groups = []
    for entries in by_user.values():
        shortest = min(int((entry["labels"] == IGNORED).sum()) for entry in entries) - 1
        first = entries[0]["input_ids"][:shortest]
        alike = np.logical_and.reduce([entry["input_ids"][:shortest] == first for entry in entries])
        common = shortest if alike.all() else int(alike.argmin())
        groups.append(
            {
                name: [*entries[0][name][:common].tolist(), *(t for e in entries for t in e[name][common:].tolist())]
                for name in ("input_ids", "labels")
            }
            | {"lengths": [common, *(len(entry["labels"]) - common for entry in entries)]}
        )
    return groups


def length_table(rows: Sequence[TrainingRow], encoded: Sequence[EncodedRow]) -> list[list[str]]:
    """Tokens of prompts and answers by task: number of rows, then median, 90 %, 99 %, longest of each."""
    table = []
    for task in dict.fromkeys(row.task for row in rows):
        of_task = [e["labels"] for row, e in zip(rows, encoded, strict=True) if row.task == task]
        prompts = np.array([int((labels == IGNORED).sum()) for labels in of_task])
        answers = np.array([len(labels) for labels in of_task]) - prompts
        cells = [f"{q:,.0f}" for tokens in (prompts, answers) for q in np.percentile(tokens, list(_QUANTILES.values()))]
        table.append([task, f"{len(of_task):,}", *cells])
    return table


LENGTH_HEADER = ["task", "rows", *(f"{part} {name}" for part in ("prompt", "answer") for name in _QUANTILES)]
