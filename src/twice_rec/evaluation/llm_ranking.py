"""Evaluation of language models: rankings from likelihoods or from sampled completions.

All rankings are deterministic. Ties count against the target in its rank. By votes, candidates tie if they have as many
votes of the same mean log-probability, as those without a vote have; `vote_ties: listed` gives these the listed order.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from twice_rec.answer_format import closing, opening, parse, without_tags
from twice_rec.catalog import ItemCatalog, Outcome
from twice_rec.cf.held_out import HeldOut
from twice_rec.cf.hints import CFHints, make_hints
from twice_rec.cf.rewarders import load_rewarder
from twice_rec.data.dataset import PreparedData
from twice_rec.errors import InputError
from twice_rec.evaluation.position import order_metrics
from twice_rec.evaluation.predictions import METRICS_FILE, PREDICTIONS, metrics_of
from twice_rec.evaluation.recipe import EvaluateRecipe
from twice_rec.files import read_records, to_row, write_json
from twice_rec.llm.hub import at_commit
from twice_rec.llm.prompt_builder import PromptBuilder
from twice_rec.manifest import HubModel, Manifest, stage_folder
from twice_rec.metrics import ranks_from_scores
from twice_rec.progress import progress
from twice_rec.prompts import Message, item_answer, rationale_answer
from twice_rec.random_streams import random_stream, stream_seed
from twice_rec.records import Example, Prediction
from twice_rec.run import StageRun

if TYPE_CHECKING:  # it takes seconds to import
    from twice_rec.llm.generation import TextCompletion, TransformersGenerator

logger = logging.getLogger(__name__)


def question_batches(recipe: EvaluateRecipe, data: PreparedData) -> Iterator[tuple[str, list[Example]]]:
    """Yield the drawn users' questions in batches, list after list; users in the files' order."""
    for kind in recipe.lists:
        examples = list(data.examples("test", kind))
        if recipe.num_users is not None and recipe.num_users > len(examples):
            there = len(examples)
            logger.warning("num_users is %d, but %s lists have %d: all are asked", recipe.num_users, kind, there)
        shuffled = random_stream(recipe.seed, "evaluated users").permutation(len(examples))
        drawn = np.sort(shuffled[: recipe.num_users])
        for start in range(0, len(drawn), recipe.batch_size):
            yield kind, [examples[position] for position in drawn[start : start + recipe.batch_size]]


def evaluate_language_model(
    folders: Mapping[str, Path],
    generator: TransformersGenerator,
    batches: Sequence[tuple[str, Sequence[Example]]],
    builder: PromptBuilder,
    recipe: EvaluateRecipe,
) -> dict[str, tuple[list[Path], dict[str, float]]]:
    """Ask all questions, and write and return predictions and metrics, with the rates of the completions' outcomes.

    A killed run goes on after its last whole batch, and takes up whole predictions that no manifest names yet.
    `batches` are (name of the candidate list, questions), asked in this order. `folders` has the unfinished folder of
    each ranking, `likelihood` or `sampled`, see `ask`; a batch is asked for all of them before the next, so that its
    prompts are read once.
    """
    partial = {ranking: folder / "predictions.partial.jsonl" for ranking, folder in folders.items()}
    for ranking, folder in folders.items():
        if (folder / PREDICTIONS).exists():
            (folder / PREDICTIONS).replace(partial[ranking])
    sizes = [len(examples) for _, examples in batches]
    done = {ranking: whole_batches(path, sizes) for ranking, path in partial.items()}
    for ranking, count in done.items():
        if count:
            logger.info("%s: going on after batch %d of %d", folders[ranking], count, len(batches))
    first, name = min(done.values()), " ".join(folder.name for folder in folders.values())
    for number in progress(range(first, len(batches)), desc=name, unit="batch", total=len(batches), initial=first):
        kind, examples = batches[number]
        sampling_seed = stream_seed(recipe.seed, "completions of evaluation", number)
        for ranking, path in partial.items():
            if number >= done[ranking]:
                append(path, ask(generator, examples, kind, builder, recipe, ranking, sampling_seed))
    asked = [(kind, example.user_id, example.target) for kind, examples in batches for example in examples]
    return {ranking: _finished(folders[ranking], path, asked, builder) for ranking, path in partial.items()}


def _finished(
    folder: Path, partial: Path, asked: Sequence[tuple[str, str, str]], builder: PromptBuilder
) -> tuple[list[Path], dict[str, float]]:
    """Make predictions and metrics of the answers to all questions, (name of the list, user, target) each."""
    rows = list(read_records(partial, Prediction))
    if [(*row.ranks, row.user_id, row.target) for row in rows] != asked:
        raise InputError(
            f"{partial} has {len(rows):,} rows that are not the answers to the {len(asked):,} questions; something "
            "else wrote to it; remove it and run the same command again"
        )
    metrics = {**metrics_of(rows), **answer_rates(rows, builder.catalog), **order_metrics(rows)}
    write_json(folder / METRICS_FILE, metrics)
    partial.replace(folder / PREDICTIONS)
    return [folder / PREDICTIONS, folder / METRICS_FILE], metrics


def ask(
    generator: TransformersGenerator,
    examples: Sequence[Example],
    kind: str,
    builder: PromptBuilder,
    recipe: EvaluateRecipe,
    ranking: str,
    sampling_seed: int,
) -> list[Prediction]:
    """Ask a language model one batch of questions, and rank each candidate list, whose name is `kind`.

    `likelihood`: the model writes its rationale greedily, then every candidate is scored as the answer that follows it.
    If the item comes first or alone, the candidates are scored at once.
    `sampled`: several completions are sampled; see `rank_by_votes`.
    With several `permutations` all questions are asked with each order of the candidates.
    """
    rounds = []  # of each order, the questions and what was written
    for number in range(recipe.permutations):
        asked = [reordered(example, number, recipe.seed) for example in examples]
        prompts = [builder.recommend(example, recipe.with_rationale) for example in asked]
        seed = stream_seed(sampling_seed, "order", number) if number else sampling_seed
        completions: list[list[TextCompletion]] = [[] for _ in prompts]
        if ranking == "sampled":
            completions = generator.generate(prompts, recipe.num_samples, recipe.temperature, recipe.top_p, seed)
        elif recipe.with_rationale and not builder.item_first:
            completions = generator.generate(prompts)
        else:
            generator.forget()  # else rounding would depend on what was asked before
        rounds.append([Asked(*one) for one in zip(asked, prompts, completions, strict=True)])
    predictions = []
    for example, orders in zip(examples, zip(*rounds, strict=True), strict=True):
        if ranking == "sampled":
            ranked, rank, choices = _by_votes(orders, example, builder.catalog, recipe.vote_ties)
        else:
            ranked, rank, choices = _by_likelihood(orders, example, builder.catalog, generator)
        places = tuple(
            one.example.candidates.index(choice) if choice else -1 for one, choice in zip(orders, choices, strict=True)
        )
        said = tuple(completion.text for one in orders for completion in one.written)
        user, target, first = example.user_id, example.target, {kind: ranked[0]}
        predictions.append(
            Prediction(user, target, {kind: rank}, recipe.seed, tuple(ranked), said, first, choices, places)
        )
    return predictions


class Asked(NamedTuple):
    """A question in one order of its candidates, and the completions."""

    example: Example
    prompt: list[Message]
    written: Sequence[TextCompletion]


def reordered(example: Example, number: int, seed: int) -> Example:
    """Return a question with another order of the candidates, drawn per user; number 0 is the stored one."""
    if number == 0:
        return example
    order = random_stream(seed, "order of candidates", example.user_id, number).permutation(len(example.candidates))
    return replace(example, candidates=tuple(example.candidates[place] for place in order))


def _by_votes(
    orders: Sequence[Asked], example: Example, catalog: ItemCatalog, vote_ties: str
) -> tuple[list[str], int, tuple[str, ...]]:
    """Return the candidates by the votes of all orders, the target's rank, and each order's first choice."""
    ranked, tied = rank_by_votes([completion for one in orders for completion in one.written], example, catalog)
    choices = []
    for one in orders:
        votes = [completion for completion in one.written if _vote(completion, example, catalog)]
        choices.append(rank_by_votes(votes, one.example, catalog)[0][0] if votes else "")
    return ranked, 1 + ranked.index(example.target) if vote_ties == "listed" else tied, tuple(choices)


def _by_likelihood(
    orders: Sequence[Asked], example: Example, catalog: ItemCatalog, generator: TransformersGenerator
) -> tuple[list[str], int, tuple[str, ...]]:
    """Return the candidates by their mean probability in all orders, the target's rank, and each order's choice."""
    items, scores = (
        [catalog[item_id] for item_id in example.candidates],
        np.zeros((len(orders), len(example.candidates))),
    )
    for row, one in enumerate(orders):
        said = rationale_of(one.written[0].text) if one.written else None
        texts = [item_answer(item) if said is None else rationale_answer(said, item) for item in items]
        scores[row] = generator.score(one.prompt, texts)  # [K, C]
    if np.isnan(scores).any():
        raise InputError("the model's log-probabilities are NaN: its weights are damaged; fetch it again")
    choices = tuple(example.candidates[place] for place in scores.argmax(axis=1))
    if len(orders) > 1:
        scores = np.logaddexp.reduce(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))[None]  # [1, C]
    ranked = [example.candidates[place] for place in np.argsort(-scores[0], kind="stable")]
    return ranked, int(ranks_from_scores(scores, [example.candidates.index(example.target)])[0]), choices


def rank_by_votes(
    completions: Sequence[TextCompletion], example: Example, catalog: ItemCatalog
) -> tuple[list[str], int]:
    """Return all candidates by votes, then by mean log-probability of the completions that voted, then as listed.

    The number beside them is the target's rank behind all candidates that have its votes and mean log-probability.

    A completion that is malformed or names no candidate votes for nothing.
    """
    votes: dict[str, list[float]] = {item_id: [] for item_id in example.candidates}
    for completion in completions:
        if item_id := _vote(completion, example, catalog):
            votes[item_id].append(completion.mean_logprob)
    mean = {item_id: sum(values) / len(values) if values else 0.0 for item_id, values in votes.items()}
    order = {item_id: (-len(votes[item_id]), -mean[item_id]) for item_id in example.candidates}
    tied = sum(place <= order[example.target] for place in order.values())
    return sorted(example.candidates, key=order.__getitem__), tied  # sorting is stable


def _vote(completion: TextCompletion, example: Example, catalog: ItemCatalog) -> str | None:
    """Return the candidate that a completion names, None if it is malformed or names no candidate."""
    answer = parse(completion.text)
    is_vote = catalog.outcome(answer, example.candidates, example.target) in (Outcome.HIT, Outcome.MISS)
    return answer.item_id if is_vote else None


def rationale_of(text: str) -> str:
    """Return the rationale in a completion; if its element is incomplete, what was written of it, without tags."""
    rationale = parse(text).rationale
    if rationale is None:
        rationale = text.partition(closing("think"))[0].partition(opening("item_nm"))[0]
    return without_tags(rationale)


def answer_rates(predictions: Sequence[Prediction], catalog: ItemCatalog) -> dict[str, float]:
    """Return the share of completions with each outcome (hit, miss, outside, malformed), as `answers/<outcome>`."""
    outcomes = [catalog.outcome(parse(text), p.ranking, p.target) for p in predictions for text in p.answers]
    return {f"answers/{o.value}": outcomes.count(o) / len(outcomes) for o in Outcome} if outcomes else {}


def append(path: Path, predictions: Iterable[Prediction]) -> None:
    """Append a batch to a file; it is on disk when this returns."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(to_row(prediction), ensure_ascii=False) + "\n" for prediction in predictions))
        file.flush()
        os.fsync(file.fileno())


