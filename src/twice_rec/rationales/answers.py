"""The answers of annotators and judges: JSON schemas for servers that enforce them, and one parser for all servers.

The parser takes a JSON object anywhere in a completion (in a code fence, after a preamble, written twice) and nothing
less: a missing key, an unknown verdict or evidence that does not exist make the answer malformed. It raises nothing but
`Malformed`, whose message is what the model is told when it is asked again; so other words there make other requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twice_rec import answer_format
from twice_rec.prompts import ANNOTATION_FIELDS, CHOICE_FIELDS, JUDGED_LEVELS, PICK, RUBRIC, SCORE_FIELDS
from twice_rec.records import VERDICTS, Verdict

_OPENING = re.compile(r"\s*(?:<(think|thinking|thought|reasoning)>|\[THINK\]|◁think▷)", re.IGNORECASE)
_CLOSING = re.compile(
    r"</(think|thinking|thought|reasoning)>|\[/THINK\]|◁/think▷|<\|channel\|>final<\|message\|>", re.IGNORECASE
)
_MAX_STARTS = 50  # braces tried as the start of an object; keeps the time linear on hostile text


def _schema(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


CHECK_SCHEMA = _schema({name: {"type": "boolean"} for name in RUBRIC})


def annotation_schema(num_shown: int) -> dict[str, Any]:
    """Return the schema of an annotation, if the prompt shows `num_shown` interactions.

    Numbers are lists of values, since servers differ over ranges.
    """
    values = (
        {"type": "string"},
        {"type": "string", "enum": list(VERDICTS)},
        {"type": "array", "items": {"type": "integer", "enum": list(range(1, num_shown + 1))}},
        {"type": "number", "enum": [tenth / 10 for tenth in range(11)]},
    )
    return _schema(dict(zip(ANNOTATION_FIELDS, values, strict=True)))


SCORE_SCHEMA = _schema({"why": {"type": "string"}, "score": {"type": "integer", "enum": list(JUDGED_LEVELS)}})


def choice_schema(num_candidates: int) -> dict[str, Any]:
    """Return the schema of a judge's choice among so many candidates."""
    numbers = {"type": "integer", "enum": list(range(1, num_candidates + 1))}
    return _schema({"why": {"type": "string"}, "candidate": numbers})


def pick_schema(num_candidates: int) -> dict[str, Any]:
    """Return the schema of a pick among so many candidates."""
    return _schema({PICK: {"type": "integer", "enum": list(range(1, num_candidates + 1))}})


class Malformed(Exception):
    """The completion holds no answer that can be used; the message names the fault."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """A parsed answer; `evidence` counts the interactions shown from 1, each once, ascending."""

    rationale: str
    verdict: Verdict
    evidence: tuple[int, ...]
    confidence: float


def parse_annotation(text: str, num_shown: int) -> Annotation:
    """Read an annotation whose evidence lies in 1..num_shown; raises Malformed if it is not complete."""
    found = _single_object(text, ANNOTATION_FIELDS)
    rationale, verdict, evidence, confidence = (found[name] for name in ANNOTATION_FIELDS)
    word = verdict.strip().lower() if isinstance(verdict, str) else None
    _require(word in VERDICTS, f"verdict must be one of {', '.join(VERDICTS)}", verdict)
    _require(isinstance(rationale, str), "rationale must be text", rationale)
    rationale = _plain(rationale)
    if not rationale:
        raise Malformed("rationale is empty")
    is_share = not isinstance(confidence, bool) and isinstance(confidence, (int, float)) and 0 <= confidence <= 1
    _require(is_share, "confidence must be a number from 0 to 1", confidence)
    _require(isinstance(evidence, list), "evidence must be a list of purchase numbers", evidence)
    for entry in evidence:
        if type(entry) is not int or not 1 <= entry <= num_shown:
            raise Malformed(f"evidence holds {_short(entry)}, but the purchases are numbered 1 to {num_shown}")
    if word == "relevant" and not evidence:
        raise Malformed("a relevant verdict needs the number of at least one purchase in evidence")
    return Annotation(rationale, word, tuple(sorted(set(evidence))), float(confidence))  # type: ignore[arg-type]


def parse_check(text: str) -> tuple[str, ...]:
    """Return the points of the rubric that do not hold, in the rubric's order; raises Malformed like the other."""
    found = _single_object(text, RUBRIC)
    for name in RUBRIC:
        _require(isinstance(found[name], bool), f"{name} must be true or false", found[name])
    return tuple(name for name in RUBRIC if not found[name])


