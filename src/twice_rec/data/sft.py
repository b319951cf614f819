"""The training rows of stage 2: three tasks, as prompt and completion in conversational form.

Task 1: title -> id, description, details, for items. Task 2: history + candidates -> item, for training examples.
Task 3: the same -> rationale and item, for training examples with an accepted rationale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from twice_rec import prompts
from twice_rec.artifacts import InputError
from twice_rec.catalog import ItemCatalog
from twice_rec.prompts import Message, PromptFormat
from twice_rec.records import Example, Rationale

T = TypeVar("T")
Row = dict[str, Any]  # {"prompt": [Message], "completion": [Message], "task": str}, as TRL takes it


def training_rows(
    catalog: ItemCatalog,
    shown: PromptFormat,
    examples: Sequence[Example],
    rationales: Iterable[Rationale],
    item_info_rows: int | None,
    direct_rows: int | None,
    rationale_rows: int | None,
    seed: int,
) -> list[Row]:
    """Draw each task's rows (None for all) and mix them; the same seed gives the same rows in the same order.

    Raises:
        InputError: for a rationale whose user or target is not among the examples.
    """
    rng = np.random.default_rng(seed)
    by_user = {example.user_id: example for example in examples}
    rows = [
        _row(prompts.item_info(i), prompts.item_info_answer(i, shown), "item_info")
        for i in _draw(rng, list(catalog), item_info_rows)
    ]
    for example in _draw(rng, examples, direct_rows):
        answer = prompts.item_answer(catalog[example.target])
        rows.append(_row(prompts.recommend(example, catalog, shown, with_rationale=False), answer, "direct"))
    for rationale in _draw(rng, list(rationales), rationale_rows):
        example = _example_of(rationale, by_user)
        answer = prompts.rationale_answer(rationale.text, catalog[example.target])
        rows.append(_row(prompts.recommend(example, catalog, shown, with_rationale=True), answer, "rationale"))
    return [rows[position] for position in rng.permutation(len(rows))]


def _example_of(rationale: Rationale, by_user: Mapping[str, Example]) -> Example:
    example = by_user.get(rationale.user_id)
    if example is None or example.target != rationale.target:
        raise InputError(
            f"the rationale of user {rationale.user_id} is about item {rationale.target}, but this user's training "
            f"target is {example.target if example else 'not among the examples'}; the rationales belong to other "
            "data: run rationales.sh again"
        )
    return example


def _draw(rng: np.random.Generator, population: Sequence[T], count: int | None) -> list[T]:
    """`count` of them without replacement, all of them for None or where there are fewer."""
    chosen = rng.permutation(len(population))[:count]
    return [population[position] for position in chosen]


def _row(prompt: list[Message], answer: str, task: str) -> Row:
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}], "task": task}
