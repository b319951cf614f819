"""Which results may stand in one table, be averaged and be compared: fresh ones, of equal data, users, lists, ranking
and prompt form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twice_rec.errors import InputError
from twice_rec.evaluation.predictions import PREDICTIONS
from twice_rec.evaluation.recipe import TERMS, EvaluateRecipe
from twice_rec.files import MANIFEST, read_json
from twice_rec.locks import owner_of, run_folder
from twice_rec.manifest import BEGUN, HUB, Hashes, Manifest, check_fresh, stage_folder

_LATER = ("permutations", "cf_hints")  # evaluations of earlier versions have none of these; ours alone


@dataclass(frozen=True)
class Terms:
    """What one evaluation rests on, and how the model was asked."""

    folder: Path
    asked: Mapping[str, Any]  # of `TERMS`; empty for models that score the catalogue
    rests_on: Mapping[str, str]  # name -> hash

    @classmethod
    def of(cls, folder: Path) -> Terms:
        """Return the terms of a finished evaluation; InputError if it is not finished."""
        if (manifest := Manifest.load(folder)) is None:
            raise InputError(f"{folder} is unfinished; run evaluate.sh or sasrec.sh again")
        asked = EvaluateRecipe.defaults(_LATER) | {n: manifest.config[n] for n in TERMS if n in manifest.config}
        return cls(folder, asked if "ranking" in asked else {}, manifest.everything(folder))

    def data(self) -> dict[str, str]:
        """Return the files of stage 0 among what it rests on."""
        return {name: value for name, value in self.rests_on.items() if name.startswith("data/")}


def fresh_evaluations(run_dir: Path) -> tuple[list[Path], list[str]]:
    """Return the folders of a run's evaluations that are finished, whole and fresh, and a line about each other one.

    Raises:
        InputError: if there is no such run, or if nothing was evaluated yet.
    """
    if not run_dir.is_dir():
        raise InputError(f"{run_dir}: no such folder of a run")
    fresh, lines, hashes = list[Path](), list[str](), Hashes()
    for folder in sorted((run_dir / "eval").glob("*")):
        if not (folder / MANIFEST).exists() and not (folder / BEGUN).exists():
            continue
        if owner := owner_of(folder):
            lines.append(f"{folder} left out: it is being made by {owner}")
            continue
        try:
            check_fresh(folder / PREDICTIONS, hashes)
            fresh.append(folder)
        except InputError as error:
            lines.append(f"{folder.name} left out: {error}")
    if not fresh and not lines:
        raise InputError(f"{run_dir / 'eval'}: nothing was evaluated yet; run sasrec.sh or evaluate.sh first")
    return fresh, lines


def difference(one: Terms, other: Terms, but_for: Collection[str] = ()) -> str | None:
    """Return in words how two evaluations differ in data, lists, ranking or prompt form; None if they are equals.

    Of the same run, they must not rest on different results of another stage either. `but_for` names those of `TERMS`
    in which they may differ, because the difference itself is what is compared.
    """
    same_run = run_folder(one.folder).resolve() == run_folder(other.folder).resolve()
    for name in one.rests_on.keys() & other.rests_on.keys():
        within = same_run and not name.startswith(("/", HUB, "source/"))
        if one.rests_on[name] != other.rests_on[name] and (within or name.startswith("data/")):
            return f"different {name} (hashes {one.rests_on[name][:12]} and {other.rests_on[name][:12]})"
    for name in TERMS if one.asked and other.asked else ():
        if (was := one.asked.get(name)) != (now := other.asked.get(name)) and name not in but_for:
            return f"different {name} ({was} and {now})"
    return None


def difference_of_users(one: Terms, users: Iterable[str], other: Terms, others: Iterable[str]) -> str | None:
    """Return how the users of two evaluations differ; None if they are equals.

    A language model may be asked about some of the users that a model which scores the catalogue ranks for.
    """
    left, right = set(users), set(others)
    equal = left == right if bool(one.asked) == bool(other.asked) else (left < right if one.asked else right < left)
    if equal or left == right:
        return None
    return f"different users ({len(left):,} and {len(right):,}, of which both have {len(left & right):,})"


def reference_users(evaluations: Mapping[str, tuple[Terms, Iterable[str]]]) -> set[str]:
    """Return the users of the table that all variants share.

    They are those about whom most of the language models were asked, more users first among equals; so an evaluation
    of a few users leaves the table as it is. Without language models: those whom all models rank for.
    """
    asked = [frozenset(users) for terms, users in evaluations.values() if terms.asked]
    if not asked:
        sets = [set(users) for _, users in evaluations.values()]
        return set.intersection(*sets) if sets else set()
    times = Counter(asked)
    return set(max(times, key=lambda users: (times[users], len(users))))


def labels(terms: Mapping[str, Terms]) -> dict[str, str]:
    """Return variant -> how it was asked: where the language models among them differ, or differ from the paper."""
    asked = {name: of.asked for name, of in terms.items() if of.asked}
    differing = [
        name
        for name in TERMS
        if len({str(of[name]) for of in asked.values() if name in of}) > 1  # what only one ranking has does not differ
        or (name == "cf_hints" and any(of.get(name) for of in asked.values()))
    ]
    if not differing:
        return {}
    says = lambda name, value: str(value) if name == "ranking" else f"{name} {value}"
    return {v: ", ".join(says(name, of[name]) for name in differing if name in of) for v, of in asked.items()}


def why_not_usable(path: Path, hashes: Hashes) -> str | None:
    """Return why a result cannot be used: it is missing, being made, unfinished, changed or stale; None if it can."""
    if not path.exists():
        return f"{path} is not there"
    if (folder := stage_folder(path)) and (owner := owner_of(folder)):
        return f"{folder} is being made by {owner}"
    try:
        check_fresh(path, hashes)
    except InputError as error:
        return str(error)
    return None


def usable_json(path: Path, hashes: Hashes) -> tuple[dict[str, Any] | None, str]:
    """Return the JSON object of a result that can be used, else None, and why it is not used."""
    if why := why_not_usable(path, hashes):
        return None, why
    try:
        found = read_json(path)
    except InputError as error:
        return None, str(error)
    return (found, "") if isinstance(found, dict) else (None, f"{path} holds no JSON object")
