"""Self-annotated curation: the annotator's own verdict decides, then the limits of the recipe."""

from __future__ import annotations

from collections.abc import Sequence

from twice_rec.records import Rationale


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
        return f"evidence {outside[0]} outside the history"
    words = len(rationale.text.split())
    if not min_words <= words <= max_words:
        return "too short" if words < min_words else "too long"
    return None
