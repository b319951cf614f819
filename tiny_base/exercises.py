"""What the tiny base model practises: reading, copying and comparing lists that look like those of the prompts.

Every document shows a made-up history and made-up candidates and asks several questions about them. The text itself
answers each of them. Items are random combinations of the synthetic domain's words with fresh random ids, reviews are
random, and no list follows the behaviour of a user: which item comes next is never asked or shown. The only facts that
are taught are those of the item texts: which product type is of which category, and which categories its description
goes well with.

One combination of brand, diet and product type in ten is held out; `ExerciseWriter(held_out=True)` uses those alone.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from twice_rec import prompts
from twice_rec.answer_format import ITEM_ONLY, WITH_RATIONALE, Field, describe
from twice_rec.catalog import ItemCatalog
from twice_rec.data.sources import synthetic as words
from twice_rec.prompts import Message, PromptFormat
from twice_rec.rationales.reading import attributes, called_for, last_note, opinion, review_note, review_notes
from twice_rec.records import Example, Interaction, Item

T = TypeVar("T")

_CATEGORY_WEIGHT = 1.5  # of a called-for category against one liked attribute, in "which candidate fits"


def exercise(lines: Sequence[str], question: str) -> list[Message]:
    """Return a question about lists or an item, written as the package writes prompts."""
    content = "\n".join([*lines, "", question])
    return [{"role": "system", "content": prompts.EXPERT}, {"role": "user", "content": content}]


def with_format(question: str, expected: tuple[Field, ...]) -> str:
    """Return the question with the format of its answer."""
    return "\n".join([question, prompts.ANSWER_IN_THIS_FORM, describe(expected)])


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its only right answer.

    Args:
        kind: copy, attributes, reading or items.
        names_format: whether the question says the format of the answer.
    """

    kind: str
    question: str
    answer: str
    names_format: bool = False


@dataclass(frozen=True, slots=True)
class Document:
    """A conversation: the prompt of the first turn (lists and question), its answer, and the turns that follow.

    Args:
        candidates: the ids of the candidates in the lists.
    """

    prompt: list[Message]
    turns: list[Turn]
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Lengths:
    """The longest lists."""

    interactions: int
    candidates: int

    def at(self, progress: float) -> Lengths:
        """Return lengths that grow, slowly at first: 1 interaction and 3 candidates at progress 0, these at 1."""
        share = min(1.0, progress) ** 2
        return Lengths(1 + round(share * (self.interactions - 1)), 3 + round(share * (self.candidates - 3)))


