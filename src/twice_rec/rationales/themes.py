"""An annotator that writes rationales by rule for real texts. It marks its rows `themes`.

It reads what prompts show: titles, and descriptions, details, brands, categories and reviews if the prompt format has
them. What comes back in a history is weighed by how rare it is in the catalogue (`vocabulary.py`); a product that was
rated badly counts against what it has. A text names, by the numbers of prompts, where a theme comes back, what was
rated how, what came last, and ends with the kind of product that this calls for. It never names the target.

A rationale is relevant if the history speaks for its target more than for most of the catalogue: that is measured on
all products, before a word is written, so a target that fits no better than others is not argued for.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from twice_rec.catalog import ItemCatalog
from twice_rec.prompts import ITEM_FIELDS, REVIEW_FIELDS, PromptFormat, rating_word
from twice_rec.rationales.leaks import leaks_of
from twice_rec.rationales.vocabulary import Vocabulary, brand_of, stems_of
from twice_rec.records import Example, Interaction, Item, Rationale

_LIKED, _DISLIKED = 4.0, 2.0  # ratings from which up a product speaks for what it has, and from which down against it
_BESIDE_TITLE = 0.4  # weight of a theme that only a description, details, category or review has; in a title 1
_LATEST = 1.5  # weight of the last interaction, of others 1
_RELEVANT, _WEAK = 0.85, 0.6  # shares of the catalogue that the history speaks for less than for the target
_FEWEST_SIGNS = 2  # themes, counted once per interaction that has them; one word of one title is chance
_MOST_THEMES = 3  # that a text names
_MOST_NUMBERS = 4  # that it names per theme, the latest
_QUOTE = 60  # longest quotation of a review, in characters
_NOTHING = "Nothing that comes back in the history leads to a product like this."


@dataclass(frozen=True, slots=True)
class _Reason:
    """A theme that history and target share, and where it comes back (numbers from 1, as prompts have them)."""

    theme: str
    numbers: tuple[int, ...]
    weight: float


class ThemesAnnotator:
    """Writes what comes back in a history and the kind of product it calls for, and judges whether that is relevant."""

    def __init__(self, catalog: ItemCatalog, shown: PromptFormat):
        self._catalog, self._shown = catalog, shown
        fields = [name for name in shown.prompt_candidate_fields if name != "item_id"]
        texts = (". ".join(ITEM_FIELDS[name][1](item, shown) for name in fields) for item in catalog)
        self._vocabulary = Vocabulary(catalog, texts)
        self._places = {theme: place for place, theme in enumerate(self._vocabulary.all_themes)}
        self._themes = [self._themes_of(item, fields) for item in catalog]  # per item: theme -> weight
        entries = [
            (row, self._places[theme], weight / math.sqrt(len(own)))  # so that long titles do not fit everything
            for row, own in enumerate(self._themes)
            for theme, weight in own.items()
        ]
        rows, columns, weights = zip(*entries, strict=True) if entries else ((), (), ())
        shape = len(catalog), max(1, len(self._places))
        self._matrix = sparse.csr_matrix((weights, (rows, columns)), shape, dtype=np.float64)  # [N, themes]
        self._rows = {item.item_id: row for row, item in enumerate(catalog)}

    def annotate(self, example: Example) -> Rationale:
        """Return what the history shows, what it calls for, and the verdict.

        The verdict is relevant or weak by the share of the catalogue that the history speaks for less, and weak if all
        that they share is one word of one interaction; irrelevant if it shares no theme with the target, if what they
        share was rated badly, or if no text can be written that leaves the target unnamed.
        """
        shown = example.history[-(self._shown.prompt_history_items or len(example.history)) :]
        first = len(example.history) - len(shown)
        target = self._catalog[example.target]
        where = self._where(shown)
        fit = self._fit(where, example)
        reasons = self._reasons(where, target)
        text = self._text(shown, target, reasons) if reasons else None
        enough = fit >= _RELEVANT and sum(len(reason.numbers) for reason in reasons) >= _FEWEST_SIGNS
        verdict = "irrelevant" if text is None or fit < _WEAK else "relevant" if enough else "weak"
        cited = {number for reason in reasons for number in reason.numbers} if text else set()
        return Rationale(
            user_id=example.user_id,
            target=example.target,
            text=text or _NOTHING,
            verdict=verdict,
            evidence=tuple(sorted(first + number - 1 for number in cited)),
            confidence=round(float(fit), 2),
            annotator="themes",
        )

    def review(self, example: Example, rationale: Rationale) -> str | None:
        """Read a rationale of this annotator without knowing the target; return a reason to reject it, or None.

        Every candidate gains the weights of its themes that the text names, those of the last sentence twice. The
        target must have more than every other candidate.
        """
        *notes, last = rationale.text.removesuffix(".").split(". ")
        named = defaultdict[str, float](float)
        for sentence, worth in [*((note, 1.0) for note in notes), (last, 2.0)]:
            if not sentence.startswith("They did not like"):
                for theme in self._vocabulary.themes(sentence):
                    named[theme] = max(named[theme], worth)
        gains = {
            item_id: sum(self._vocabulary.weight(theme) * named[theme] for theme in self._themes[self._rows[item_id]])
            for item_id in example.candidates
        }
        best = max((gain for item_id, gain in gains.items() if item_id != example.target), default=0.0)
        return None if gains[example.target] > best else "self-check: another candidate is picked"

    def _themes_of(self, item: Item, fields: Sequence[str]) -> dict[str, float]:
        """Return the themes of the fields of an item that a prompt shows -> their weight."""
        weights: dict[str, float] = {}
        for name in fields:
            if name != "item_id":
                worth = 1.0 if name == "title" else _BESIDE_TITLE
                for theme in self._vocabulary.themes(ITEM_FIELDS[name][1](item, self._shown)):
                    weights[theme] = max(weights.get(theme, 0.0), worth * self._vocabulary.weight(theme))
        return weights

    def _where(self, shown: Sequence[Interaction]) -> dict[str, list[tuple[int, float]]]:
        """Return theme -> (number of an interaction, what it says for or against the theme)."""
        where = defaultdict[str, list[tuple[int, float]]](list)
        for number, entry in enumerate(shown, start=1):
            item, sign = self._catalog[entry.item_id], _sign(entry.rating)
            found = self._themes_of(item, self._shown.prompt_history_fields)
            for name in self._shown.prompt_review_fields:
                if name != "rating":
                    for theme in self._vocabulary.themes(REVIEW_FIELDS[name][1](entry, self._shown)):
                        found.setdefault(theme, _BESIDE_TITLE * self._vocabulary.weight(theme))
            latest = _LATEST if number == len(shown) else 1.0
            for theme, weight in found.items():
                where[theme].append((number, sign * latest * weight))
        return where

    def _fit(self, where: Mapping[str, Sequence[tuple[int, float]]], example: Example) -> float:
        """Return the share of the catalogue, without the history, that the history speaks for less than the target."""
        profile = np.zeros(self._matrix.shape[1])  # [themes]
        for theme, entries in where.items():
            total = sum(value for _, value in entries)
            profile[self._places[theme]] = np.sign(total) * np.sqrt(abs(total))
        scores: NDArray[np.float64] = self._matrix @ profile  # [N]
        own = self._rows[example.target]
        others = np.delete(scores, [own, *{self._rows[entry.item_id] for entry in example.history} - {own}])
        return float((others < scores[own]).mean()) if len(others) and scores[own] > 0 else 0.0

    def _reasons(self, where: Mapping[str, Sequence[tuple[int, float]]], target: Item) -> list[_Reason]:
        """Return what history and target share, the strongest first; a pair of words replaces the words in it."""
        found = []
        for theme, weight in self._themes[self._rows[target.item_id]].items():
            total = sum(value for _, value in where.get(theme, ()))
            if total > 0:
                numbers = tuple(number for number, value in where[theme] if value > 0)
                found.append(_Reason(theme, numbers, weight * total))
        found.sort(key=lambda reason: (-reason.weight, reason.theme))
        kept: list[_Reason] = []
        for reason in found:
            words = set(reason.theme.split())
            if not any(words & set(other.theme.split()) for other in kept):
                kept.append(reason)
        return kept[:_MOST_THEMES]

    def _text(self, shown: Sequence[Interaction], target: Item, reasons: Sequence[_Reason]) -> str | None:
        """Return the rationale with as many reasons as leave the target unnamed; None if even one names it."""
        brand = self._same_brand(shown, target)
        for count in range(len(reasons), 0, -1):
            for with_brand in (True, False) if brand else (False,):
                named = reasons[:count]
                maker = [f"They stay with a maker they know, that of {_listed(brand)}."] if with_brand else []
                notes = [*maker, *self._opinions(shown, named), *self._latest(shown)]
                text = " ".join([self._comes_back(named), *notes, self._calls_for(target, named)])
                if not leaks_of(text, target):
                    return text
        return None

    def _comes_back(self, reasons: Sequence[_Reason]) -> str:
        """Return `They keep coming back to coffee (3, 6 and 7), and have tried dark roast (5).`"""
        named = [
            (f"{self._vocabulary.written(r.theme)} ({_listed(r.numbers[-_MOST_NUMBERS:])})", len(r.numbers) > 1)
            for r in reasons
        ]
        often, once = ([text for text, returns in named if returns is wanted] for wanted in (True, False))
        parts = [f"keep coming back to {_joined(often)}"] if often else []
        parts += [f"have tried {_joined(once)}"] if once else []
        return f"They {', and '.join(parts)}."

    def _opinions(self, shown: Sequence[Interaction], reasons: Sequence[_Reason]) -> list[str]:
        """Return what was rated well among the reasons, and the last thing that was rated badly."""
        cited = {number for reason in reasons for number in reason.numbers}
        rated = [(number, entry) for number, entry in enumerate(shown, start=1) if entry.rating is not None]
        liked = [(n, entry) for n, entry in rated if n in cited and _sign(entry.rating) == 1.0]
        disliked = [(n, entry) for n, entry in rated if _sign(entry.rating) < 0]
        said = [f"They rated {n} {rating_word(entry.rating)}{_quoted(entry)}." for n, entry in liked[-1:]]
        return said + [f"They did not like {n}, rated {rating_word(e.rating)}{_quoted(e)}." for n, e in disliked[-1:]]

    def _latest(self, shown: Sequence[Interaction]) -> list[str]:
        kind = self._kind(self._catalog[shown[-1].item_id])
        return [f"The latest, {len(shown)}, is {kind}."] if kind else []

    def _calls_for(self, target: Item, reasons: Sequence[_Reason]) -> str:
        """Return `This calls for coffee, again dark roast.`"""
        kind = self._kind(target)
        words = stems_of(kind) if kind else []
        others = [self._vocabulary.written(r.theme) for r in reasons if not set(r.theme.split()) & set(words)]
        if kind is None or not words:
            return f"This calls for something with {_joined(others)}." if others else f"This calls for {kind}."
        again = any(words[-1] in reason.theme.split() for reason in reasons)
        return f"This calls for {'more ' if again else ''}{kind}{f', with {_joined(others)} again' if others else ''}."

    def _kind(self, item: Item) -> str | None:
        if "category" in self._shown.prompt_candidate_fields and item.categories:
            return item.categories[-1]
        kind = self._vocabulary.kind(item)
        return self._vocabulary.written(kind) if kind else None

    def _same_brand(self, shown: Sequence[Interaction], target: Item) -> tuple[int, ...]:
        """Return the numbers of interactions with the target's brand, if prompts show brands."""
        brand, fields = brand_of(target).lower(), {*self._shown.prompt_history_fields}
        if not brand or not fields & {"brand", "details"}:
            return ()
        same = [brand_of(self._catalog[entry.item_id]).lower() == brand for entry in shown]
        return tuple(n for n, entry in enumerate(shown, start=1) if same[n - 1] and _sign(entry.rating) > 0)


def _sign(rating: float | None) -> float:
    """Return what an interaction says for what its product has: 1 without a rating or with a good one, -1 if bad."""
    if rating is None or rating >= _LIKED:
        return 1.0
    return -1.0 if rating <= _DISLIKED else 0.5


def _quoted(entry: Interaction) -> str:
    """Return ` ("Great taste")`, if the review has a title that is short."""
    title = entry.review_title.strip().rstrip(".")
    return f' ("{title}")' if title and len(title) <= _QUOTE and '"' not in title and ". " not in title else ""


def _listed(numbers: Sequence[int]) -> str:
    return _joined([str(number) for number in numbers])


def _joined(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
