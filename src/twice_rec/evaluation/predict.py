"""Ranks of the targets, for every kind of model: from scores, from likelihoods, from sampled answers.

All rankings are deterministic. Ties count against the target where scores are compared (CF models), and are broken by
the candidates' order where a full ranking is needed (LLM votes).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from twice_rec.artifacts import InputError
from twice_rec.catalog import ItemCatalog
from twice_rec.evaluation.baselines import CFScorer
from twice_rec.metrics import per_user, ranks_from_scores
from twice_rec.records import CandidateLists, Prediction, Split, UserSequence


class CFQuestions:
    """The questions of one split as a CF model sees them: histories, targets and candidates as indices.

    Args:
        sequences: all users, in the files' order.
        candidates: the stored lists of the split.
        split: `valid` or `test`.
        lists: kinds to rank: `uniform`, `popularity`, `hard`, and `full` for the catalogue without the seen items.
    """

    def __init__(
        self,
        sequences: Sequence[UserSequence],
        candidates: Sequence[CandidateLists],
        catalog: ItemCatalog,
        split: Split,
        lists: Sequence[str],
    ):
        by_user = {entry.user_id: entry for entry in candidates}
        rows = [(i, s) for i, s in enumerate(sequences) if s.target_position(split) is not None]
        if not rows:
            raise InputError(f"no user has a {split} target")
        self.users = np.array([position for position, _ in rows])
        self.user_ids = [sequence.user_id for _, sequence in rows]
        self.target_ids = [sequence.target(split).item_id for _, sequence in rows]
        self.targets = np.array(catalog.indices(self.target_ids))
        self.histories = [catalog.indices(entry.item_id for entry in s.history(split)) for _, s in rows]
        self.lists = tuple(lists)
        self.candidates: dict[str, NDArray[np.int64]] = {}
        for kind in self.lists:
            if kind != "full":
                self.candidates[kind] = np.array(
                    [catalog.indices(_list_of(by_user, user_id, kind)) for user_id in self.user_ids]
                )

    def __len__(self) -> int:
        return len(self.user_ids)

    def ranks(self, scorer: CFScorer, batch_size: int = 512) -> dict[str, NDArray[np.int64]]:
        """Rank of every user's target per kind of list: int64 [users]. Ties count against the target."""
        parts: dict[str, list[NDArray[np.int64]]] = {kind: [] for kind in self.lists}
        steps = range(0, len(self), batch_size)
        for start in tqdm(steps, desc="ranking", unit="batch", delay=5, leave=False):
            rows = slice(start, start + batch_size)
            scores = np.asarray(scorer.scores(self.users[rows], self.histories[rows]))
            targets = self.targets[rows]
            for kind in self.lists:
                if kind == "full":
                    parts[kind].append(ranks_from_scores(_without_seen(scores, self.histories[rows]), targets - 1))
                else:
                    shown = self.candidates[kind][rows]
                    column = (shown == targets[:, None]).argmax(axis=1)
                    parts[kind].append(ranks_from_scores(np.take_along_axis(scores, shown - 1, axis=1), column))
        return {kind: np.concatenate(ranks) for kind, ranks in parts.items()}

    def mean(self, scorer: CFScorer, metric: str) -> float:
        """One metric such as `full/ndcg@10`, averaged over users: what models are chosen by on validation."""
        kind, _, name = metric.partition("/")
        return float(per_user(name, self.ranks(scorer)[kind]).mean())

    def predictions(self, ranks: Mapping[str, NDArray[np.int64]], seed: int) -> Iterator[Prediction]:
        """The ranks as records, in the files' order of users."""
        for row, (user_id, target) in enumerate(zip(self.user_ids, self.target_ids, strict=True)):
            yield Prediction(user_id, target, {kind: int(ranks[kind][row]) for kind in self.lists}, seed)


def _list_of(by_user: Mapping[str, CandidateLists], user_id: str, kind: str) -> tuple[str, ...]:
    if user_id not in by_user:
        raise InputError(f"user {user_id} has no stored candidates; run prepare.sh again")
    if kind not in by_user[user_id].lists:
        raise InputError(
            f"the stored candidates have the lists {', '.join(by_user[user_id].lists)}, not {kind}; add it to "
            "candidate_lists in prepare.yaml and run prepare.sh again, or leave it out of lists"
        )
    return by_user[user_id].lists[kind]


def _without_seen(scores: NDArray[np.floating], histories: Sequence[Sequence[int]]) -> NDArray[np.floating]:
    masked = np.array(scores, dtype=np.float32)
    for row, history in enumerate(histories):
        masked[row, np.array(history) - 1] = -np.inf
    return masked
