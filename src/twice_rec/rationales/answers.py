"""What annotators answer: JSON schemas for servers that enforce them, and a parser for all servers.

The parser takes a JSON object anywhere in the text (in a code fence, after a preamble, written twice) and nothing
less: a missing key, a verdict that is none, evidence that does not exist make the answer malformed. It never raises
anything but `Malformed`, whose message is what the model is told when it is asked again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from twice_rec import answer_format
from twice_rec.prompts import ANNOTATION_FIELDS, RUBRIC

VERDICTS = ("relevant", "weak", "irrelevant")

CHECK_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {name: {"type": "boolean"} for name in RUBRIC},
    "required": list(RUBRIC),
    "additionalProperties": False,
}


def annotation_schema(num_shown: int) -> dict[str, Any]:
    """The schema of an annotation about `num_shown` purchases; lists of values, since servers differ over ranges."""
    return {
        "type": "object",
        "properties": {
            "rationale": {"type": "string"},
            "verdict": {"type": "string", "enum": list(VERDICTS)},
            "evidence": {"type": "array", "items": {"type": "integer", "enum": list(range(1, num_shown + 1))}},
            "confidence": {"type": "number", "enum": [tenth / 10 for tenth in range(11)]},
        },
        "required": list(ANNOTATION_FIELDS),
        "additionalProperties": False,
    }


_MAX_STARTS = 50  # braces tried as the start of an object; keeps the time linear on hostile text


class Malformed(Exception):
    """The answer cannot be used; the message names the fault."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """A parsed answer; `evidence` counts the purchases shown from 1, each once, ascending."""

    rationale: str
    verdict: str
    evidence: tuple[int, ...]
    confidence: float


def parse_annotation(text: str, num_shown: int) -> Annotation:
    """Read an annotation.

    Args:
        num_shown: how many purchases the prompt showed; evidence lies in 1..num_shown.

    Raises:
        Malformed: for anything else than a complete answer.
    """
    found = _single_object(text, tuple(ANNOTATION_FIELDS))
    verdict = found["verdict"].strip().lower() if isinstance(found["verdict"], str) else None
    if verdict not in VERDICTS:
        raise Malformed(f"verdict must be one of {', '.join(VERDICTS)}, not {_short(found['verdict'])}")
    if not isinstance(found["rationale"], str):
        raise Malformed(f"rationale must be text, not {_short(found['rationale'])}")
    rationale = _plain(found["rationale"])
    if not rationale:
        raise Malformed("rationale is empty")
    confidence = found["confidence"]
    if isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not 0 <= confidence <= 1:
        raise Malformed(f"confidence must be a number from 0 to 1, not {_short(confidence)}")
    evidence = _evidence(found["evidence"], num_shown)
    if verdict == "relevant" and not evidence:
        raise Malformed("a relevant verdict needs the number of at least one purchase in evidence")
    return Annotation(rationale, verdict, evidence, float(confidence))


def parse_check(text: str) -> tuple[str, ...]:
    """The points of the rubric that do not hold, in the rubric's order; Malformed for an incomplete answer."""
    found = _single_object(text, tuple(RUBRIC))
    for name in RUBRIC:
        if not isinstance(found[name], bool):
            raise Malformed(f"{name} must be true or false, not {_short(found[name])}")
    return tuple(name for name in RUBRIC if not found[name])


def _evidence(value: Any, num_shown: int) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise Malformed(f"evidence must be a list of purchase numbers, not {_short(value)}")
    for entry in value:
        whole = isinstance(entry, int) and not isinstance(entry, bool)
        if not whole or not 1 <= entry <= num_shown:
            raise Malformed(f"evidence holds {_short(entry)}, but the purchases are numbered 1 to {num_shown}")
    return tuple(sorted(set(value)))


def _single_object(text: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """The object with these keys; the same one written several times counts as one."""
    complete, partial = [], None
    for found in _objects(text):
        if all(key in found for key in keys):
            complete.append(found)
        else:
            partial = partial or found
    if not complete and partial is not None:
        missing = next(key for key in keys if key not in partial)
        raise Malformed(f"the JSON object has no key {missing}")
    if not complete:
        raise Malformed("there is no complete JSON object in it")
    if any(other != complete[0] for other in complete[1:]):
        raise Malformed("it holds several JSON objects that differ")
    return complete[0]


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The outermost JSON objects in a text."""
    decoder = json.JSONDecoder()
    position = 0
    for _ in range(_MAX_STARTS):
        position = text.find("{", position)
        if position < 0:
            return
        try:
            found, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):  # not JSON, a number with too many digits, nested too deep
            position += 1
            continue
        yield found


def _plain(text: str) -> str:
    """Without line breaks, answer tags and halves of surrogate pairs, so that it can be stored and rendered."""
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return " ".join(answer_format.without_tags(" ".join(whole.split())).split())


def _short(value: Any) -> str:
    """How a wrong value is shown to the model."""
    try:
        written = json.dumps(value)
    except (ValueError, RecursionError):
        written = type(value).__name__
    return written if len(written) <= 60 else written[:57] + "..."