class ExerciseWriter:
    """Writes documents.

    Args:
        catalog: whose descriptions say which categories go well together.
        shown: what the lines show.
        held_out: make items of the held-out combinations instead of the others.
    """

    def __init__(self, catalog: ItemCatalog, shown: PromptFormat, held_out: bool = False):
        self._catalog, self._shown = catalog, shown
        self._held_out = held_out
        self._categories = list(words.PRODUCT_TYPES)
        self._goes_with = {item.categories[-1]: called_for(item, self._categories) for item in catalog}

    def draw(self, rng: np.random.Generator, lengths: Lengths, item_share: float, questions: int) -> Document:
        """Draw a document about items with probability `item_share`, else about lists of random lengths."""
        if rng.random() < item_share:
            return self.item_document(rng, max(1, questions // 2))
        interactions, candidates = rng.integers(0, lengths.interactions + 1), rng.integers(3, lengths.candidates + 1)
        return self.document(rng, int(interactions), int(candidates), questions)

    def document(self, rng: np.random.Generator, interactions: int, candidates: int, questions: int) -> Document:
        """Draw lists of the given lengths and different questions about them, of random kinds."""
        lists = _Lists(self, rng, interactions, candidates)
        askers: Sequence[Callable[[], Turn | None]] = lists.askers
        weights = np.array(lists.weights) / sum(lists.weights)
        turns, asked = list[Turn](), set[str]()
        while len(turns) < questions:
            turn = askers[int(rng.choice(len(askers), p=weights))]()
            if turn is not None and turn.question not in asked:
                turns.append(turn)
                asked.add(turn.question)
        lines = prompts.show_lists(lists.example, lists, self._shown)
        return Document(exercise(lines, turns[0].question), turns, lists.example.candidates)

    def item_document(self, rng: np.random.Generator, questions: int) -> Document:
        """Draw a document that asks what items are, from their titles alone."""
        turns = []
        for item in (self.item(rng) for _ in range(questions)):
            said = prompts.describe_item(item, ("category", "description", "details"), self._shown)
            turns.append(Turn("items", f"Product: {item.title}\n\nGive its category, description and details.", said))
        return Document(exercise([], turns[0].question), turns)

    def texts(self, rng: np.random.Generator, lengths: Lengths, item_share: float, questions: int) -> Iterator[str]:
        """Yield what a tokenizer is trained on: documents, and each item of the catalogue in prompts of the tasks."""
        for number, item in enumerate(self._catalog):
            document = self.draw(rng, lengths, item_share, questions)
            yield from (message["content"] for message in document.prompt)
            yield from (text for turn in document.turns for text in (turn.question, turn.answer))
            bought = (Interaction(item.item_id, rating=float(1 + number % 5)),)
            example = Example("", bought, (item.item_id,), item.item_id)
            asked = prompts.recommend(example, self._catalog, self._shown, with_rationale=number % 2 == 0)
            yield from (message["content"] for message in [*asked, *prompts.item_info(item)])
            yield prompts.item_info_answer(item, self._shown)

    def item(self, rng: np.random.Generator) -> Item:
        """Draw a combination of the synthetic domain's words."""
        while True:
            category = self._categories[rng.integers(len(self._categories))]
            kinds = words.PRODUCT_TYPES[category]
            kind, brand = kinds[rng.integers(len(kinds))], words.BRANDS[rng.integers(len(words.BRANDS))]
            diet, size = (words.DIETS[rng.integers(len(words.DIETS))], words.SIZES[rng.integers(len(words.SIZES))])
            if (zlib.crc32(f"{brand} {diet} {kind}".encode()) % 10 == 0) == self._held_out:
                break
        letters = "".join("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"[i] for i in rng.integers(36, size=8))
        details = {"Brand": brand, "Diet": diet, "Category": category}
        others = " and ".join(self._goes_with.get(category, ())) or "everything"
        return Item(
            f"B0{letters}",
            f"{diet} {kind}, {size}",
            f"{kind} for every day. Goes well with {others}.",
            json.dumps(details)[1:-1],
            brand,
            ("Grocery & Gourmet Food", category),
        )

    def review(self, rng: np.random.Generator, item: Item) -> Interaction:
        """Draw a review of an item: praise or blame of its brand or diet, or neither."""
        details = json.loads(f"{{{item.details}}}")
        name = (details["Brand"], details["Diet"])[rng.integers(2)]
        feeling = rng.choice(3, p=(0.55, 0.25, 0.2))
        if feeling == 2:
            rating = int(rng.integers(1, 6))
            title = rng.choice(words.NEUTRAL_GOOD if rating >= 4 else words.NEUTRAL_BAD)
        else:
            rating = int(rng.integers(1, 3) if feeling else rng.integers(3, 6))
            title = rng.choice(words.BLAME if feeling else words.PRAISE).format(x=name)
        return Interaction(item.item_id, rating=float(rating), review_title=str(title))


class _Lists:
    """The items of one document and what can be asked about them; an asker returns None if its question is unclear."""

    def __init__(self, writer: ExerciseWriter, rng: np.random.Generator, interactions: int, candidates: int):
        self._rng, self._writer = rng, writer
        self.bought = [writer.item(rng) for _ in range(interactions)]
        shown = dict[str, Item]()
        while len(shown) < candidates:  # a title that two candidates share would not tell which id follows it
            item = writer.item(rng)
            shown.setdefault(item.title, item)
        self.shown = list(shown.values())
        self._by_id = {item.item_id: item for item in (*self.bought, *self.shown)}
        history = tuple(writer.review(rng, item) for item in self.bought)
        ids = tuple(item.item_id for item in self.shown)
        self.example = Example("", history, ids, ids[0])
        self._opinions = [opinion(entry, item) for entry, item in zip(history, self.bought, strict=True)]
        self._attributes = [attributes(item) for item in self.shown]
        chosen = [(self._all, 1), (self._copy, 4), (self._has, 5), (self._has_both, 2), (self._shared, 2)]
        chosen += [(self._fits, 9)]
        if interactions:
            chosen += [(self._review, 2), (self._reviews, 3), (self._last, 2), (self._frequent, 1), (self._rated, 1.5)]
        self.askers, self.weights = zip(*chosen, strict=True)

    def __getitem__(self, item_id: str) -> Item:
        return self._by_id[item_id]

    def _pick(self, options: Sequence[T]) -> T:
        return options[int(self._rng.integers(len(options)))]

    def _item_turn(self, kind: str, question: str, item: Item, thought: str) -> Turn:
        """Ask for an item; one in four such questions says the format, and half of these ask for a thought."""
        draw = self._rng.random()
        if draw < 0.125:
            return Turn(kind, with_format(question, ITEM_ONLY), prompts.item_answer(item), names_format=True)
        if draw < 0.25:
            asked = with_format(question, WITH_RATIONALE)
            return Turn(kind, asked, prompts.rationale_answer(thought, item), names_format=True)
        return Turn(kind, question, prompts.item_answer(item))

    def _all(self) -> Turn:
        said = " ".join(f"{number}. {prompts.item_answer(item)}" for number, item in enumerate(self.shown, start=1))
        return Turn("copy", "Give all candidates.", said)

    def _copy(self) -> Turn:
        number = int(self._rng.integers(len(self.shown)))
        item = self.shown[number]
        return self._item_turn("copy", f"Give candidate {number + 1}.", item, f"Candidate {number + 1}.")

    def _has(self) -> Turn | None:
        return self._with_attributes(1)

    def _has_both(self) -> Turn | None:
        return self._with_attributes(2)

    def _with_attributes(self, count: int) -> Turn | None:
        position = int(self._rng.integers(len(self.shown)))
        own = attributes(self.shown[position])
        names = [own[i] for i in self._rng.permutation(len(own))[:count]]
        if sum(set(names) <= set(having) for having in self._attributes) != 1:
            return None
        asked = " and ".join(names)
        return self._item_turn("attributes", f"Which candidate has {asked}?", self.shown[position], f"{asked}.")

    def _fits(self) -> Turn | None:
        """Ask for the item that fits random wishes, written like the notes on a history."""
        count = int(self._rng.integers(1, 7))
        names = [*words.BRANDS, *words.DIETS]
        of_candidates = [name for having in self._attributes for name in having if name in names]
        pool = of_candidates if self._rng.random() < 0.7 else names
        wishes: list[tuple[str, bool] | None] = [
            (self._pick(pool), bool(self._rng.random() < 0.7)) if self._rng.random() < 0.8 else None
            for _ in range(count)
        ]
        last = self._writer.item(self._rng)
        calls_for = called_for(last, list(words.PRODUCT_TYPES))
        notes = f"{review_notes(wishes)} {last_note(last, calls_for)}"
        named = {entry for entry in wishes if entry is not None}
        if {name for name, liked in named if liked} & {name for name, liked in named if not liked}:
            return None
        scores = [
            sum((1 if liked else -1) * (name in having) for name, liked in named)
            + _CATEGORY_WEIGHT * any(name in having for name in calls_for)
            for having in self._attributes
        ]
        best = int(np.argmax(scores))
        if scores[best] <= 0 or scores.count(scores[best]) != 1:
            return None
        return self._item_turn("attributes", f"Which candidate fits best? {notes}", self.shown[best], notes)

    def _shared(self) -> Turn:
        """Ask which candidates share an attribute; the answer goes line by line: the candidate's own, and a verdict."""
        kind = int(self._rng.integers(len(self._attributes[0])))
        name = self._pick(self._attributes)[kind]
        verdicts = [f"{own[kind]} {'yes' if own[kind] == name else 'no'}" for own in self._attributes]
        said = " ".join(f"{number} {verdict}." for number, verdict in enumerate(verdicts, start=1))
        return Turn("attributes", f"Which candidates have {name}?", said)

    def _review(self) -> Turn:
        number = int(self._rng.integers(len(self.bought)))
        note = review_note(number + 1, self._opinions[number])
        return Turn("reading", f"What does review {number + 1} say?", note)

    def _reviews(self) -> Turn:
        return Turn("reading", "What does each review say?", review_notes(self._opinions))

    def _last(self) -> Turn:
        last = self.bought[-1]
        note = last_note(last, called_for(last, list(words.PRODUCT_TYPES)))
        return Turn("reading", "What was bought last, and what goes well with it?", note)

    def _frequent(self) -> Turn | None:
        counts = Counter(name for item in self.bought for name in attributes(item)).most_common(2)
        if len(counts) > 1 and counts[0][1] == counts[1][1]:
            return None
        return Turn("reading", "What do the purchases have in common most often?", f"{counts[0][0]}.")

    def _rated(self) -> Turn:
        number = int(self._rng.integers(len(self.bought)))
        rating = prompts.rating_word(self.example.history[number].rating)
        return Turn("reading", f"How was purchase {number + 1} rated?", f"{rating}.")
