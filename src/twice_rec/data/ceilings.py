"""Ceilings of the synthetic domain: the best ranking of the next item that can be made from a part of what is true.

Each is Bayes' rule under the domain's own law (`sources.synthetic`). Its reader knows that law and its five strengths;
diet, brand and category of every item, and which categories complete each other, whether or not the prompt's fields
show them, since task 1 teaches them; and of the user what a prompt shows: the last `prompt_history_items` interactions
with the `prompt_review_fields`. Whatever else the user did is hidden, and so is the user's taste.

- `ceiling_text`: no more than that. That brands are sought after is known, but not which.
- `ceiling_popularity`: also the popularity of every item and of every brand.
- `ceiling_cohort`: also every item's hidden cohort; the user's own is inferred. So this is the ceiling of whatever
  reads such prompts, however much it has learned about the items.

Items are ranked by E[exp(u(i)) / Z], the probability of being chosen next, with the mean over taste and cohort given
what is shown. Choices tell by their probabilities, and a review by the exact probability of its rating, of what its
title says and of the taste its text tells. Equals are ordered at random, so that a tie costs what guessing would.

Exact: the mean runs over all 60 tastes for diets, 8 cohorts, 560 sets of liked brands and 120 pairs of disliked ones.
Approximate: the normaliser Z counts what the user had already as if it could be chosen again, sees a disliked brand to
first order, and has the mean of effects that the reader does not know (of single items, of cohorts); if something was
hidden before the first choice shown, that choice counts as made without a complement; tastes and cohorts of a weight
below about exp(-7) are dropped; `ceiling_text` knows a brand's popularity by nine values, brand by brand. A text that
the prompt cuts counts as whole. Lists other than uniform ones favour some items; no reader here takes account of that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from twice_rec.catalog import ItemCatalog
from twice_rec.data.sources.base import Source
from twice_rec.data.sources.synthetic import (
    BRAND_TASTES,
    BRANDS,
    CATEGORIES,
    COHORTS,
    DIET_TASTES,
    DIETS,
    MAX_INTERACTIONS,
    SyntheticDomain,
    SyntheticSource,
    review_probabilities,
)
from twice_rec.prompts import PromptFormat
from twice_rec.random_streams import id_hashes, random_streams
from twice_rec.records import UserSequence

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

# Name of a ceiling -> whether the popularity of items and brands is known, and whether the items' cohorts are.
CEILINGS: Mapping[str, tuple[bool, bool]] = {
    "ceiling_text": (False, False),
    "ceiling_popularity": (True, False),
    "ceiling_cohort": (True, True),
}

_FEELINGS = np.array([1, 0, -1])  # the order of the axes of `review_probabilities`
_NOTHING = len(CATEGORIES)  # in place of the last interaction's category, if none is shown
_IMPOSSIBLE, _LEAST, _DROPPED = -600.0, -25.0, 7.0  # logs of weights: of none; the lowest kept apart; see above
_BATCH = 128  # users at a time; about ten tastes and cohorts of each are weighed


def _sets(size: int, count: int) -> NDArray[np.float32]:
    """Return all sets of `count` of `size` things as rows of zeros and ones."""
    return np.array([[i in s for i in range(size)] for s in itertools.combinations(range(size), count)], np.float32)


_LIKED, _DISLIKED = (_sets(len(BRANDS), count) for count in BRAND_TASTES)  # [S, B], [P, B]
_APART = (_LIKED @ _DISLIKED.T == 0).astype(np.float32)  # [S, P], whether no brand is in both
_DIET_STATES = np.array(
    [s for s in itertools.product(_FEELINGS, repeat=len(DIETS)) if (s.count(1), s.count(-1)) == DIET_TASTES]
)  # [D, diets]


@dataclass(frozen=True)
class Shown:
    """What prompts show of U users: the last K interactions; -1 and zeros fill up shorter histories at the end."""

    item: Ints  # [U, K], positions in the domain
    before: Ints  # [U, K], the category of the interaction before, `_NOTHING` if none is shown
    last: Ints  # [U], the category of the last one
    review: Floats  # [U, K, 3, 3], log-probability of what is shown of the review, by feelings for diet and brand
    diets: Ints  # [U, diets], feelings that texts tell, 0 for none
    brands: Ints  # [U, brands]

    def take(self, rows: slice) -> Shown:
        """Return some of the users."""
        return Shown(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def shown_histories(domain: SyntheticDomain, sequences: Sequence[UserSequence], shown: PromptFormat) -> Shown:
    """Return what the prompt of each user's test question shows; without a test target, of the question after the end.

    Nothing from the target on is read.
    """
    user_at, item_at = ({one: at for at, one in enumerate(ids)} for ids in (domain.user_ids, domain.item_ids))
    said = domain.review_codes()  # [U of the domain][interactions]
    count = min(shown.prompt_history_items or MAX_INTERACTIONS, MAX_INTERACTIONS)
    item = np.full((len(sequences), count), -1)
    before, last = np.full_like(item, _NOTHING), np.full(len(sequences), _NOTHING)
    review = np.zeros((*item.shape, 3, 3), np.float32)
    told = np.zeros((len(sequences), len(DIETS) + len(BRANDS)), np.int64)
    fields = set(shown.prompt_review_fields)
    table = review_probabilities()  # [ratings, titles, 3, 3]
    if not fields & {"review_title", "review_text"}:  # a text repeats its title
        table = np.broadcast_to(table.sum(axis=1, keepdims=True), table.shape)
    if "rating" not in fields:
        table = np.broadcast_to(table.sum(axis=0, keepdims=True), table.shape)
    logs = np.log(np.maximum(table, np.exp(_IMPOSSIBLE)))
    for row, sequence in enumerate(sequences):
        user = user_at[sequence.user_id]
        entries = sequence.interactions if sequence.test is None else sequence.history("test")
        items = [item_at[entry.item_id] for entry in entries[-count:]]
        codes = [said[user][domain.histories[user].index(one)] for one in items]
        item[row, : len(items)] = items
        before[row, 1 : len(items)] = domain.category[items[:-1]]
        last[row] = domain.category[items[-1]] if items else _NOTHING
        for k, (rating, title, thing, feeling) in enumerate(codes):
            review[row, k] = logs[rating - 1, title]
            if "review_text" in fields:
                told[row, thing] = feeling
    return Shown(item, before, last, review, told[:, : len(DIETS)], told[:, len(DIETS) :])


class Ceiling:
    """The reader with one kind of knowledge. H is 8 if it knows the items' cohorts, else 1.

    Args:
        popularity: whether it knows the popularity of items and brands.
        cohorts: whether it knows the items' cohorts.
    """

    def __init__(self, domain: SyntheticDomain, popularity: bool, cohorts: bool):
        self._domain, config = domain, domain.config
        self._taste, self._match = config.synthetic_taste, config.synthetic_cohort if cohorts else 0.0
        self._fame = 0.0 if popularity else config.synthetic_brand  # spread of what is not known of a brand
        self._cohort = domain.cohort if cohorts else np.zeros_like(domain.cohort)  # [N]
        called = np.vstack([domain.complements, np.zeros(len(CATEGORIES), dtype=bool)])[:, domain.category]  # [C+1, N]
        known = config.synthetic_complement * called + (domain.appeal if popularity else 0.0)  # [C+1, N]
        own = self._match * (np.arange(COHORTS if cohorts else 1)[:, None] == self._cohort)  # [H, N]
        self._known, self._own = known.astype(np.float32), own.astype(np.float32)
        cells = np.zeros((len(own), len(known), len(DIETS), len(BRANDS)))  # exp(u) without taste, summed
        np.add.at(cells, (..., domain.diet, domain.brand), np.exp(own[:, None] + known))
        of_brand = np.einsum("hcxb,dx->hcdb", cells, np.exp(self._taste * _DIET_STATES))  # [H, C+1, D, B]
        log_z = np.log(of_brand @ (1 + np.expm1(self._taste) * _LIKED.T))  # [H, C+1, D, S]
        self._log_z, self._mean_log_z = log_z.astype(np.float32), log_z.mean(axis=-1)
        self._share = of_brand / np.exp(self._mean_log_z)[..., None]  # [H, C+1, D, B], of a brand that leaves one cold

    def scores(self, shown: Shown) -> Floats:
        """Return log-probabilities of being next, but for a constant per user: [U, N], -inf for what is shown."""
        parts = (slice(start, start + _BATCH) for start in range(0, len(shown.last), _BATCH))
        return np.concatenate([self._scores(shown.take(part)) for part in parts])

    def _scores(self, shown: Shown) -> Floats:
        there = shown.item >= 0  # [U, K]
        feels = _DIET_STATES[:, self._domain.diet[shown.item]].transpose(1, 0, 2)  # [U, D, K]
        chose = np.where(there[:, None], self._taste * feels, 0.0).sum(axis=-1)  # [U, D]
        contradicted = (shown.diets[:, None] * _DIET_STATES < np.abs(shown.diets)[:, None]).any(axis=-1)
        chose += _IMPOSSIBLE * contradicted
        of_brand = np.take_along_axis(shown.review[:, None], (1 - feels)[..., None, None], axis=3)[:, :, :, 0]
        of_brand = of_brand + np.where(there[:, None, :, None], self._taste * _FEELINGS, 0.0)  # [U, D, K, 3]
        user, diet, cohort, weight = self._likely(shown, chose, of_brand)  # [R] each, with the cohort's choices
        brands = self._brand_evidence(shown, user, of_brand[user, diet])  # [R, B, 3]
        log_z, share, steps = self._normalisers(shown, user, diet, cohort)  # [R, S], [R, B], [R, 1]
        evidence, gain = self._unknown_fame(shown, user, share, steps)  # [R, B, 3] each
        total, means = _over_brands(brands + evidence, gain, log_z, share, self._taste)  # [R], [R, B]
        weight = weight + chose[user, diet] + total
        best = np.full(len(there), -np.inf)
        np.maximum.at(best, user, weight)
        weight = np.exp(weight - best[user])  # [R]
        of_diet = np.exp(self._taste * _DIET_STATES[diet])  # [R, diets]
        of_cell = (of_diet[:, :, None] * means[:, None]).reshape(len(user), -1)  # [R, diets * B]
        shape = (len(there) * len(self._own), len(user))
        sums = sparse.csr_matrix((weight, (user * len(self._own) + cohort, np.arange(len(user)))), shape)  # [U * H, R]
        cells = (sums @ of_cell).reshape(len(there), len(self._own), len(DIETS), len(BRANDS)).astype(np.float32)
        of_item = cells[:, :, self._domain.diet, self._domain.brand]  # [U, H, N], E[exp(taste * t)]
        scores = np.log((of_item * np.exp(self._own)).sum(axis=1)) + self._known[shown.last]  # [U, N]
        rows, columns = np.nonzero(there)
        scores[rows, shown.item[rows, columns]] = -np.inf
        return scores

    def _likely(self, shown: Shown, chose: Floats, of_brand: Floats) -> tuple[Ints, Ints, Ints, Floats]:
        """Return users, tastes for diets and cohorts whose weight may matter, and how the cohort explains the choices.

        They are judged by the best that brands could be, and by normalisers averaged over these.
        """
        there, item = shown.item >= 0, shown.item
        same = (self._cohort[item][:, None] == np.arange(len(self._own))[:, None]) & there[:, None]  # [U, H, K]
        matched = self._match * same.sum(axis=-1)  # [U, H]
        weights = (chose + of_brand.max(axis=-1).sum(axis=-1))[..., None] + matched[:, None]  # [U, D, H]
        weights -= self._mean_log_z[:, shown.last].transpose(1, 2, 0)
        for k in range(item.shape[1]):
            z = self._mean_log_z[:, shown.before[:, k]].transpose(1, 2, 0)  # [U, D, H]
            weights -= np.where(there[:, k, None, None], z, 0.0)
        kept = np.nonzero(weights > weights.max(axis=(1, 2), keepdims=True) - _DROPPED)
        return (*kept, matched[kept[0], kept[2]])

    def _brand_evidence(self, shown: Shown, user: Ints, of_brand: Floats) -> Floats:
        """Return log-weights of liking, not minding and disliking each brand, by choices and reviews: [R, B, 3]."""
        evidence = np.zeros((len(user), len(BRANDS), 3))
        rows, brand = np.arange(len(user)), self._domain.brand[shown.item[user]]  # [R], [R, K]
        for k in range(brand.shape[1]):
            evidence[rows, brand[:, k]] += of_brand[:, k]
        told = shown.brands[user][..., None]  # [R, B, 1]
        return evidence + _IMPOSSIBLE * ((told != 0) & (told != _FEELINGS))

    def _normalisers(self, shown: Shown, user: Ints, diet: Ints, cohort: Ints) -> tuple[Floats, Floats, Floats]:
        """Return log Z and `_share`, summed over the choices shown and the next one, and the number of these."""
        log_z = self._log_z[cohort, shown.last[user], diet]  # [R, S]
        share = self._share[cohort, shown.last[user], diet]  # [R, B]
        there = shown.item[user] >= 0  # [R, K]
        for k in range(there.shape[1]):
            rows = np.flatnonzero(there[:, k])
            place = (cohort[rows], shown.before[user[rows], k], diet[rows])
            log_z[rows] += self._log_z[place]
            share[rows] += self._share[place]
        steps = 1.0 + there.sum(axis=1, keepdims=True)
        return log_z, share, steps

    def _unknown_fame(self, shown: Shown, user: Ints, share: Floats, steps: Floats) -> tuple[Floats, Floats]:
        """Return what the choices say of each feeling for a brand of unknown popularity, and the mean of its exp(f).

        [R, B, 3] each; zeros and ones if it is known. The mean is relative to that of all brands.
        """
        if self._fame == 0:
            return np.zeros(1), np.ones(1)
        at, weight = np.polynomial.hermite_e.hermegauss(9)
        more = np.exp(self._fame * at - self._fame**2 / 2)  # [9], exp(f) over its mean
        chosen = np.zeros(share.shape)  # [R, B], how often
        there, brand = shown.item[user] >= 0, self._domain.brand[shown.item[user]]  # [R, K]
        for k in range(brand.shape[1]):
            chosen[np.arange(len(user)), brand[:, k]] += there[:, k]
        held = np.minimum((share / steps)[..., None] * np.exp(self._taste * _FEELINGS), 0.99)[..., None]  # [R, B, 3, 1]
        logs = chosen[..., None, None] * np.log(more) - steps[..., None, None] * np.log1p(held * (more - 1))
        weights = weight / weight.sum() * np.exp(logs)  # [R, B, 3, 9]
        likelihood = weights.sum(axis=-1)
        return np.log(likelihood), (weights * more).sum(axis=-1) / likelihood


def _over_brands(
    logs: Floats, gain: Floats, log_z: Floats, share: Floats, taste: float
) -> tuple[Floats, NDArray[np.float32]]:
    """Sum over all tastes for brands.

    Args:
        logs: [R, B, 3], log-weights of the three feelings for each brand.
        gain: [R, B, 3] or [1], factor of exp(taste * feeling) in the means.
        log_z: [R, S], log of the product of the normalisers, by the set of liked brands.
        share: [R, B], what parts of the normalisers a brand is, summed.

    Returns:
        The log of the sum [R], and the mean of gain * exp(taste * feeling) of each brand [R, B].
    """
    best = logs.max(axis=-1)  # [R, B]
    logs = np.maximum(logs - best[..., None], _LEAST)
    like, cold, dislike = np.moveaxis(logs, -1, 0)  # [R, B] each
    of_liked = (like - cold).astype(np.float32) @ _LIKED.T - log_z  # [R, S]
    of_disliked = (dislike - cold + -np.expm1(-taste) * share).astype(np.float32) @ _DISLIKED.T  # [R, P]
    tops = of_liked.max(axis=1), of_disliked.max(axis=1)  # [R] each
    liked, disliked = np.exp(of_liked - tops[0][:, None]), np.exp(of_disliked - tops[1][:, None])
    together = liked * (disliked @ _APART.T)  # [R, S]
    total = together.sum(axis=1)  # [R]
    plus = together @ _LIKED / total[:, None]  # [R, B], probability of liking
    minus = (disliked * (liked @ _APART)) @ _DISLIKED / total[:, None]  # [R, B]
    gain = gain * np.exp(taste * _FEELINGS)  # [R, B, 3] or [3]
    means = plus * gain[..., 0] + (1 - plus - minus) * gain[..., 1] + minus * gain[..., 2]
    return np.log(total) + sum(tops) + best.sum(axis=1) + cold.sum(axis=1), means


def known_scores(
    source: Source, sequences: Iterable[UserSequence], catalog: ItemCatalog, shown: PromptFormat, seed: int
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield name and scores of the oracle and of each ceiling, [users, items]; nothing for a real domain."""
    if isinstance(source, SyntheticSource):
        records = list(sequences)
        yield "oracle", source.drawn.test_log_probabilities(records, catalog)
        yield from ceiling_scores(source.drawn, records, catalog, shown, seed)


