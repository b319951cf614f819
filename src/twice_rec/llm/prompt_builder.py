"""Prompts within a limit of tokens. The same builder with the same limit serves stages 2, 3 and 4."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from twice_rec.catalog import ItemCatalog
from twice_rec.errors import InputError
from twice_rec.llm.recipe import PromptConfig
from twice_rec.llm.tokens import encode_chat
from twice_rec.prompts import Hints, Message, PromptFormat, recommend
from twice_rec.records import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Writer = Callable[[PromptFormat], list[Message]]  # of one user's prompt


class PromptBuilder:
    """Builds the prompts of tasks 2 and 3, and truncates those over `max_prompt_tokens`.

    A long prompt loses its oldest interactions first, then text of descriptions and details; the rest always stays.
    `truncated` counts prompts: `whole`, `interactions dropped`, `descriptions cut`.

    Args:
        shown: how much a prompt shows if the limit allows it.
        tokenizer: counts the tokens of a prompt, the chat template's included; not used without a limit.
        hints: what prompts say of a CF model's ranking; always stays.
    """

    def __init__(
        self,
        catalog: ItemCatalog,
        shown: PromptFormat,
        tokenizer: PreTrainedTokenizerBase,
        config: PromptConfig,
        hints: Callable[[Example], Hints] | None = None,
    ):
        self.catalog = catalog
        self.shown = shown
        self.item_first = config.item_first
        self.truncated = Counter[str]()
        self._limit = config.max_prompt_tokens
        self._tokenizer = tokenizer
        self._hints = hints

    def recommend(self, example: Example, with_rationale: bool) -> list[Message]:
        """Build the prompt of one user.

        Raises:
            InputError: if it is too long even with one interaction and no descriptions.
        """
        write = self._writer(example, with_rationale)
        whole = write(self.shown)
        if self._fits(whole):
            self.truncated["whole"] += 1
            return whole
        fewer = range(1, _shown_interactions(example, self.shown))
        kept = bisect_left(  # the most interactions that fit
            fewer, True, key=lambda n: not self._fits(write(_shortened(self.shown, n)))
        )
        if kept:
            self.truncated["interactions dropped"] += 1
            return write(_shortened(self.shown, kept))
        self.truncated["descriptions cut"] += 1
        return self._with_less_text(example, write)

    def _writer(self, example: Example, with_rationale: bool) -> Writer:
        hints = self._hints(example) if self._hints is not None else ()
        return lambda shown: recommend(example, self.catalog, shown, with_rationale, self.item_first, hints)

    def _fits(self, prompt: list[Message]) -> bool:
        return self._limit is None or len(encode_chat(self._tokenizer, prompt)) <= self._limit

    def _with_less_text(self, example: Example, write: Writer) -> list[Message]:
        """Keep one interaction, and halve the limit of descriptions and details until the prompt fits."""
        items = [self.catalog[item_id] for item_id in (*example.candidates, example.history[-1].item_id)]
        chars = max(len(text) for item in items for text in (item.description, item.details))
        prompt = write(_shortened(self.shown, 1))
        while not self._fits(prompt):
            if chars == 0:
                raise InputError(
                    f"the prompt of user {example.user_id} has {len(encode_chat(self._tokenizer, prompt))} tokens with "
                    f"one interaction and no descriptions, but max_prompt_tokens is {self._limit}; raise it, or show "
                    "fewer candidates or fields (num_candidates, prompt_candidate_fields in prepare.yaml) or cf_hints"
                )
            chars //= 2
            prompt = write(_shortened(self.shown, 1, chars))
        return prompt


def _shown_interactions(example: Example, shown: PromptFormat) -> int:
    """Return how many interactions the whole prompt shows."""
    return min(len(example.history), shown.prompt_history_items or len(example.history))


def _shortened(shown: PromptFormat, interactions: int, chars: int | None = None) -> PromptFormat:
    """Return the format with fewer interactions, and with `chars` as another limit of descriptions and details."""
    update = {"prompt_history_items": interactions}
    if chars is not None:
        update["prompt_description_chars"] = min(chars, shown.prompt_description_chars or chars)
        update["prompt_details_chars"] = min(chars, shown.prompt_details_chars or chars)
    return shown.model_copy(update=update)
