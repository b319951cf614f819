"""Which training interactions stage 3 asks about, and how to keep them from the CF model that judges there.

A model that was trained on a prompt's target remembers it: its confidence in the target is then a second match, and
tells stage 3 nothing that the match does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twice_rec.item_sequences import ItemSequences
from twice_rec.random_streams import random_stream


@dataclass(frozen=True)
class HeldOut:
    """Which prompts' targets a CF model was not trained on: a stage 3's with this seed and up to this fraction."""

    fraction: float = 0.0
    seed: int = 0

    def covers(self, prompts: HeldOut) -> bool:
        """Return whether the targets of all prompts of such a stage 3 were kept from the model."""
        return not prompts.fraction or (prompts.seed == self.seed and prompts.fraction <= self.fraction)


NOTHING = HeldOut()


def prompted(num_examples: int, fraction: float, seed: int) -> NDArray[np.int64]:
    """Return the positions of the training examples that stage 3 prompts, in the order of its prompts.

    A smaller fraction of the same seed gives the first of them.
    """
    count = max(1, round(fraction * num_examples))
    return random_stream(seed, "prompts of stage 3").permutation(num_examples)[:count]


def without_prompted(histories: ItemSequences, held_out: HeldOut) -> ItemSequences:
    """Return the training parts, of the prompted users without the prompt's target: their last item, wherever it is.

    The training examples are the users with at least two training interactions, in the order of the files.
    """
    shortened = np.zeros(len(histories), dtype=bool)  # [users]
    if held_out.fraction:
        examples = np.flatnonzero(histories.lengths >= 2)
        shortened[examples[prompted(len(examples), held_out.fraction, held_out.seed)]] = True
    kept = histories.without_last(shortened)
    targets = np.zeros(len(histories), dtype=np.int32)  # [users]
    targets[shortened] = histories.items[histories.ends[shortened] - 1]
    users, items = kept.flat()  # [T], [T]
    others = items != targets[users]  # [T]
    if others.all():
        return kept
    ends = np.bincount(users[others], minlength=len(kept)).cumsum()  # [users]
    return ItemSequences(items[others], np.concatenate([[0], ends[:-1]]), ends)
