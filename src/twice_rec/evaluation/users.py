"""The report's browser of users: what each saw, what each variant wrote and chose, and what that would have earned.

Only the chosen users' lines of the large files are parsed, so that the time is bounded by reading them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from twice_rec.answer_format import parse
from twice_rec.catalog import ItemCatalog
from twice_rec.cf.confidence import ConfidenceModel
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.errors import InputError
from twice_rec.evaluation.equals import reference_users
from twice_rec.evaluation.llm_ranking import rationale_of
from twice_rec.evaluation.names import variant_name
from twice_rec.evaluation.predictions import PREDICTIONS
from twice_rec.evaluation.report import Variant
from twice_rec.files import read_jsonl, read_records, records_of_users
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.grpo.rewards import REWARDS
from twice_rec.grpo.scoring import score_completions
from twice_rec.prompts import rating_word
from twice_rec.random_streams import random_stream
from twice_rec.records import CandidateLists, Prediction, UserSequence

MOST_USERS = 200
MOST_BYTES = 1_400_000  # of the page's data, whatever texts are in it
_LONGEST = 1500  # characters of a text

Judgements = Mapping[tuple[str, str], Sequence[tuple[str, str]]]  # (variant, user) -> (judge, verdict)


@dataclass
class Asked:
    """What the language models of a report were asked and answered, as far as its page shows it."""

    kind: str  # of the candidate lists
    users: list[str]  # of the browser, in the files' order
    lists: dict[str, CandidateLists]  # of all users that some language model was asked about
    answers: dict[tuple[str, str], Prediction] = field(default_factory=dict)  # (variant, user), of the browser
    places: dict[str, list[int]] = field(default_factory=dict)  # variant -> choices at each place of the list


def read_asked(variants: Mapping[str, Variant], kind: str, folder: Path, seed: int) -> Asked | None:
    """Read the language models' answers; None if there are none for this kind of list.

    `folder` is the run's `data/`. Of several trainings the first one's answers are read; InputError if they are about
    other lists.
    """
    asked = {
        name: variant for name, variant in variants.items()
        if variant.terms[0].asked and any(key.startswith(f"{kind}/") for key in variant.values)
    }  # fmt: skip
    if not asked:
        return None
    shared = reference_users({name: (variant.terms[0], variant.users) for name, variant in asked.items()})
    in_order = [user for user in next(v for v in asked.values() if v.users.keys() >= shared).users if user in shared]
    drawn = random_stream(seed, "users of the report's browser").permutation(len(in_order))[:MOST_USERS]
    everyone = set().union(*(variant.users for variant in asked.values()))
    path = folder / dataset.candidates_file("test")
    lists = {entry.user_id: entry for entry in records_of_users(path, CandidateLists, everyone)}
    found = Asked(kind, [in_order[position] for position in np.sort(drawn)], lists)
    wanted = set(found.users)
    for name, variant in asked.items():
        places: Counter[int] = Counter()
        for row in read_records(variant.terms[0].folder / PREDICTIONS, Prediction):
            shown = lists[row.user_id].lists.get(kind) if row.user_id in lists else None
            if kind not in row.ranks or not row.ranking or shown is None:
                continue
            if set(shown) != set(row.ranking):
                raise InputError(
                    f"{variant.terms[0].folder}: user {row.user_id} was asked about another list than {folder} has; "
                    "evaluate it again"
                )
            places[shown.index(row.ranking[0])] += 1
            if row.user_id in wanted:
                found.answers.setdefault((name, row.user_id), row)
        if places:
            length = len(next(iter(lists.values())).lists[kind])
            found.places[name] = [places[place] for place in range(length)]
    return found


def browser_of(
    asked: Asked, data: PreparedData, model: ConfidenceModel | None, rewards: GRPORecipe | None, judged: Judgements
) -> dict[str, Any]:
    """Return the data of the browser, as JSON takes them.

    Args:
        asked: see `read_asked`.
        data: the run's catalogue and sequences.
        model: gives the confidences; None to leave them out.
        rewards: the recipe of stage 3, whose rewards are added up; None to leave them out.
        judged: verdicts of judges.
    """
    found = records_of_users(data.folder / dataset.SEQUENCES, UserSequence, set(asked.users))
    sequences = {sequence.user_id: sequence for sequence in found}
    variants = list(dict.fromkeys(name for name, _ in asked.answers))
    earned = _earned(asked, sequences, data.catalog, model, rewards) if model and rewards else {}
    items: dict[str, list[str]] = {}
    users, size = [], 0
    for user in asked.users:
        shown = asked.lists[user].lists[asked.kind]
        row = {
            "id": user,
            "history": [
                [entry.item_id, rating_word(entry.rating), _cut(entry.review_title)]
                for entry in sequences[user].history("test")
            ],
            "target": asked.lists[user].target,
            "candidates": list(shown),
            "confidence": _confidence(sequences[user], shown, data.catalog, model, rewards),
            "answers": {
                name: _answer(asked.answers[name, user], earned.get((name, user)), judged.get((name, user), ()))
                for name in variants
                if (name, user) in asked.answers
            },
        }
        new = {
            item_id: [data.catalog[item_id].title[:_LONGEST], data.catalog[item_id].brand]
            for item_id in {*shown, *(entry[0] for entry in row["history"])}
            if item_id not in items
        }
        size += len(json.dumps(row)) + len(json.dumps(new))
        if size > MOST_BYTES:
            break
        users.append(row)
        items |= new
    return {
        "items": items,
        "variants": [[name, variant_name(name)] for name in variants],
        "rewards": list(zip(rewards.reward_funcs, rewards.reward_weights, strict=True)) if earned and rewards else [],
        "users": users,
    }


def _confidence(
    sequence: UserSequence,
    shown: Sequence[str],
    catalog: ItemCatalog,
    model: ConfidenceModel | None,
    rewards: GRPORecipe | None,
) -> list[float]:
    """Return the confidence in each candidate, as stage 3 has it, else as the paper has it; empty without a model."""
    if model is None:
        return []
    history = catalog.indices(entry.item_id for entry in sequence.history("test"))
    kind, debiased = (rewards.confidence, rewards.confidence_debiased) if rewards else ("sigmoid", False)
    found = model.confidences([history], np.array([catalog.indices(shown)]), kind, debiased)[0]
    return [round(float(value), 3) for value in found]


def _answer(
    row: Prediction, earned: tuple[list[float], float] | None, judged: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Return what one variant did: its choice and the target's rank, and of one completion rationale and rewards."""
    text = shown_completion(row)
    answer: dict[str, Any] = {"choice": row.ranking[0], "rank": next(iter(row.ranks.values()))}
    if text is not None:
        answer |= {"rationale": _cut(rationale_of(text)), "named": parse(text).item_id, "of": len(row.answers)}
    if earned:
        answer |= {"earned": earned[0], "total": earned[1]}
    if judged:
        answer["judged"] = [list(entry) for entry in judged]
    return answer


