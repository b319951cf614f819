"""The arms of a simulated A/B test: what each would show every user, with which probability that is clicked, and how
long one call of it takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from twice_rec.cf.baselines import BASELINES, CFScorer, PrecomputedScorer
from twice_rec.cf.ranking import fit_baseline
from twice_rec.cf.rewarders import rewarder_inputs
from twice_rec.cf.sasrec import SASRecScorer
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.errors import InputError
from twice_rec.evaluation.ab_test import CLICK_MODEL, analyse, expected_rate, over_users, simulate
from twice_rec.evaluation.predictions import PREDICTIONS
from twice_rec.evaluation.recipe import AbTestRecipe, EvaluateRecipe
from twice_rec.files import read_records
from twice_rec.item_sequences import Questions
from twice_rec.manifest import HUB, Manifest, environment, names_of
from twice_rec.progress import progress
from twice_rec.random_streams import random_stream
from twice_rec.records import Prediction

RANDOM = "random"  # the arm that draws a candidate at every visit
Ints = NDArray[np.int64]


def simulation_inputs(recipe: AbTestRecipe) -> list[Path]:
    """Return what the simulation reads.

    Raises:
        InputError: for a domain without click probabilities, and for an arm that is not evaluated.
    """
    data = recipe.run_path / "data"
    names = (dataset.CATALOG, dataset.SEQUENCES, dataset.PROMPT, dataset.candidates_file("test"))
    files = dataset.required_files(recipe.run_path, *names)
    oracle = data / dataset.score_file("oracle")
    if not oracle.exists():
        raise InputError(
            f"{oracle}: no such file; the simulation needs click probabilities, which only the synthetic domain has; "
            "for the log of a real test set impressions_file"
        )
    for arm in recipe.arms:
        if arm == RANDOM:
            continue
        path = recipe.run_path / "eval" / arm / PREDICTIONS
        if not path.exists():
            raise InputError(
                f"{path}: no such file; arm {arm} is not evaluated: run evaluate.sh with --variants {arm} (sasrec.sh "
                "for a CF model), or leave it out of arms"
            )
        files.append(path)
        if (scores := data / dataset.score_file(arm)).exists():
            files.append(scores)
        elif (model := recipe.run_path / arm / "model.safetensors").exists():
            files.append(model)
    return list(dict.fromkeys([*files, oracle]))


@dataclass(frozen=True)
class Arm:
    """What an arm shows each of U users, and how it is called for one of them."""

    shows: Ints | None  # [U], a column of the lists; None if it draws one at every visit
    call: Callable[[int], object]  # answers for the user in one row of the questions


def run_simulation(recipe: AbTestRecipe, data: PreparedData) -> dict[str, Any]:
    """Find out what the arms show, draw the visits, analyse them, and measure how long calls take."""
    kind = recipe.shown_list
    ranked = {arm: _ranked_first(recipe, arm) for arm in recipe.arms if arm != RANDOM}
    questions = data.questions("test", [kind])
    asked = [set(first) for first in ranked.values() if first]
    rows = np.array([i for i, user in enumerate(questions.user_ids) if all(user in first for first in asked)], np.int64)
    if not len(rows):
        raise InputError(f"no user was asked by every language model of arms, {', '.join(recipe.arms)}; evaluate them")
    questions = questions.take(rows)
    clicks = click_probabilities(recipe, data, questions)
    arms = {name: _arm(recipe, name, ranked.get(name, {}), data, questions) for name in recipe.arms}
    result = analyse(simulate({name: arm.shows for name, arm in arms.items()}, clicks, recipe), recipe)
    for row in result["comparisons"]:
        row["over_users"] = over_users(arms[row["a"]].shows, arms[row["b"]].shows, clicks, recipe.seed)
    for row in result["arms"]:
        arm = arms[row["arm"]]
        row["expected_ctr"] = expected_rate(arm.shows, clicks)
        row["latency_ms"] = _latency(recipe, row["arm"], arm, len(rows)) if recipe.latency_calls else None
    about = {"kind": "simulation", "click_model": CLICK_MODEL, "list": kind, "users": len(rows)}
    machine = {**environment()["machine"], "device": recipe.torch_device(), "threads": torch.get_num_threads()}
    title = f"Simulation, not a real test: {recipe.visits:,} visits of {len(rows):,} users, lists {kind}"
    title += ". Intervals cover the draw of visits, not that of users."
    return {"title": title, **about, "visits": recipe.visits, **result, "machine": machine}


def click_probabilities(recipe: AbTestRecipe, data: PreparedData, questions: Questions) -> NDArray[np.float64]:
    """Return the probability of a click on each candidate, if it is shown: float64 [U, C]; see `ab_test`."""
    path = recipe.run_path / "data" / dataset.score_file("oracle")
    oracle = PrecomputedScorer(path, len(data.training_histories()), len(data.catalog))
    columns = questions.candidates[recipe.shown_list].astype(np.int64) - 1  # [U, C]
    logs = np.asarray(oracle.scores(questions.users, questions.histories), dtype=np.float64)  # [U, N]
    logs = np.take_along_axis(logs, columns, axis=1)  # [U, C]
    picks = np.exp(logs - logs.max(axis=1, keepdims=True))
    return picks / picks.sum(axis=1, keepdims=True)


def _ranked_first(recipe: AbTestRecipe, arm: str) -> dict[str, str]:
    """Return the first choice for every user that a language model was asked about; empty for CF models."""
    kind, rows = recipe.shown_list, read_records(recipe.run_path / "eval" / arm / PREDICTIONS, Prediction)
    ranked = [row for row in rows if row.ranking]
    first = {row.user_id: row.ranking[0] for row in ranked if kind in row.ranks}
    if ranked and not first:
        raise InputError(f"arm {arm} ranked no list {kind}; evaluate it with --lists {kind}, or change shown_list")
    return first


def _arm(recipe: AbTestRecipe, name: str, first: dict[str, str], data: PreparedData, questions: Questions) -> Arm:
    """Return an arm; `first` has a language model's choices."""
    columns = questions.candidates[recipe.shown_list].astype(np.int64)  # [U, C], indices from 1
    if name == RANDOM:
        rng = random_stream(recipe.seed, "calls of the random arm")
        return Arm(None, lambda row: int(rng.integers(columns.shape[1])))
    if first:
        items = np.array([data.catalog.index(first[user]) for user in questions.user_ids])  # [U]
        call = _language_model(recipe, name, data, questions) if recipe.latency_calls else lambda row: None
        return Arm((columns == items[:, None]).argmax(axis=1), call)
    scorer, lists = _scorer(recipe, name, data), torch.from_numpy(columns - 1)

    def choose(rows: slice) -> Ints:
        """Return the first listed of the best candidates."""
        scores = torch.as_tensor(scorer.scores(questions.users[rows], questions.histories[rows])).cpu()  # [B, N]
        return scores.gather(1, lists[rows]).argmax(dim=1).numpy()  # [B]

    return Arm(choose(slice(None)), lambda row: choose(slice(row, row + 1)))


