"""The authors' released rationales as an annotator, so that they are curated, measured and trained on like any others.

The release has texts alone. They have passed the authors' own curation, so the verdict is `relevant` with confidence 1.
Evidence is read off the text: the interactions whose title it names.
"""

from __future__ import annotations

from collections.abc import Mapping

from twice_rec.catalog import ItemCatalog
from twice_rec.rationales.curate import NotAnnotated
from twice_rec.rationales.leaks import names_title, words_of
from twice_rec.records import Example, Rationale


class ReleasedRationales:
    """Finds the rationale that was written for an example.

    Args:
        texts: item ids of a history and its target, in order -> the rationale.
    """

    def __init__(self, texts: Mapping[tuple[str, ...], str], catalog: ItemCatalog):
        self._texts = texts
        self._catalog = catalog

    def __contains__(self, example: Example) -> bool:
        return _ids(example) in self._texts

    def annotate(self, example: Example) -> Rationale:
        """Return the released rationale; raises NotAnnotated if there is none for the example."""
        text = self._texts.get(_ids(example))
        if text is None:
            raise NotAnnotated("not released")
        words = words_of(text)
        named = (names_title(words, self._catalog[entry.item_id].title) for entry in example.history)
        evidence = tuple(position for position, is_named in enumerate(named) if is_named)
        return Rationale(example.user_id, example.target, text, "relevant", evidence, 1.0, annotator="release")


def _ids(example: Example) -> tuple[str, ...]:
    return (*(entry.item_id for entry in example.history), example.target)
