"""Ranks of the targets from scores of the catalogue. Ties count against the target.

Users are ranked in blocks, so that memory is bounded however large the catalogue is; on a GPU, if the scores are there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from twice_rec.catalog import ItemCatalog
from twice_rec.cf.baselines import BASELINES, CFScorer, TrainingData, require_memory
from twice_rec.cf.held_out import NOTHING, HeldOut, without_prompted
from twice_rec.item_sequences import ItemSequences, Questions
from twice_rec.metrics import per_user
from twice_rec.progress import progress
from twice_rec.random_streams import random_stream
from twice_rec.records import Prediction, Split

CHOSEN_ON = "full/ndcg@10"  # validation metric by which weights and the settings of baselines are chosen
_BLOCK = 32_000_000  # scores that are held at once
_USERS = 512  # the most users of a block


class Data(Protocol):
    """What CF models need of the prepared data; `data.dataset.PreparedData` has it."""

    catalog: ItemCatalog

    def questions(self, split: Split, kinds: Sequence[str] = ()) -> Questions: ...  # noqa: D102
    def list_kinds(self, split: Split) -> Sequence[str]: ...  # noqa: D102
    def training_histories(self) -> ItemSequences: ...  # noqa: D102


class CFQuestions:
    """The questions of one split, which a CF model is asked.

    Args:
        split: `valid` or `test`.
        lists: names of `RANKED_LISTS`; `full` is the catalogue without the seen items.
        max_users: only so many users are asked, drawn by seed; None for all.

    Raises:
        InputError: if no user has a target in the split, or if a list is not stored.
    """

    def __init__(self, data: Data, split: Split, lists: Sequence[str], max_users: int | None = None, seed: int = 0):
        asked = data.questions(split, [kind for kind in lists if kind != "full"])
        if max_users is not None and max_users < len(asked.users):
            drawn = random_stream(seed, f"{split} users of CF models").permutation(len(asked.users))[:max_users]
            asked = asked.take(np.sort(drawn))
        self.asked = asked
        self.lists = tuple(lists)
        self._ids = data.catalog.ids

    def ranks(self, scorer: CFScorer, lists: Sequence[str] | None = None) -> dict[str, NDArray[np.int64]]:
        """Return the rank of every user's target per list, all or some: int64 [U]. Ties count against the target."""
        parts: dict[str, list[NDArray[np.int64]]] = {kind: [] for kind in lists or self.lists}
        for rows, scores in self._scores(scorer):
            for kind in parts:
                parts[kind].append(self._ranks(kind, scores, rows).cpu().numpy())
        return {kind: np.concatenate(ranks) for kind, ranks in parts.items()}

    def _scores(self, scorer: CFScorer) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the rows of a block of users and their scores of the catalogue, [B, N]."""
        for rows in blocks(len(self.asked.users), len(self._ids)):
            yield rows, torch.as_tensor(scorer.scores(self.asked.users[rows], self.asked.histories[rows]))

    def _ranks(self, kind: str, scores: torch.Tensor, rows: slice) -> torch.Tensor:
        """Return the ranks of a block's targets in one kind of list: int64 [B]."""
        targets = torch.from_numpy(self.asked.targets[rows].astype(np.int64)).to(scores.device)  # [B]
        of_target = scores.gather(1, targets[:, None] - 1)  # [B, 1]
        if kind == "full":
            return self._among_unseen(scores, of_target, rows)
        return _count(_not_below(scores.gather(1, self._shown(kind, scores, rows) - 1), of_target))

    def _shown(self, kind: str, scores: torch.Tensor, rows: slice) -> torch.Tensor:
        return torch.from_numpy(self.asked.candidates[kind][rows].astype(np.int64)).to(scores.device)  # [B, C]

    def _first(self, kind: str, scores: torch.Tensor, rows: slice) -> torch.Tensor:
        """Return the items at place 1, of equal scores the first listed: indices 1..N, int64 [B]."""
        if kind == "full":
            users, seen = torch.from_numpy(_pairs(self.asked.histories[rows], self.asked.targets[rows]))  # [P], [P]
            unseen = scores.clone() if scores.is_floating_point() else scores.double()  # [B, N]
            unseen[users.to(scores.device), seen.to(scores.device) - 1] = -torch.inf
            return unseen.argmax(1) + 1
        shown = self._shown(kind, scores, rows)  # [B, C]
        return shown.gather(1, scores.gather(1, shown - 1).argmax(1, keepdim=True))[:, 0]

    def _among_unseen(self, scores: torch.Tensor, of_target: torch.Tensor, rows: slice) -> torch.Tensor:
        """Return the targets' ranks in the catalogue without what the users have seen: int64 [B]."""
        pairs = _pairs(self.asked.histories[rows], self.asked.targets[rows])
        users, seen = torch.from_numpy(pairs).to(scores.device)  # [P], [P]
        ahead = _not_below(scores[users, seen - 1], of_target[users, 0])  # [P]
        return _count(_not_below(scores, of_target)) - torch.bincount(users[ahead], minlength=len(scores))

    def mean(self, scorer: CFScorer, metric: str = CHOSEN_ON) -> float:
        """Return one metric such as `full/ndcg@10`, averaged over users."""
        kind, _, name = metric.partition("/")
        return float(per_user(name, self.ranks(scorer, [kind])[kind]).mean())

    def predictions(self, scorer: CFScorer, seed: int) -> Iterator[Prediction]:
        """Yield ranks and first items as records, in the files' order of users."""
        user = 0
        for rows, scores in self._scores(scorer):
            ranks = [self._ranks(kind, scores, rows).tolist() for kind in self.lists]
            first = [self._first(kind, scores, rows).tolist() for kind in self.lists]
            for of_user, items in zip(zip(*ranks, strict=True), zip(*first, strict=True), strict=True):
                chosen = dict(zip(self.lists, (self._ids[item - 1] for item in items), strict=True))
                target = self._ids[self.asked.targets[user] - 1]
                by_list = dict(zip(self.lists, of_user, strict=True))
                yield Prediction(self.asked.user_ids[user], target, by_list, seed, first=chosen)
                user += 1


