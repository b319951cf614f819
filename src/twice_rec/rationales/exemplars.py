"""The worked annotations that a prompt shows, read from a file that the recipe names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twice_rec.errors import InputError
from twice_rec.files import read_json
from twice_rec.prompts import Exemplar
from twice_rec.rationales.leaks import leaks_of
from twice_rec.records import VERDICTS, Interaction, Item

_ITEM_KEYS = {"title", "brand", "category", "price", "description", "details"}
_INTERACTION_KEYS = _ITEM_KEYS | {"rating", "review_title", "review_text"}
_KEYS = {"history", "next", "rationale", "forward_rationale", "verdict", "evidence", "confidence"}


def load_exemplars(path: Path) -> tuple[Exemplar, ...]:
    """Read and check a file of exemplars; recipes/exemplars/grocery.json shows the format.

    Raises:
        InputError: if something in it would teach the annotator something wrong: an unknown verdict, evidence that does
            not exist, a forward-looking text that names its product. The message names file, exemplar and key.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: expected a list of exemplars, found {type(rows).__name__}")
    return tuple(_exemplar(row, f"{path}, exemplar {number}") for number, row in enumerate(rows, start=1))


def _exemplar(row: Any, where: str) -> Exemplar:
    _expect_keys(row, _KEYS, _KEYS, where)
    history, evidence, confidence = row["history"], row["evidence"], row["confidence"]
    _expect(
        isinstance(history, list) and history, f"{where}, history", "a list of past purchases, oldest first", history
    )
    for number, interaction in enumerate(history, start=1):
        _expect_keys(interaction, {"title"}, _INTERACTION_KEYS, f"{where}, history {number}")
    _expect_keys(row["next"], {"title"}, _ITEM_KEYS, f"{where}, next")
    for name in ("rationale", "forward_rationale"):
        _expect(isinstance(row[name], str) and row[name].strip(), f"{where}, {name}", "text", row[name])
    _expect(row["verdict"] in VERDICTS, f"{where}, verdict", f"one of {', '.join(VERDICTS)}", row["verdict"])
    exists = isinstance(evidence, list) and all(type(n) is int and 1 <= n <= len(history) for n in evidence)
    _expect(exists, f"{where}, evidence", f"numbers of past purchases, 1 to {len(history)}", evidence)
    is_share = isinstance(confidence, (int, float)) and 0 <= confidence <= 1
    _expect(is_share, f"{where}, confidence", "a number from 0 to 1", confidence)
    target = _item(row["next"])
    if leaked := leaks_of(row["forward_rationale"], target):
        raise InputError(
            f"{where}, forward_rationale: it must argue to the product without naming it, but it has the product's "
            f"{', '.join(leaked)}"
        )
    past = tuple((_interaction(interaction), _item(interaction)) for interaction in history)
    texts = {name: row[name] for name in ("rationale", "forward_rationale", "verdict")}
    return Exemplar(history=past, target=target, evidence=tuple(evidence), confidence=float(confidence), **texts)


def _expect(holds: object, where: str, what: str, found: object) -> None:
    if not holds:
        raise InputError(f"{where}: expected {what}, found {found!r}")


def _expect_keys(row: Any, required: set[str], known: set[str], where: str) -> None:
    """Check the keys of an object, and the types of those that describe an interaction."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, found {type(row).__name__}")
    for problem, names in (("no key", required - row.keys()), ("unknown key", row.keys() - known)):
        if names:
            raise InputError(f"{where}: {problem} {min(names)}; expected {', '.join(sorted(known))}")
    for name in sorted(row.keys() & _INTERACTION_KEYS):
        types, what = ((int, float), "a number") if name == "rating" else ((str,), "text")
        _expect(type(row[name]) in types, f"{where}, {name}", what, row[name])


def _item(row: dict[str, Any]) -> Item:
    category = (row["category"],) if row.get("category") else ()
    return Item("", categories=category, **{name: row.get(name, "") for name in _ITEM_KEYS - {"category"}})


def _interaction(row: dict[str, Any]) -> Interaction:
    rating = float(row["rating"]) if "rating" in row else None
    return Interaction("", 0, rating, row.get("review_title", ""), row.get("review_text", ""))
