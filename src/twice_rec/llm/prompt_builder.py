"""Prompts within a limit of tokens. The same writer with the same limit serves stages 2, 3 and 4."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from twice_rec.catalog import ItemCatalog
from twice_rec.errors import InputError
from twice_rec.prompts import Message, PromptFormat, recommend
from twice_rec.records import Example

TokenCounter = Callable[[Sequence[Message]], int]


class PromptWriter:
    """Writes the prompts of tasks 2 and 3; those over the limit lose the oldest purchases, then text of descriptions.

    Instructions and candidates always stand whole, and the most recent purchase stays.

    Args:
        shown: how much a prompt shows where the limit allows it.
        limit: of a prompt's tokens, the chat template's included; None for none.
        count_tokens: a prompt's tokens; not called without a limit.
        item_first: ask for the item before the rationale.
    """

    def __init__(
        self,
        catalog: ItemCatalog,
        shown: PromptFormat,
        limit: int | None,
        count_tokens: TokenCounter,
        item_first: bool = False,
    ):
        self.catalog = catalog
        self.shown = shown
        self.item_first = item_first
        self.fitted = Counter[str]()  # `whole`, `purchases dropped`, `descriptions cut` -> prompts
        self._limit = limit
        self._count = count_tokens

    def recommend(self, example: Example, with_rationale: bool) -> list[Message]:
        """The prompt for one user.

        Raises:
            InputError: where it is too long even with one purchase and no descriptions.
        """

        def write(shown: PromptFormat) -> list[Message]:
            return recommend(example, self.catalog, shown, with_rationale, self.item_first)

        whole = write(self.shown)
        if self._limit is None or self._count(whole) <= self._limit:
            self.fitted["whole"] += 1
            return whole
        longest = min(len(example.history), self.shown.prompt_history_items or len(example.history))
        kept, too_many = 0, longest  # the most purchases that fit, by halving
        while too_many - kept > 1:
            middle = (kept + too_many) // 2
            if self._count(write(self.shown.model_copy(update={"prompt_history_items": middle}))) <= self._limit:
                kept = middle
            else:
                too_many = middle
        if kept:
            self.fitted["purchases dropped"] += 1
            return write(self.shown.model_copy(update={"prompt_history_items": kept}))
        self.fitted["descriptions cut"] += 1
        return self._with_less_text(example, write)

    def _with_less_text(self, example: Example, write: Callable[[PromptFormat], list[Message]]) -> list[Message]:
        """One purchase, and descriptions and details cut to half their length until the prompt fits."""
        items = [self.catalog[item_id] for item_id in (*example.candidates, example.history[-1].item_id)]
        chars = max(len(text) for item in items for text in (item.description, item.details))
        shortest = self.shown.model_copy(update={"prompt_history_items": 1})
        while True:
            prompt = write(shortest)
            tokens = self._count(prompt)
            if self._limit is None or tokens <= self._limit:
                return prompt
            if chars == 0:
                raise InputError(
                    f"the prompt of user {example.user_id} has {tokens} tokens with one purchase and no descriptions; "
                    f"max_prompt_tokens is {self._limit}: raise it, or show fewer candidates (num_candidates) or "
                    "fields (prompt_candidate_fields) in prepare.yaml"
                )
            chars //= 2
            shortest = shortest.model_copy(
                update={
                    "prompt_description_chars": min(chars, shortest.prompt_description_chars or chars),
                    "prompt_details_chars": min(chars, shortest.prompt_details_chars or chars),
                }
            )
