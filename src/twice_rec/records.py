"""The frozen records that travel between the parts of the project.

A record that is stored as a line of JSON has the same field names there. `files.read_records` and
`files.write_records` convert it; nothing else builds records from dictionaries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

# What an annotator says of its own rationale: does the history lead to the target?
Verdict = Literal["relevant", "weak", "irrelevant"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

# What a judge of rationales is shown; `evaluation.judge` says more.
Condition = Literal["item_shown", "item_hidden", "counterfactual"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)

# Lists in which a target is ranked, in the order of tables -> what the report says of them.
RANKED_LISTS: Mapping[str, str] = {
    "uniform": "The target among uniformly drawn items.",
    "popularity": "The target among items drawn in proportion to their training popularity.",
    "hard": "The target among items that item-kNN scores highest for the user.",
    "full": "The target among the whole catalogue without the user's earlier items.",
}


@dataclass(frozen=True, slots=True)
class Item:
    """One product, as text."""

    item_id: str  # what prompts show and completions name (`parent_asin` on Amazon)
    title: str  # the name shown to users; titles need not be unique
    description: str = ""
    details: str = ""  # attributes as JSON members without the outer braces, `"Brand": "Yogi", "Size": "16 oz"`
    brand: str = ""  # the store or brand
    categories: tuple[str, ...] = ()  # from the widest to the narrowest
    price: str = ""  # as written in the source, because its type varies there


@dataclass(frozen=True, slots=True)
class Interaction:
    """One user-item event: `timestamp` in milliseconds (0 if unknown), `rating` 1 to 5 (None if unknown)."""

    item_id: str
    timestamp: int = 0
    rating: float | None = None
    review_title: str = ""
    review_text: str = ""


@dataclass(frozen=True, slots=True)
class UserSequence:
    """A user's interactions in time order, and where the splits fall in them.

    Leave-one-out gives `num_train == valid == n - 2` and `test == n - 1`.
    """

    user_id: str
    interactions: tuple[Interaction, ...]
    num_train: int  # `interactions[:num_train]` may be trained on
    valid: int | None  # position of the validation target, None if the user has none
    test: int | None

    def target_position(self, split: Split) -> int | None:
        """Return the position of the split's target, None if there is none.

        The training target is the last training interaction, if it has a history.
        """
        if split == "train":
            return self.num_train - 1 if self.num_train >= 2 else None
        return self.valid if split == "valid" else self.test

    def history(self, split: Split) -> tuple[Interaction, ...]:
        """Return everything before the split's target; ValueError if the user has no target in it."""
        return self.interactions[: self._require(split)]

    def target(self, split: Split) -> Interaction:
        """Return the interaction to predict; ValueError if the user has none in this split."""
        return self.interactions[self._require(split)]

    def _require(self, split: Split) -> int:
        position = self.target_position(split)
        if position is None:
            raise ValueError(f"user {self.user_id} has no {split} target")
        return position


@dataclass(frozen=True, slots=True)
class CandidateLists:
    """The stored candidate lists of one user in one split: list kind -> item ids, the target among them."""

    user_id: str
    target: str
    lists: dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Example:
    """One question to a recommender: which of `candidates` follows `history`? It is `target`."""

    user_id: str
    history: tuple[Interaction, ...]
    candidates: tuple[str, ...]
    target: str


@dataclass(frozen=True, slots=True)
class Rationale:
    """A post-hoc rationale for one user's training target (stage 1), with the annotator's own verdict."""

    user_id: str
    target: str
    text: str
    verdict: Verdict
    evidence: tuple[int, ...]  # positions in the history, from 0
    confidence: float  # the annotator's in its verdict, 0 to 1
    annotator: str


@dataclass(frozen=True, slots=True)
class TrueReasons:
    """What the synthetic domain knows of one user's test interaction, of what texts show.

    A true reason for an item is an attribute of it that is among `likes`, or its category if that is in `calls_for`.
    """

    user_id: str
    likes: tuple[str, ...]  # diets and brands
    dislikes: tuple[str, ...]
    calls_for: tuple[str, ...]  # categories that complete the last interaction's


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one model did with one user: the target's rank per kind of list, and what an LLM wrote."""

    user_id: str
    target: str
    ranks: dict[str, int]  # list kind (`uniform`, `popularity`, `hard`, `full`) -> rank of the target, 1 is best
    seed: int = 0  # of the model's training run; one file may hold several runs
    ranking: tuple[str, ...] = ()  # the candidates from best to worst (LLMs only)
    answers: tuple[str, ...] = ()  # the completions (LLMs only)
    first: dict[str, str] = field(default_factory=dict)  # list kind -> the item at place 1; of equals the first listed
    choices: tuple[str, ...] = ()  # LLMs: the first item in each order of the candidates; "" if none was named
    places: tuple[int, ...] = ()  # LLMs: where these were listed, from 0; -1 for none
