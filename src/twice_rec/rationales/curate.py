"""Self-annotated curation: the annotator's own verdict decides, then the limits of the recipe.

Examples are read once, in order; each gets a reason to be rejected or none. Near-duplicates are found last, among the
rationales that nothing else rejects, and the earlier of two stays. Memory holds a signature of fixed size per
rationale, never the texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from twice_rec.catalog import ItemCatalog
from twice_rec.files import read_records, write_records
from twice_rec.rationales.duplicates import NearDuplicates
from twice_rec.rationales.leaks import words_of
from twice_rec.rationales.recipe import CurationConfig
from twice_rec.rationales.report import Judged, Report, Tally
from twice_rec.records import Example, Rationale

ACCEPTED, REJECTED = "accepted.jsonl", "rejected.jsonl"
_JUDGED = ".judged.jsonl"
_SHORTEST_TITLE = 3  # words; shorter titles are everyday phrases, and are not looked for in texts


class NotAnnotated(Exception):
    """There is no rationale for an example; the message says why, its kind before the first colon."""


@dataclass(frozen=True, slots=True)
class Annotator:
    """Who writes the rationales of one run.

    Args:
        label: what reports call its rationales.
        annotate: gives the rationale of an example, or raises NotAnnotated.
        review: the self-check of what passes every other check; gives a reason to reject it, or None.
        figures: requests, tokens and cost, for the manifest.
    """

    label: str
    annotate: Callable[[Example], Rationale]
    review: Callable[[Example, Rationale], str | None] | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)


class Checks:
    """The checks of a rationale that need neither a model nor other rationales."""

    def __init__(self, config: CurationConfig, catalog: ItemCatalog):
        self._config, self._catalog = config, catalog
        self._titles: dict[tuple[str, ...], list[tuple[str, ...]]] = {}  # first words -> titles
        for item in catalog:
            words = tuple(words_of(item.title))
            if len(words) >= _SHORTEST_TITLE:
                self._titles.setdefault(words[:_SHORTEST_TITLE], []).append(words)

    def reason(self, example: Example, rationale: Rationale) -> str | None:
        """Return why a rationale is rejected, the cheap checks first; None if it passes all."""
        if rationale.verdict not in self._config.accepted_verdicts:
            return f"verdict {rationale.verdict}"
        if outside := [index for index in rationale.evidence if not 0 <= index < len(example.history)]:
            return f"evidence outside the history: {outside[0]}"
        words = len(rationale.text.split())
        if not self._config.min_words <= words <= self._config.max_words:
            return "too short" if words < self._config.min_words else "too long"
        other = self.other_product(rationale.text, example)
        return f"argues for another product: {other}" if other else None

    def other_product(self, text: str, example: Example) -> str | None:
        """Return the words of a title in the text whose product is neither the target nor in the history, or None."""
        words = words_of(text)
        known = (example.target, *(interaction.item_id for interaction in example.history))
        expected = [" ".join(words_of(self._catalog[item_id].title)) for item_id in known]
        for start in range(len(words) - _SHORTEST_TITLE + 1):
            for title in self._titles.get(tuple(words[start : start + _SHORTEST_TITLE]), ()):
                named = " ".join(title)
                if tuple(words[start : start + len(title)]) == title and not any(named in own for own in expected):
                    return named
        return None


def curate(
    examples: Iterable[Example], annotator: Annotator, config: CurationConfig, catalog: ItemCatalog, folder: Path
) -> Report:
    """Write `accepted.jsonl` and `rejected.jsonl` to the folder, in the order of the examples."""
    checks, duplicates, tally = Checks(config, catalog), NearDuplicates(), Tally(catalog, annotator.label)

    def judged() -> Iterator[Judged]:
        for example in examples:
            row = _judge(example, annotator, checks)
            if not row.reason:
                duplicates.add(row.text)
            if row.text:
                tally.count_evidence(row.evidence, len(example.history))
            yield row

    path = folder / _JUDGED
    write_records(path, judged())
    repeated = duplicates.find(config.max_similarity) if config.max_similarity is not None else {}
    accepted = (row for row in _without_duplicates(path, repeated) if not row.reason)
    rejected = (row for row in _without_duplicates(path, repeated) if row.reason)
    write_records(folder / ACCEPTED, (_rationale(tally.count(row)) for row in accepted))
    write_records(folder / REJECTED, (tally.count(row) for row in rejected))
    path.unlink()
    return tally.report()


def _judge(example: Example, annotator: Annotator, checks: Checks) -> Judged:
    try:
        rationale = annotator.annotate(example)
    except NotAnnotated as nothing:
        return Judged(example.user_id, example.target, str(nothing))
    reason = checks.reason(example, rationale)
    if reason is None and annotator.review is not None:
        reason = annotator.review(example, rationale)
    return Judged(reason=reason or "", **asdict(rationale))


def _without_duplicates(judged: Path, repeated: Mapping[int, int]) -> Iterator[Judged]:
    """Yield all rows; the near-duplicates among those that passed so far get their reason.

    Args:
        repeated: number of a rationale, counted among those that passed -> number of the earlier one it is like.
    """
    users: list[str] = []  # of the rows that passed
    for row in read_records(judged, Judged):
        if not row.reason:
            if len(users) in repeated:
                row = replace(row, reason=f"near-duplicate: of user {users[repeated[len(users)]]}")
            users.append(row.user_id)
        yield row


def _rationale(row: Judged) -> Rationale:
    values = asdict(row)
    del values["reason"]
    return Rationale(**values)
