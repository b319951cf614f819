"""The training rows of stage 2: three tasks, each row a prompt and its completion.

Task 1: title -> id, description, details, for items. Task 2: history and candidates -> item, for training examples.
Task 3: the same -> rationale and item, for training examples with an accepted rationale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from twice_rec import prompts
from twice_rec.errors import InputError
from twice_rec.llm.prompt_builder import PromptBuilder
from twice_rec.prompts import Message
from twice_rec.random_streams import random_stream
from twice_rec.recipe import Settings, key, rule
from twice_rec.records import Example, Item, Rationale

T = TypeVar("T")
TASKS = ("item_info", "direct", "rationale")  # tasks 1, 2, 3, in the order of a curriculum


class TaskMixConfig(Settings):
    """How much of each task is trained on."""

    item_info_rows: int | None = key(None, "rows of task 1 (title -> item); null for all, 0 for none", ge=0)
    direct_rows: int | None = key(None, "rows of task 2 (history, candidates -> item); null for all, 0 for none", ge=0)
    rationale_rows: int | None = key(None, "rows of task 3 (-> rationale and item); null for all, 0 for none", ge=0)
    item_info_weight: float = key(1.0, "how often each row of task 1 occurs in an epoch; fractions are drawn", ge=0)
    direct_weight: float = key(1.0, "how often each row of task 2 occurs in an epoch; fractions are drawn", ge=0)
    rationale_weight: float = key(1.0, "how often each row of task 3 occurs in an epoch; fractions are drawn", ge=0)
    curriculum: bool = key(False, "train on the tasks one after another, 1, 2, 3, instead of mixed")

    def rows_of(self, task: str) -> int | None:
        """Return how many rows of a task are drawn; None for all."""
        return getattr(self, f"{task}_rows")

    def weight_of(self, task: str) -> float:
        """Return how often each of them occurs in an epoch."""
        return getattr(self, f"{task}_weight")

    @rule
    def something_is_left(self) -> str | None:
        if any(self.rows_of(task) != 0 and self.weight_of(task) for task in TASKS):
            return None
        return "every task has 0 rows (item_info_rows, ...) or weight 0 (item_info_weight, ...); nothing is left"


@dataclass(frozen=True, slots=True)
class Row:
    """One training row; `task` is one of `TASKS`, and tasks 2 and 3 are about a user."""

    task: str
    prompt: list[Message]
    completion: str
    user_id: str = ""


def training_rows(
    builder: PromptBuilder,
    examples: Sequence[Example],
    rationales: Iterable[Rationale],
    config: TaskMixConfig,
    seed: int,
) -> list[Row]:
    """Draw each task's rows and mix them; the same seed gives the same rows in the same order.

    If fewer rows of task 2 are drawn than there are, users with a row of task 3 come first: their prompts have the
    history and the candidates in common (`share_prefixes`).

    Raises:
        InputError: if a rationale's user or target is not among the examples, or if a task has no rows.
    """
    rng = random_stream(seed, "rows of stage 2")

    def draw(task: str, population: Sequence[T], first: Callable[[T], bool] = lambda _: True) -> list[T]:
        """Draw without replacement, those that are `first` before all others, and repeat by weight."""
        shuffled = [population[i] for i in rng.permutation(len(population))]
        chosen = sorted(shuffled, key=lambda entry: not first(entry))[: config.rows_of(task)]  # sorting is stable
        whole, rest = divmod(config.weight_of(task), 1)
        return chosen * int(whole) + chosen[: round(rest * len(chosen))]

    explained = draw("rationale", list(rationales))
    users = {rationale.user_id for rationale in explained}
    rows = {
        "item_info": [_item_info(builder, item) for item in draw("item_info", list(builder.catalog))],
        "direct": [_direct(builder, e) for e in draw("direct", examples, lambda example: example.user_id in users)],
    }
    by_user = {example.user_id: example for example in examples}
    rows["rationale"] = [_rationale(builder, rationale, by_user) for rationale in explained]
    for task in TASKS:
        if not rows[task] and config.rows_of(task) != 0 and config.weight_of(task):
            raise InputError(f"task {task} has no rows; set {task}_rows to 0 to train without it")
    in_order = [rows[task][i] for task in TASKS for i in rng.permutation(len(rows[task]))]
    return in_order if config.curriculum else [in_order[i] for i in rng.permutation(len(in_order))]


def _item_info(builder: PromptBuilder, item: Item) -> Row:
    return Row("item_info", prompts.item_info(item), prompts.item_info_answer(item, builder.shown))


def _direct(builder: PromptBuilder, example: Example) -> Row:
    completion = prompts.item_answer(builder.catalog[example.target])
    return Row("direct", builder.recommend(example, with_rationale=False), completion, example.user_id)


def _rationale(builder: PromptBuilder, rationale: Rationale, by_user: Mapping[str, Example]) -> Row:
    example = by_user.get(rationale.user_id)
    if example is None or example.target != rationale.target:
        raise InputError(
            f"the rationale of user {rationale.user_id} is about item {rationale.target}, but this user's training "
            f"target is {example.target if example else 'not among the examples'}; the rationales belong to other "
            "data: run rationales.sh again"
        )
    completion = prompts.rationale_answer(rationale.text, builder.catalog[example.target], builder.item_first)
    return Row("rationale", builder.recommend(example, with_rationale=True), completion, example.user_id)