def ceiling_scores(
    domain: SyntheticDomain, sequences: Sequence[UserSequence], catalog: ItemCatalog, shown: PromptFormat, seed: int
) -> Iterator[tuple[str, NDArray[np.int16]]]:
    """Yield each ceiling's name and scores, int16 [len(sequences), len(catalog)], column j for catalogue index j + 1.

    A score is the number of items that are ranked behind the item: no probability, and a third of the oracle's bytes.
    Equals are ordered by draws of the seed and the user.
    """
    item_at = {item_id: at for at, item_id in enumerate(domain.item_ids)}
    columns = [item_at[item_id] for item_id in catalog.ids]
    asked = shown_histories(domain, sequences, shown)
    streams = random_streams(seed, id_hashes(sequence.user_id for sequence in sequences), "ties of ceilings")
    ties = streams.random(0, len(columns)).astype(np.float32)  # [U, N]
    for name, (popularity, cohorts) in CEILINGS.items():
        scores = Ceiling(domain, popularity, cohorts).scores(asked)[:, columns]
        behind = np.empty(scores.shape, np.int16)
        order = np.argsort(scores.astype(np.float64) + 1e-7 * ties, axis=1)
        np.put_along_axis(behind, order, np.arange(len(columns), dtype=np.int16)[None], axis=1)
        yield name, behind
