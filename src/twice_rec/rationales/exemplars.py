"""The worked annotations that a prompt shows, read from a file the recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twice_rec.errors import InputError
from twice_rec.files import read_json
from twice_rec.prompts import Exemplar
from twice_rec.rationales.answers import VERDICTS
from twice_rec.rationales.leaks import leaks_of
from twice_rec.records import Interaction, Item

_PRODUCT_KEYS = {"title", "brand", "category", "price", "description", "details"}
_PURCHASE_KEYS = _PRODUCT_KEYS | {"rating", "review_title", "review_text"}
_KEYS = ("history", "next", "rationale", "forward_rationale", "verdict", "evidence", "confidence")
_NUMBERS = {"rating", "confidence"}


def load_exemplars(path: Path) -> tuple[Exemplar, ...]:
    """Read and check a file of exemplars; see recipes/exemplars/grocery.json for the form.

    Raises:
        InputError: naming file, exemplar and key, for whatever would teach the annotator something wrong: a verdict
            that is none, evidence that does not exist, a forward-looking text that names its product.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: expected a list of exemplars, found {type(rows).__name__}")
    return tuple(_exemplar(row, f"{path}, exemplar {number}") for number, row in enumerate(rows, start=1))


def _exemplar(row: Any, where: str) -> Exemplar:
    _expect_keys(row, set(_KEYS), set(_KEYS), where)
    if not isinstance(row["history"], list) or not row["history"]:
        raise InputError(f"{where}, history: expected a list of past purchases, oldest first")
    for number, purchase in enumerate(row["history"], start=1):
        _expect_keys(purchase, {"title"}, _PURCHASE_KEYS, f"{where}, history {number}")
    _expect_keys(row["next"], {"title"}, _PRODUCT_KEYS, f"{where}, next")
    for name in ("rationale", "forward_rationale"):
        if not isinstance(row[name], str) or not row[name].strip():
            raise InputError(f"{where}, {name}: expected text, found {row[name]!r}")
    if row["verdict"] not in VERDICTS:
        raise InputError(f"{where}, verdict: expected one of {', '.join(VERDICTS)}, found {row['verdict']!r}")
    evidence, length = row["evidence"], len(row["history"])
    if not isinstance(evidence, list) or any(type(n) is not int or not 1 <= n <= length for n in evidence):
        raise InputError(f"{where}, evidence: expected numbers of past purchases, 1 to {length}, found {evidence!r}")
    if not isinstance(row["confidence"], (int, float)) or not 0 <= row["confidence"] <= 1:
        raise InputError(f"{where}, confidence: expected a number from 0 to 1, found {row['confidence']!r}")
    target = _item(row["next"])
    if leaked := leaks_of(row["forward_rationale"], target):
        raise InputError(
            f"{where}, forward_rationale: it must argue to the product without naming it, but it has the product's "
            f"{', '.join(leaked)}"
        )
    return Exemplar(
        tuple((_interaction(purchase), _item(purchase)) for purchase in row["history"]),
        target,
        row["rationale"],
        row["forward_rationale"],
        row["verdict"],
        tuple(evidence),
        float(row["confidence"]),
    )


def _expect_keys(row: Any, required: set[str], known: set[str], where: str) -> None:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, found {type(row).__name__}")
    if missing := sorted(required - row.keys()):
        raise InputError(f"{where}: no key {missing[0]}; expected {', '.join(sorted(known))}")
    if unknown := sorted(row.keys() - known):
        raise InputError(f"{where}: unknown key {unknown[0]}; expected {', '.join(sorted(known))}")
    for name in sorted(row.keys() & _PURCHASE_KEYS):
        expected: Sequence[type] = (int, float) if name in _NUMBERS else (str,)
        if type(row[name]) not in expected:
            raise InputError(f"{where}, {name}: expected {'a number' if name in _NUMBERS else 'text'}")


def _item(row: dict[str, Any]) -> Item:
    category = (row["category"],) if row.get("category") else ()
    texts = {name: row.get(name, "") for name in ("description", "details", "brand", "price")}
    return Item(item_id="", title=row["title"], categories=category, **texts)


def _interaction(row: dict[str, Any]) -> Interaction:
    rating = row.get("rating")
    return Interaction(
        "",
        rating=None if rating is None else float(rating),
        review_title=row.get("review_title", ""),
        review_text=row.get("review_text", ""),
    )
