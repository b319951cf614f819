"""Ranks of the targets from scores of the catalogue. Ties count against the target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from twice_rec.catalog import ItemCatalog
from twice_rec.cf.baselines import BASELINES, CFScorer, TrainingData
from twice_rec.cf.confidence import Histories
from twice_rec.errors import InputError
from twice_rec.metrics import per_user, ranks_from_scores
from twice_rec.progress import progress
from twice_rec.records import CandidateLists, Prediction, Split, UserSequence

CHOSEN_ON = "full/ndcg@10"  # validation metric by which epochs and the settings of baselines are chosen


class Data(Protocol):
    """What CF models need of the prepared data; `data.dataset.PreparedData` has it."""

    catalog: ItemCatalog
    sequences: Sequence[UserSequence]

    def candidates(self, split: Split) -> Sequence[CandidateLists]: ...  # noqa: D102
    def training_histories(self) -> Histories: ...  # noqa: D102


class CFQuestions:
    """The questions of one split as a CF model sees them: histories, targets and candidates as indices.

    Args:
        split: `valid` or `test`.
        lists: names of `RANKED_LISTS`; `full` is the catalogue without the seen items.

    Raises:
        InputError: if no user has a target in the split, or if a list is not stored.
    """

    def __init__(self, data: Data, split: Split, lists: Sequence[str]):
        catalog, by_user = data.catalog, {entry.user_id: entry for entry in data.candidates(split)}
        rows = [(i, s) for i, s in enumerate(data.sequences) if s.target_position(split) is not None]
        if not rows:
            raise InputError(f"no user has a {split} target")
        self.users = np.array([position for position, _ in rows])  # [U], positions in the files
        self.user_ids = [sequence.user_id for _, sequence in rows]
        self.target_ids = [sequence.target(split).item_id for _, sequence in rows]
        self.targets = np.array(catalog.indices(self.target_ids))  # [U]
        self.histories = [catalog.indices(entry.item_id for entry in s.history(split)) for _, s in rows]
        self.lists = tuple(lists)
        self.candidates: dict[str, NDArray[np.int64]] = {
            kind: np.array([catalog.indices(_list_of(by_user, user_id, kind)) for user_id in self.user_ids])  # [U, C]
            for kind in self.lists
            if kind != "full"
        }

    def ranks(self, scorer: CFScorer, batch_size: int = 512) -> dict[str, NDArray[np.int64]]:
        """Return the rank of every user's target per list: int64 [U]. Ties count against the target."""
        parts: dict[str, list[NDArray[np.int64]]] = {kind: [] for kind in self.lists}
        for start in progress(range(0, len(self.users), batch_size), desc="ranking", unit="batch"):
            rows = slice(start, start + batch_size)
            scores = np.asarray(scorer.scores(self.users[rows], self.histories[rows]))  # [B, N]
            targets = self.targets[rows]  # [B]
            for kind in self.lists:
                if kind == "full":
                    ranked, column = np.array(scores, dtype=np.float32), targets - 1  # [B, N], [B]
                    for row, history in enumerate(self.histories[rows]):
                        ranked[row, np.array(history) - 1] = -np.inf  # seen items are not recommended again
                else:
                    shown = self.candidates[kind][rows]  # [B, C]
                    ranked = np.take_along_axis(scores, shown - 1, axis=1)  # [B, C]
                    column = (shown == targets[:, None]).argmax(axis=1)  # [B]
                parts[kind].append(ranks_from_scores(ranked, column))
        return {kind: np.concatenate(ranks) for kind, ranks in parts.items()}

    def mean(self, scorer: CFScorer, metric: str = CHOSEN_ON) -> float:
        """Return one metric such as `full/ndcg@10`, averaged over users."""
        kind, _, name = metric.partition("/")
        return float(per_user(name, self.ranks(scorer)[kind]).mean())

    def predictions(self, scorer: CFScorer, seed: int) -> Iterator[Prediction]:
        """Yield the ranks as records, in the files' order of users."""
        ranks = self.ranks(scorer)
        for row, (user_id, target) in enumerate(zip(self.user_ids, self.target_ids, strict=True)):
            yield Prediction(user_id, target, {kind: int(ranks[kind][row]) for kind in self.lists}, seed)


def fit_baseline(name: str, data: Data, seed: int) -> CFScorer:
    """Fit one of `BASELINES` on the training parts, with its settings chosen on validation."""
    valid = CFQuestions(data, "valid", ["full"])
    return BASELINES[name](TrainingData(data.training_histories(), len(data.catalog), seed, valid.mean))


def _list_of(by_user: Mapping[str, CandidateLists], user_id: str, kind: str) -> tuple[str, ...]:
    if user_id not in by_user:
        raise InputError(f"user {user_id} has no stored candidates; run prepare.sh again")
    if kind not in by_user[user_id].lists:
        raise InputError(
            f"the stored candidates have the lists {', '.join(by_user[user_id].lists)}, not {kind}; add it to "
            "candidate_lists in prepare.yaml and run prepare.sh again, or leave it out of lists"
        )
    return by_user[user_id].lists[kind]
