"""An annotator that writes rationales by rule, for machines without a language model. Marks its rows `offline`.

It reads what a text model would be shown: the items' texts and the user's ratings and reviews. It never sees the
synthetic world's hidden cohorts or probabilities. An item's attributes are the short values of its details, its brand
and its narrowest category.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from twice_rec.catalog import ItemCatalog
from twice_rec.records import Example, Interaction, Item, Rationale

ANNOTATOR = "offline"

_DETAIL = re.compile(r'"([^"]+)": "([^"]+)"')
_LIKED, _DISLIKED = 4.0, 2.0  # ratings from which on a purchase counts for or against its attributes


def attributes(item: Item) -> tuple[str, ...]:
    """Short attribute values, each once: details, brand, narrowest category. Measures (with digits) are left out."""
    found = [value for _, value in _DETAIL.findall(item.details)]
    found += [item.brand, *item.categories[-1:]]
    return tuple(dict.fromkeys(value for value in found if value and len(value) <= 30 and not re.search(r"\d", value)))


class OfflineAnnotator:
    """Writes a forward-looking rationale for each example's target and judges whether it is relevant."""

    def __init__(self, catalog: ItemCatalog):
        self._catalog = catalog

    def annotate(self, example: Example) -> Rationale:
        """What the history shows, what it calls for next, and the verdict.

        Relevant: at least two reasons speak for the target and none against. Irrelevant: none for it, or more against
        than for. Weak: anything between.
        """
        target = self._catalog[example.target]
        liked, disliked = self._tastes(example.history)
        wanted = attributes(target)
        last = self._catalog[example.history[-1].item_id]
        called_for = [name for name in target.categories[-1:] if name and name in last.description]
        for_it = [name for name in wanted if liked[name] > 0]
        against = [name for name in wanted if disliked[name] > liked[name]]
        reasons = len(for_it) + len(called_for)
        verdict = "relevant" if reasons >= 2 and not against else "weak" if reasons > len(against) else "irrelevant"
        evidence = [
            index
            for index, entry in enumerate(example.history)
            if set(attributes(self._catalog[entry.item_id])) & {*for_it, *against}
        ]
        if called_for and len(example.history) - 1 not in evidence:
            evidence.append(len(example.history) - 1)
        return Rationale(
            user_id=example.user_id,
            target=example.target,
            text=self._write(liked, disliked, last, for_it, called_for),
            verdict=verdict,
            evidence=tuple(evidence),
            confidence=round((1 + reasons) / (2 + reasons + len(against)), 2),
            annotator=ANNOTATOR,
        )

    def _tastes(self, history: Sequence[Interaction]) -> tuple[Counter[str], Counter[str]]:
        """How often each attribute was bought and liked, and bought and disliked. Unrated purchases count as liked."""
        liked, disliked = Counter[str](), Counter[str]()
        for entry in history:
            rating = _LIKED if entry.rating is None else entry.rating
            for name in attributes(self._catalog[entry.item_id]):
                liked[name] += rating >= _LIKED
                disliked[name] += rating <= _DISLIKED
        return liked, disliked

    def _write(
        self, liked: Counter[str], disliked: Counter[str], last: Item, for_it: list[str], called_for: list[str]
    ) -> str:
        frequent = [name for name, count in liked.most_common(3) if count >= 2]
        sentences = []
        if frequent:
            sentences.append(f"The customer keeps buying {_and(frequent)}.")
        if disliked_names := [name for name, count in disliked.most_common(2) if count > liked[name]]:
            sentences.append(f"They were unhappy with {_and(disliked_names)}.")
        if called_for:
            sentences.append(f"The last purchase, {attributes(last)[-1]}, goes well with {_and(called_for)}.")
        wanted = list(dict.fromkeys([*for_it, *called_for]))
        sentences.append(f"So {_and(wanted)} fits next." if wanted else "Nothing in the history calls for this.")
        return " ".join(sentences)


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
