"""The frozen records that travel between the parts of the project.

Every record that is stored as a line of JSON has the same field names there. `artifacts.read_records` and
`artifacts.write_records` do the conversion; nothing else builds records from dictionaries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


@dataclass(frozen=True, slots=True)
class Item:
    """One product, as text.

    Args:
        item_id: the id that prompts show and answers name (`parent_asin` on Amazon).
        title: the name shown to users; titles need not be unique.
        description: free text, possibly empty.
        details: attributes as JSON members without the outer braces, `"Brand": "Yogi", "Size": "16 oz"`.
        brand: the store or brand, possibly empty.
        categories: from the widest to the narrowest.
        price: as written in the source, since its type varies there.
    """

    item_id: str
    title: str
    description: str = ""
    details: str = ""
    brand: str = ""
    categories: tuple[str, ...] = ()
    price: str = ""


@dataclass(frozen=True, slots=True)
class Interaction:
    """One purchase: `timestamp` in milliseconds (0 where the source has none), `rating` 1 to 5 or None."""

    item_id: str
    timestamp: int = 0
    rating: float | None = None
    review_title: str = ""
    review_text: str = ""


@dataclass(frozen=True, slots=True)
class UserSequence:
    """A user's interactions in time order, and where the splits fall in them.

    `interactions[:num_train]` may be trained on. `valid` and `test` are the positions of the two targets, None
    where the user has none. Leave-one-out gives `num_train == valid == n - 2` and `test == n - 1`.
    """

    user_id: str
    interactions: tuple[Interaction, ...]
    num_train: int
    valid: int | None
    test: int | None

    def target_position(self, split: Split) -> int | None:
        """Position of the split's target. The training target is the last training interaction, if it has a history."""
        if split == "train":
            return self.num_train - 1 if self.num_train >= 2 else None
        return self.valid if split == "valid" else self.test

    def history(self, split: Split) -> tuple[Interaction, ...]:
        """Everything before the split's target; raises ValueError where the user has no target in it."""
        return self.interactions[: self._require(split)]

    def target(self, split: Split) -> Interaction:
        """The interaction to predict; raises ValueError where the user has none in this split."""
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
    """One question to a recommender: which of `candidates` follows `history`? The answer is `target`."""

    user_id: str
    history: tuple[Interaction, ...]
    candidates: tuple[str, ...]
    target: str


@dataclass(frozen=True, slots=True)
class Rationale:
    """A post-hoc rationale for one user's training target, and the annotator's own verdict on it (stage 1)."""

    user_id: str
    target: str
    text: str
    verdict: Literal["relevant", "weak", "irrelevant"]
    evidence: tuple[int, ...]
    confidence: float
    annotator: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one model did with one user: the target's rank per kind of list, and for an LLM what it said.

    Args:
        ranks: list kind (`uniform`, `popularity`, `hard`, `full`) -> rank of the target, 1 is best.
        seed: of the model's training run, so that several runs can stand in one file.
        ranking: the candidates from best to worst (LLMs only).
        answers: the generated texts (LLMs only).
    """

    user_id: str
    target: str
    ranks: dict[str, int]
    seed: int = 0
    ranking: tuple[str, ...] = ()
    answers: tuple[str, ...] = field(default=())


RANKED_LISTS = ("uniform", "popularity", "hard", "full")  # stand-in until the cf and data rooms are merged