def parse_score(text: str) -> tuple[int, str]:
    """Return a judge's score and why it gave it; raises Malformed like the others."""
    return _numbered(text, SCORE_FIELDS, "score", JUDGED_LEVELS)


def parse_choice(text: str, num_candidates: int) -> tuple[int, str]:
    """Return the number of the candidate that a judge chose, from 1, and why; raises Malformed like the others."""
    return _numbered(text, CHOICE_FIELDS, "candidate", range(1, num_candidates + 1))


def _numbered(text: str, fields: Iterable[str], name: str, allowed: Sequence[int]) -> tuple[int, str]:
    """Return the number under a key, one of those allowed, and the text of `why`."""
    found = _single_object(text, fields)
    number, why = found[name], found["why"]
    if isinstance(number, str) and number.strip().isdecimal():
        number = int(number)
    expected = f"{name} must be a whole number from {allowed[0]} to {allowed[-1]}"
    _require(type(number) is int and number in allowed, expected, found[name])
    _require(isinstance(why, str), "why must be text", why)
    return number, _plain(why)


def parse_pick(text: str, num_candidates: int) -> int:
    """Return the position of the picked candidate, from 0; raises Malformed like the others."""
    pick = _single_object(text, [PICK])[PICK]
    is_one = type(pick) is int and 1 <= pick <= num_candidates
    _require(is_one, f"{PICK} must be the number of a candidate, 1 to {num_candidates}", pick)
    return pick - 1


def _require(holds: bool, what: str, found: Any) -> None:
    if not holds:
        raise Malformed(f"{what}, not {_short(found)}")


def _single_object(text: str, keys: Iterable[str]) -> dict[str, Any]:
    """Return the object with these keys; the same one written several times counts as one."""
    objects = list(_objects(after_thinking(text)))
    complete = [found for found in objects if all(key in found for key in keys)]
    if not objects:
        raise Malformed("there is no complete JSON object in it")
    if not complete:
        partial = next(filter(None, objects), {})
        missing = next(key for key in keys if key not in partial)
        raise Malformed(f"the JSON object has no key {missing}")
    if any(other != complete[0] for other in complete[1:]):
        raise Malformed("it holds several JSON objects that differ")
    return complete[0]


def after_thinking(text: str) -> str:
    """Return what a model wrote after it had thought; nothing if the thinking did not end. Drafts are no answers.

    The tags stand outside of JSON. The opening one may be missing, since some chat templates write it.
    """
    while True:
        inside = range(0) if _OPENING.match(text) else _first_object(text)  # tags in a draft count, in an answer not
        opening, closing = (
            next((tag for tag in tags.finditer(text) if tag.start() not in inside), None)
            for tags in (_OPENING, _CLOSING)
        )
        if closing is None:
            return text[: opening.start()] if opening else text
        text = text[closing.end() :]


def _first_object(text: str) -> range:
    """Return where the first JSON object of a text is; an empty range if its first brace begins none."""
    start = text.find("{")
    try:
        return range(start, json.JSONDecoder().raw_decode(text, start)[1]) if start >= 0 else range(0)
    except (ValueError, RecursionError):
        return range(0)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the outermost JSON objects in a text."""
    decoder, position = json.JSONDecoder(), 0
    for _ in range(_MAX_STARTS):
        position = text.find("{", position)
        if position < 0:
            return
        try:
            found, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):  # not JSON, a number with too many digits, nested too deep
            position += 1
        else:
            yield found


def _plain(text: str) -> str:
    """Remove line breaks, answer tags and halves of surrogate pairs, so that the text can be stored and rendered."""
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return " ".join(answer_format.without_tags(" ".join(whole.split())).split())


def _short(value: Any) -> str:
    """Write a wrong value as the model is shown it."""
    try:
        written = json.dumps(value)
    except (ValueError, RecursionError):
        written = type(value).__name__
    return written if len(written) <= 60 else written[:57] + "..."
