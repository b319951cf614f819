"""The training rows of stage 2: three tasks, as prompt and answer.

Task 1: title -> id, description, details, for items. Task 2: history + candidates -> item, for training examples.
Task 3: the same -> rationale and item, for training examples with an accepted rationale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from twice_rec import prompts
from twice_rec.errors import InputError
from twice_rec.llm.prompt_builder import PromptWriter
from twice_rec.prompts import Message
from twice_rec.records import Example, Rationale

T = TypeVar("T")
Task = Literal["item_info", "direct", "rationale"]


@dataclass(frozen=True, slots=True)
class Row:
    """One training row; tasks 2 and 3 are about a user."""

    task: Task
    prompt: list[Message]
    answer: str
    user_id: str = ""


@dataclass(frozen=True, slots=True)
class Share:
    """How much of a task is trained on.

    Args:
        rows: draw this many of its rows; None for all, 0 for none.
        weight: how often each of them stands in an epoch; a fraction is drawn.
    """

    rows: int | None
    weight: float = 1.0


def training_rows(
    writer: PromptWriter,
    examples: Sequence[Example],
    rationales: Iterable[Rationale],
    shares: Mapping[Task, Share],
    curriculum: bool,
    seed: int,
) -> list[Row]:
    """Draw each task's rows and mix them; the same seed gives the same rows in the same order.

    Where fewer rows of task 2 are drawn than there are, users with a row of task 3 come first: their prompts have the
    lists in common (`share_prefixes`).

    Args:
        curriculum: keep the tasks apart, in the order of `Task`, each mixed in itself.

    Raises:
        InputError: for a rationale whose user or target is not among the examples, and for a task without rows.
    """
    rng = np.random.default_rng(seed)
    by_user = {example.user_id: example for example in examples}
    catalog, shown = writer.catalog, writer.shown
    argued = _draw(rng, list(rationales), shares["rationale"])
    of_argued = {rationale.user_id for rationale in argued}
    rows: dict[Task, list[Row]] = {
        "item_info": [
            Row("item_info", prompts.item_info(item), prompts.item_info_answer(item, shown))
            for item in _draw(rng, list(catalog), shares["item_info"])
        ],
        "direct": [
            Row("direct", writer.recommend(e, with_rationale=False), prompts.item_answer(catalog[e.target]), e.user_id)
            for e in _draw(rng, examples, shares["direct"], lambda example: example.user_id in of_argued)
        ],
        "rationale": [],
    }
    for rationale in argued:
        example = _example_of(rationale, by_user)
        answer = prompts.rationale_answer(rationale.text, catalog[example.target], writer.item_first)
        prompt = writer.recommend(example, with_rationale=True)
        rows["rationale"].append(Row("rationale", prompt, answer, example.user_id))
    for task, share in shares.items():
        if not rows[task] and share.rows != 0 and share.weight:
            raise InputError(f"task {task} has no rows; set {task}_rows to 0 to train without it")
    mixed = [[of_task[i] for i in rng.permutation(len(of_task))] for of_task in rows.values()]
    together = [row for of_task in mixed for row in of_task]
    return together if curriculum else [together[position] for position in rng.permutation(len(together))]


def _example_of(rationale: Rationale, by_user: Mapping[str, Example]) -> Example:
    example = by_user.get(rationale.user_id)
    if example is None or example.target != rationale.target:
        raise InputError(
            f"the rationale of user {rationale.user_id} is about item {rationale.target}, but this user's training "
            f"target is {example.target if example else 'not among the examples'}; the rationales belong to other "
            "data: run rationales.sh again"
        )
    return example


def _draw(
    rng: np.random.Generator, population: Sequence[T], share: Share, first: Callable[[T], bool] = lambda _: True
) -> list[T]:
    """The share's rows without replacement, those that are `first` before all others, repeated by its weight."""
    shuffled = [population[position] for position in rng.permutation(len(population))]
    chosen = sorted(shuffled, key=lambda entry: not first(entry))[: share.rows]  # sorting is stable
    whole, rest = divmod(share.weight, 1)
    return chosen * int(whole) + chosen[: round(rest * len(chosen))]