def _scorer(recipe: AbTestRecipe, arm: str, data: PreparedData) -> CFScorer:
    """Return a model that scores the catalogue; InputError if it is none that can be asked here."""
    scores_file = recipe.run_path / "data" / dataset.score_file(arm)
    model = recipe.run_path / arm / "model.safetensors"
    if arm in dataset.KNOWN_SCORES and scores_file.exists():
        return PrecomputedScorer(scores_file, len(data.training_histories()), len(data.catalog))
    if model.exists():
        return SASRecScorer.load(model, data.catalog, recipe.torch_device())
    if arm in BASELINES:
        return fit_baseline(arm, data, recipe.seed)
    raise InputError(
        f"arm {arm} cannot be asked here: its ranking is not stored, and {model} is no such file; arms are {RANDOM}, "
        f"language models, SASRec, {', '.join(BASELINES)}, {', '.join(dataset.KNOWN_SCORES)}"
    )


def _language_model(
    recipe: AbTestRecipe, arm: str, data: PreparedData, questions: Questions
) -> Callable[[int], object]:
    """Return how a language model answers for one user, as its evaluation asked it.

    Raises:
        InputError: if another version evaluated it, or its model is gone.
    """
    from twice_rec.evaluation.llm_ranking import ask, load_hints
    from twice_rec.llm import model_check, models
    from twice_rec.llm.generation import TransformersGenerator
    from twice_rec.llm.prompt_builder import PromptBuilder

    manifest = Manifest.load(recipe.run_path / "eval" / arm)
    assert manifest is not None  # its predictions are an input, which is checked
    try:
        asked = EvaluateRecipe.model_validate(
            {**manifest.about["recipe"], "run_dir": recipe.run_dir, "device": recipe.device}
        )
    except (KeyError, ValidationError):
        raise InputError(
            f"arm {arm} was evaluated by another version, whose settings cannot be read, so its calls cannot be timed; "
            "evaluate it again with --overwrite true, or set latency_calls to 0"
        ) from None
    of_hints = names_of(recipe.run_path, rewarder_inputs(asked, recipe.run_path)) if asked.cf_hints else {}
    (name,) = (name for name in manifest.inputs if not name.startswith("data/") and name not in of_hints)
    place: str | Path = recipe.run_path / name
    if name.startswith(HUB):
        place = name[len(HUB) :].partition("@")[0]
        asked = asked.model_copy(update={"model_revision": manifest.inputs[name]})
    elif name.startswith("source/"):
        place = asked.model_name_or_path or name
    tokenizer = model_check.checked_tokenizer(place, asked)
    generator = TransformersGenerator(
        models.load_model(place, asked, device=asked.torch_device()), tokenizer, asked.max_new_tokens
    )
    builder = PromptBuilder(data.catalog, data.prompt_format, tokenizer, asked, load_hints(asked, data))
    examples = {example.user_id: example for example in data.examples("test", recipe.shown_list)}

    def answer(row: int) -> object:
        example = examples[questions.user_ids[row]]
        return ask(generator, [example], recipe.shown_list, builder, asked, manifest.config["ranking"], recipe.seed)

    return answer


def _latency(recipe: AbTestRecipe, name: str, arm: Arm, users: int) -> dict[str, float]:
    """Return mean and 95 % quantile of the milliseconds that one call takes, for one user after another."""
    drawn = random_stream(recipe.seed, "users whose calls are timed").integers(users, size=recipe.latency_calls + 1)
    took = []
    for row in progress(drawn.tolist(), desc=f"calls of {name}", unit="call"):
        started = time.perf_counter()
        arm.call(row)
        took.append(1000 * (time.perf_counter() - started))
    took = took[1:]  # the first one warms up
    return {"mean": float(np.mean(took)), "p95": float(np.quantile(took, 0.95)), "calls": len(took)}