def whole_batches(path: Path, sizes: Sequence[int]) -> int:
    """Return how many whole batches an interrupted run has appended, and cut off what follows them in the file."""
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    rows = sum(line.endswith(b"\n") for line in lines)
    done = int(np.searchsorted(np.cumsum(sizes), rows, side="right"))
    os.truncate(path, sum(map(len, lines[: sum(sizes[:done])])))
    return done


def evaluate_llm_variant(
    recipe: EvaluateRecipe, data: PreparedData, variant: str, model: Path | HubModel, inputs: list[Path]
) -> None:
    """Write eval/<name>/ of a language model, a folder or one of the hub, for every ranking that is not there yet."""
    with contextlib.ExitStack() as stack:
        runs = dict[str, StageRun]()
        for ranking in recipe.rankings:
            folder, settings = f"eval/{recipe.result_name(variant, ranking)}", recipe.ranking_settings(ranking)
            run = stack.enter_context(StageRun(recipe, "evaluate", folder, [*inputs, model], settings))
            if not run.is_finished():
                runs[ranking] = run
        if not runs:
            return
        from twice_rec.llm import model_check, models  # loads torch
        from twice_rec.llm.generation import TransformersGenerator

        recipe = at_commit(recipe, model)
        place = model.name if isinstance(model, HubModel) else model
        if differences := other_prompts(recipe, place):
            logger.warning("%s: its prompts are not those of its training: %s", variant, "; ".join(differences))
        tokenizer = model_check.checked_tokenizer(place, recipe)
        for run in runs.values():
            run.begin()
        llm = models.load_model(place, recipe, device=recipe.torch_device())
        generator = TransformersGenerator(llm, tokenizer, recipe.max_new_tokens)
        builder = PromptBuilder(data.catalog, data.prompt_format, tokenizer, recipe, load_hints(recipe, data))
        folders = {ranking: run.path for ranking, run in runs.items()}
        results = evaluate_language_model(folders, generator, list(question_batches(recipe, data)), builder, recipe)
        for ranking, run in runs.items():
            run.finish(*results[ranking], results=len(runs))


def other_prompts(recipe: EvaluateRecipe, model: Path | str) -> list[str]:
    """Return which settings of the prompts differ from those that a stage has trained the model with, in words."""
    folder = stage_folder(Path(model))
    trained = Manifest.load(folder) if folder is not None else None
    if trained is None or "item_first" not in trained.config:  # not trained by us
        return []
    names = ["max_prompt_tokens", "cf_hints"]
    names += ["item_first"] if recipe.with_rationale else []
    names += ["cf_model"] if recipe.cf_hints and trained.config.get("cf_hints") else []
    were = recipe.defaults(names) | trained.config
    return [f"{name} was {were[name]}, is {now}" for name in names if were[name] != (now := getattr(recipe, name))]


def load_hints(recipe: EvaluateRecipe, data: PreparedData) -> CFHints | None:
    """Return what the prompts say of the CF model's ranking, None if the recipe asks for nothing."""
    if not recipe.cf_hints:
        return None
    model = load_rewarder(recipe, recipe.run_path, data, HeldOut(0.0, recipe.seed))
    return make_hints(recipe, model, data.catalog)
