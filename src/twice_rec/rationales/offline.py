"""An annotator that writes rationales by rule, for machines without a language model. It marks its rows `offline`.

It reads what a text model would be shown: the items' texts and the user's ratings and reviews. It never sees the hidden
cohorts or probabilities of the synthetic domain. Its texts argue from the history in the steps of `reading.py`, each
small enough for a small model: what each review says, what the last interaction was, what that calls for. They do not
name the target.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from twice_rec.catalog import ItemCatalog
from twice_rec.rationales.reading import attributes, called_for, last_note, opinion, review_notes
from twice_rec.records import Example, Interaction, Rationale

_LIKED, _DISLIKED = 4.0, 2.0  # ratings from which up, and from which down, an item's attributes are liked or disliked
_NOTHING = "Nothing in the history calls for this."


class OfflineAnnotator:
    """Writes a forward-looking rationale for each example's target and judges whether it is relevant.

    `history_items` is how many of the most recent interactions prompts show; None for all.
    """

    def __init__(self, catalog: ItemCatalog, history_items: int | None = None):
        self._catalog = catalog
        self._history_items = history_items
        self._categories = list(dict.fromkeys(item.categories[-1] for item in catalog if item.categories))

    def annotate(self, example: Example) -> Rationale:
        """Return what the history shows, what it calls for next, and the verdict.

        Relevant: at least two reasons speak for the target and none against. Irrelevant: none for it, or more against
        than for. Weak: anything between.
        """
        target, latest = self._catalog[example.target], self._catalog[example.history[-1].item_id]
        liked, disliked = self._tastes(example.history)
        wanted = attributes(target)
        calls_for = called_for(latest, self._categories)
        answered = [name for name in target.categories[-1:] if name in calls_for]
        for_it = [name for name in wanted if liked[name] > 0]
        against = [name for name in wanted if disliked[name] > liked[name]]
        reasons = len(for_it) + len(answered)
        telling, last = {*for_it, *against}, len(example.history) - 1
        evidence = tuple(
            index
            for index, entry in enumerate(example.history)
            if telling.intersection(attributes(self._catalog[entry.item_id])) or (answered and index == last)
        )
        shown = example.history[-self._history_items :] if self._history_items else example.history
        notes = review_notes([opinion(entry, self._catalog[entry.item_id]) for entry in shown])
        return Rationale(
            user_id=example.user_id,
            target=example.target,
            text=f"{notes} {last_note(latest, calls_for)}" if reasons else _NOTHING,
            verdict="relevant" if reasons >= 2 and not against else "weak" if reasons > len(against) else "irrelevant",
            evidence=evidence,
            confidence=round((1 + reasons) / (2 + reasons + len(against)), 2),
            annotator="offline",
        )

    def review(self, example: Example, rationale: Rationale) -> str | None:
        """Read a rationale of this annotator without knowing the target; return a reason to reject it, or None.

        A candidate gains one for each note that likes one of its attributes, or says that it is called for, and loses
        one for each that dislikes one. The target must have more than every other candidate.
        """
        gains = dict.fromkeys(example.candidates, 0)
        for sentence in rationale.text.split(". "):
            note = sentence.partition(", so ")[2] if sentence.startswith("Last was ") else sentence
            for item_id in gains:
                named = sum(bool(re.search(rf"\b{re.escape(name)}\b", note)) for name in self._attributes(item_id))
                gains[item_id] += -named if " dislikes " in note else named
        best = max(gain for item_id, gain in gains.items() if item_id != example.target)
        return None if gains[example.target] > best else "self-check: another candidate is picked"

    def _attributes(self, item_id: str) -> tuple[str, ...]:
        return attributes(self._catalog[item_id])

    def _tastes(self, history: Sequence[Interaction]) -> tuple[Counter[str], Counter[str]]:
        """Count how often each attribute was liked and how often disliked. Interactions without rating are liked."""
        liked, disliked = Counter[str](), Counter[str]()
        for entry in history:
            rating = _LIKED if entry.rating is None else entry.rating
            for name in attributes(self._catalog[entry.item_id]):
                liked[name] += rating >= _LIKED
                disliked[name] += rating <= _DISLIKED
        return liked, disliked
