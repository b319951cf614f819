"""Self-annotated curation: the annotator's own verdict decides, then the limits of the recipe.

Rows are read once, in order; each gets a reason to be dropped or none. Near-duplicates are found last, among the rows
nothing else drops, and the earlier of two stays. Memory holds a fixed-size signature a row, never the texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from twice_rec.catalog import ItemCatalog
from twice_rec.files import read_records, write_records
from twice_rec.rationales.duplicates import NearDuplicates
from twice_rec.rationales.leaks import words_of
from twice_rec.rationales.report import Report, Tally
from twice_rec.records import Example, Rationale

ACCEPTED, REJECTED = "accepted.jsonl", "rejected.jsonl"
_JUDGED = ".judged.jsonl"

Annotate = Callable[[Example], Rationale]
Review = Callable[[Example, Rationale], str | None]


class NotAnnotated(Exception):
    """There is no rationale for a row; the message says why, its kind before the first colon."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What passes; see the keys of `config.RationalesRecipe`."""

    accepted_verdicts: tuple[str, ...]
    min_words: int
    max_words: int
    max_similarity: float | None


@dataclass(frozen=True, slots=True)
class Judged:
    """A row with its outcome. `reason` is empty for an accepted one, `text` where there is no rationale at all."""

    user_id: str
    target: str
    reason: str = ""
    text: str = ""
    verdict: str = ""
    evidence: tuple[int, ...] = ()
    confidence: float | None = None
    annotator: str = ""


def rejection(
    rationale: Rationale, history_length: int, accepted_verdicts: Sequence[str], min_words: int, max_words: int
) -> str | None:
    """Why a rationale is dropped, in words; None if it is kept.

    Args:
        history_length: of its example; evidence must point into it.
    """
    if rationale.verdict not in accepted_verdicts:
        return f"verdict {rationale.verdict}"
    if outside := [index for index in rationale.evidence if not 0 <= index < history_length]:
        return f"evidence outside the history: {outside[0]}"
    words = len(rationale.text.split())
    if not min_words <= words <= max_words:
        return "too short" if words < min_words else "too long"
    return None


class TitleCheck:
    """Finds rationales that argue for another product: they name one that is neither the target nor in the history.

    A product counts as named where its whole title stands in the text, and only titles of three words or more are
    looked for: shorter ones are everyday phrases.
    """

    _SHORTEST = 3

    def __init__(self, catalog: ItemCatalog):
        self._titles: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for item in catalog:
            words = tuple(words_of(item.title))
            if len(words) >= self._SHORTEST:
                self._titles.setdefault(words[: self._SHORTEST], []).append(words)
        self._catalog = catalog

    def other_product(self, text: str, example: Example) -> str | None:
        """The words of another product's title in the text; None if there is none."""
        words = words_of(text)
        bought = [self._catalog[item_id].title for item_id in (example.target, *(e.item_id for e in example.history))]
        expected = [" ".join(words_of(title)) for title in bought]
        for start in range(len(words) - self._SHORTEST + 1):
            for title in self._titles.get(tuple(words[start : start + self._SHORTEST]), ()):
                named = " ".join(title)
                if tuple(words[start : start + len(title)]) == title and not any(named in own for own in expected):
                    return named
        return None


def curate(
    rows: Iterable[Example],
    annotate: Annotate,
    review: Review | None,
    rules: Rules,
    catalog: ItemCatalog,
    folder: Path,
    label: str,
) -> Report:
    """Write `accepted.jsonl` and `rejected.jsonl` to the folder, in the rows' order.

    Args:
        annotate: gives a row's rationale, or raises NotAnnotated.
        review: a second look at what passes everything else; gives a reason to drop it, or None.
        label: what the report calls these rationales.
    """
    titles, duplicates, tally = TitleCheck(catalog), NearDuplicates(), Tally(catalog, label)
    judged = folder / _JUDGED

    def judge(example: Example) -> Judged:
        try:
            rationale = annotate(example)
        except NotAnnotated as nothing:
            return Judged(example.user_id, example.target, str(nothing))
        reason = first_reason(example, rationale, rules, titles, review)
        return Judged(
            example.user_id,
            example.target,
            reason or "",
            rationale.text,
            rationale.verdict,
            rationale.evidence,
            rationale.confidence,
            rationale.annotator,
        )

    def first_pass() -> Iterator[Judged]:
        for example in rows:
            row = judge(example)
            if not row.reason:
                duplicates.add(row.text)
            if row.text:
                tally.count_evidence(row.evidence, len(example.history))
            yield row

    write_records(judged, first_pass())
    repeated = duplicates.find(rules.max_similarity) if rules.max_similarity is not None else {}

    def second_pass(accepted: bool) -> Iterator[Judged]:
        passed, users = 0, []
        for row in read_records(judged, Judged):
            if not row.reason:
                users.append(row.user_id)
                if passed in repeated:
                    row = replace(row, reason=f"near-duplicate: of user {users[repeated[passed]]}")
                passed += 1
            if (not row.reason) == accepted:
                yield row

    write_records(folder / ACCEPTED, (_rationale(tally.count(row)) for row in second_pass(accepted=True)))
    write_records(folder / REJECTED, (tally.count(row) for row in second_pass(accepted=False)))
    judged.unlink()
    return tally.report()


def first_reason(
    example: Example, rationale: Rationale, rules: Rules, titles: TitleCheck, review: Review | None
) -> str | None:
    """Why a row is dropped, the cheap checks first; None if nothing but its likeness to others can drop it."""
    length = len(example.history)
    if reason := rejection(rationale, length, rules.accepted_verdicts, rules.min_words, rules.max_words):
        return reason
    if other := titles.other_product(rationale.text, example):
        return f"argues for another product: {other}"
    return review(example, rationale) if review else None


def _rationale(row: Judged) -> Rationale:
    assert row.confidence is not None
    return Rationale(
        row.user_id,
        row.target,
        row.text,
        row.verdict,  # type: ignore[arg-type]
        row.evidence,
        row.confidence,
        row.annotator,
    )
