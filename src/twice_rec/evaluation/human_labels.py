"""The file in which humans judge rationales: written without scores, filled in, and read.

One JSON line per user, variant and condition. A human puts a name into `judge` and 0 to 3 into `score`; lines without a
score count for nothing. Several humans fill in copies, whose lines are put together in one file. Lines are in random
order; `condition` says which of them are the control, so hide it from those who are to judge without knowing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from twice_rec.catalog import ItemCatalog
from twice_rec.errors import InputError
from twice_rec.evaluation.judge import SCORED, Question
from twice_rec.files import read_records, write_jsonl
from twice_rec.prompts import LEVELS, PromptFormat, describe_interaction, describe_item
from twice_rec.random_streams import random_stream
from twice_rec.rationales.generate import shown_history

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Label:
    """One line: what is judged, and by whom with which score; the last three fields are for the human to read."""

    user_id: str
    variant: str
    condition: str
    judge: str
    score: int | None
    history: tuple[str, ...] = ()
    item: str = ""
    rationale: str = ""


Labels = dict[tuple[str, str], int]  # (user, condition) -> score


def export(
    path: Path, questions: Mapping[str, Sequence[Question]], catalog: ItemCatalog, shown: PromptFormat, seed: int
) -> int:
    """Write the file that humans fill in; return the number of its lines. What is settled without a judge is left out.

    Args:
        questions: variant -> all its questions; those that ask for a score are written.

    Raises:
        InputError: if the file exists: it may hold scores.
    """
    if path.exists():
        raise InputError(f"{path} exists, and may hold scores; remove it, or name another file in export_for_labels")
    rows = [
        (variant, question)
        for variant, asked in questions.items()
        for question in asked
        if question.condition in SCORED and not question.is_settled
    ]
    order = random_stream(seed, "order of labels").permutation(len(rows)).tolist()

    def lines() -> Iterator[dict[str, object]]:
        for variant, question in (rows[place] for place in order):
            assert question.item is not None
            past, _ = shown_history(question.example, catalog, shown)
            yield {
                "user_id": question.example.user_id, "variant": variant, "condition": question.condition,
                "judge": "", "score": None,
                "history": [describe_interaction(interaction, item, shown) for interaction, item in past],
                "item": describe_item(question.item, shown.prompt_candidate_fields, shown),
                "rationale": question.rationale,
            }  # fmt: skip

    return write_jsonl(path, lines())


def read(
    path: Path, questions: Mapping[str, Sequence[Question]], judges: Sequence[str]
) -> dict[str, dict[str, Labels]]:
    """Return variant -> human -> (user, condition) -> score, of the lines that have a score.

    Lines about other variants are passed over, and counted in the log.

    Args:
        questions: variant -> all its questions.
        judges: names that no human can have.

    Raises:
        InputError: for a line about a user who is not judged, about another rationale, without a name, with another
            score or condition, or that is there twice; names file and line.
    """
    known = {
        variant: {(q.example.user_id, q.condition): q.rationale for q in asked} for variant, asked in questions.items()
    }
    found: dict[str, dict[str, Labels]] = {variant: {} for variant in known}
    lines: dict[tuple[str, str, str, str], int] = {}
    others = 0
    for number, label in enumerate(read_records(path, Label), start=1):
        where = f"{path}, line {number}"
        if label.variant not in known or label.score is None:
            others += label.variant not in known
            continue
        if label.condition not in SCORED:
            raise InputError(f"{where}: condition is {label.condition!r}; humans score {' and '.join(SCORED)}")
        if label.score not in LEVELS:
            raise InputError(f"{where}: score is {label.score}; it must be {min(LEVELS)} to {max(LEVELS)}, or null")
        if not label.judge.strip() or label.judge in judges:
            fault = f"is {label.judge!r}, as a judge of the recipe is called" if label.judge.strip() else "is empty"
            raise InputError(f"{where}: judge {fault}; put the name of whoever gave the score there")
        if (label.user_id, label.condition) not in known[label.variant]:
            raise InputError(
                f"{where}: user {label.user_id} is not judged under {label.condition} of {label.variant}; are "
                "num_judged, conditions and seed those with which the file was written?"
            )
        if label.rationale not in ("", known[label.variant][label.user_id, label.condition]):
            raise InputError(
                f"{where}: the score is of another rationale than {label.variant} has now for user {label.user_id}; it "
                "was evaluated anew since the file was written: write the file again, and have it filled in"
            )
        line = (label.variant, label.judge, label.user_id, label.condition)
        if line in lines:
            raise InputError(
                f"{where}: {label.judge} judges user {label.user_id}, {label.condition} of {label.variant}, in line "
                f"{lines[line]} already; leave one of them out"
            )
        lines[line] = number
        found[label.variant].setdefault(label.judge, {})[label.user_id, label.condition] = label.score
    if others:
        logger.info("%s: %s lines are about variants that are not judged now", path, f"{others:,}")
    if not lines:
        logger.warning("%s: no line has a score", path)
    return found