def mean_metrics(ranks: Mapping[str, NDArray[np.int64]]) -> dict[str, float]:
    """Return NDCG@10 in the whole catalogue and NDCG@5 in lists of candidates, averaged over users."""
    names = {kind: "ndcg@10" if kind == "full" else "ndcg@5" for kind in ranks}
    return {f"{kind}/{names[kind]}": float(per_user(names[kind], of).mean()) for kind, of in ranks.items()}


def blocks(num_users: int, num_items: int) -> Iterator[slice]:
    """Yield the rows of blocks of users whose scores of the catalogue fit into memory together."""
    size = max(1, min(_USERS, _BLOCK // num_items))
    for start in progress(range(0, num_users, size), desc="ranking", unit="block"):
        yield slice(start, min(start + size, num_users))


def _not_below(scores: torch.Tensor, of_target: torch.Tensor) -> torch.Tensor:
    """Return where a score is at least the target's; ValueError for NaN, which would compare as if it were low."""
    if scores.numel() and bool(torch.isnan(scores.max())):
        raise ValueError(f"{int(torch.isnan(scores).sum())} of {scores.numel()} scores are NaN")
    return scores >= of_target


def _count(marks: torch.Tensor) -> torch.Tensor:
    """Return how many of each row are true: bool [B, C] -> int64 [B]."""
    return marks.sum(1, dtype=torch.int32).long()  # a CPU sums to int64 many times slower


def _pairs(histories: ItemSequences, targets: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the different items that each user has seen, but for the target: rows and items, int64 [2, P]."""
    rows, items = histories.flat()
    other = items != targets[rows]  # a target that was bought before is still to be found
    return np.unique(np.stack([rows[other], items[other].astype(np.int64)]), axis=1)


def fit_baseline(
    name: str, data: Data, seed: int, max_users: int | None = None, held_out: HeldOut = NOTHING
) -> CFScorer:
    """Fit one of `BASELINES` on the training parts, with its settings chosen on validation.

    Args:
        max_users: see `CFQuestions`.
        held_out: prompts' targets that it must not be fitted on.

    Raises:
        InputError: if it does not fit into the memory that is free.
    """
    valid = CFQuestions(data, "valid", ["full"], max_users, seed)
    histories = without_prompted(data.training_histories(), held_out)
    require_memory([name], histories, len(data.catalog))
    return BASELINES[name](TrainingData(histories, len(data.catalog), seed, valid.mean))