def shown_completion(row: Prediction) -> str | None:
    """Return the completion that is shown: the first that names what is ranked first, or else the first."""
    naming = (text for text in row.answers if parse(text).item_id == row.ranking[0])
    return next(naming, row.answers[0] if row.answers else None)


def _earned(
    asked: Asked,
    sequences: Mapping[str, UserSequence],
    catalog: ItemCatalog,
    model: ConfidenceModel,
    rewards: GRPORecipe,
) -> dict[tuple[str, str], tuple[list[float], float]]:
    """Return (variant, user) -> each reward of the shown completion, unweighted, and their weighted sum.

    A reward that asks the policy is not known here, and is then left out of all.
    """
    texts = {pair: text for pair, row in asked.answers.items() if (text := shown_completion(row)) is not None}
    if not texts or any(REWARDS[name].needs_policy for name in rewards.reward_funcs):
        return {}
    columns = {
        "history": [[entry.item_id for entry in sequences[user].history("test")] for _, user in texts],
        "candidates": [asked.lists[user].lists[asked.kind] for _, user in texts],
        "target": [asked.lists[user].target for _, user in texts],
    }
    scored = score_completions(list(texts.values()), columns, catalog, model, rewards)
    found = {}
    for pair, one in zip(texts, scored, strict=True):
        values = [REWARDS[name].function(one, rewards) for name in rewards.reward_funcs]
        total = sum(weight * value for weight, value in zip(rewards.reward_weights, values, strict=True))
        found[pair] = ([round(value, 3) for value in values], round(total, 3))
    return found


def read_judgements(run_dir: Path, names: Sequence[str], usable: Callable[[Path], bool]) -> Judgements:
    """Return the verdicts of all judges on some variants' rationales: the score with the item shown, or why none."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name in names:
        path = run_dir / "judge" / name / "verdicts.jsonl"
        for _, row in read_jsonl(path) if usable(path) else ():
            if row.get("condition") == "item_shown":
                score, why = row.get("score"), row.get("why") or row.get("no_verdict") or ""
                said = "no verdict" if score is None else f"score {score}"
                found.setdefault((name, str(row.get("user_id"))), []).append(
                    (str(row.get("judge")), _cut(f"{said}. {why}" if why else said))
                )
    return found


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST].rstrip()} ..."
