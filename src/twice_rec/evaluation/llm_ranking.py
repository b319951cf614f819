"""Evaluation of language models: rankings from likelihoods or from sampled completions.

All rankings are deterministic. Ties count against the target in its rank. By votes, candidates tie if they have as many
votes of the same mean log-probability, as those without a vote have; `vote_ties: listed` gives these the listed order.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from twice_rec.answer_format import closing, opening, parse, without_tags
from twice_rec.catalog import ItemCatalog, Outcome
from twice_rec.data.dataset import PreparedData
from twice_rec.errors import InputError
from twice_rec.evaluation.predictions import METRICS_FILE, PREDICTIONS, metrics_of
from twice_rec.evaluation.recipe import EvaluateRecipe
from twice_rec.files import read_records, to_row, write_json
from twice_rec.llm.hub import at_commit
from twice_rec.llm.prompt_builder import PromptBuilder
from twice_rec.manifest import HubModel
from twice_rec.metrics import ranks_from_scores
from twice_rec.progress import progress
from twice_rec.prompts import item_answer, rationale_answer
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
        shuffled = random_stream(recipe.seed, "evaluated users").permutation(len(examples))
        drawn = np.sort(shuffled[: recipe.num_users])
        for start in range(0, len(drawn), recipe.batch_size):
            yield kind, [examples[position] for position in drawn[start : start + recipe.batch_size]]


def evaluate_language_model(
    folder: Path,
    generator: TransformersGenerator,
    batches: Sequence[tuple[str, Sequence[Example]]],
    builder: PromptBuilder,
    recipe: EvaluateRecipe,
    ranking: str,
) -> tuple[list[Path], dict[str, float]]:
    """Ask all questions, and write and return predictions and metrics, with the rates of the completions' outcomes.

    A killed run goes on after its last whole batch. `batches` are (name of the candidate list, questions), asked in
    this order; `ranking` is `likelihood` or `sampled`, see `ask`.
    """
    partial = folder / "predictions.partial.jsonl"
    done = whole_batches(partial, [len(examples) for _, examples in batches])
    if done:
        logger.info("%s: going on after batch %d of %d", folder, done, len(batches))
    for number in progress(range(done, len(batches)), desc=folder.name, unit="batch", total=len(batches), initial=done):
        kind, examples = batches[number]
        sampling_seed = stream_seed(recipe.seed, "completions of evaluation", number)
        append(partial, ask(generator, examples, kind, builder, recipe, ranking, sampling_seed))
    rows = list(read_records(partial, Prediction))
    asked = [(kind, example.user_id, example.target) for kind, examples in batches for example in examples]
    if [(*row.ranks, row.user_id, row.target) for row in rows] != asked:
        raise InputError(
            f"{partial} has {len(rows):,} rows that are not the answers to the {len(asked):,} questions; something "
            "else wrote to it; run the same command with --overwrite true"
        )
    metrics = {**metrics_of(rows), **answer_rates(rows, builder.catalog)}
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
    """
    prompts = [builder.recommend(example, recipe.with_rationale) for example in examples]
    completions: list[list[TextCompletion]] = [[] for _ in prompts]
    if ranking == "sampled":
        completions = generator.generate(prompts, recipe.num_samples, recipe.temperature, recipe.top_p, sampling_seed)
    elif recipe.with_rationale and not builder.item_first:
        completions = generator.generate(prompts)
    predictions = []
    for example, prompt, written in zip(examples, prompts, completions, strict=True):
        if ranking == "sampled":
            ranked, tied = rank_by_votes(written, example, builder.catalog)
            rank = 1 + ranked.index(example.target) if recipe.vote_ties == "listed" else tied
        else:
            items = [builder.catalog[item_id] for item_id in example.candidates]
            texts = [rationale_answer(rationale_of(written[0].text), i) if written else item_answer(i) for i in items]
            scores = np.array([generator.score(prompt, texts)])  # [1, C]
            if np.isnan(scores).any():
                raise InputError("the model's log-probabilities are NaN: its weights are damaged; fetch it again")
            ranked = [example.candidates[position] for position in np.argsort(-scores[0], kind="stable")]
            rank = int(ranks_from_scores(scores, [example.candidates.index(example.target)])[0])
        said = tuple(completion.text for completion in written)
        predictions.append(Prediction(example.user_id, example.target, {kind: rank}, recipe.seed, tuple(ranked), said))
    return predictions


def rank_by_votes(
    completions: Sequence[TextCompletion], example: Example, catalog: ItemCatalog
) -> tuple[list[str], int]:
    """Return all candidates by votes, then by mean log-probability of the completions that voted, then as listed.

    The number beside them is the target's rank behind all candidates that have its votes and mean log-probability.

    A completion that is malformed or names no candidate votes for nothing.
    """
    votes: dict[str, list[float]] = {item_id: [] for item_id in example.candidates}
    for completion in completions:
        answer = parse(completion.text)
        if catalog.outcome(answer, example.candidates, example.target) in (Outcome.HIT, Outcome.MISS):
            votes[answer.item_id or ""].append(completion.mean_logprob)
    mean = {item_id: sum(values) / len(values) if values else 0.0 for item_id, values in votes.items()}
    order = {item_id: (-len(votes[item_id]), -mean[item_id]) for item_id in example.candidates}
    tied = sum(place <= order[example.target] for place in order.values())
    return sorted(example.candidates, key=order.__getitem__), tied  # sorting is stable


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
    recipe: EvaluateRecipe, data: PreparedData, name: str, model: Path | HubModel, ranking: str, inputs: list[Path]
) -> None:
    """Write eval/<name>/ of a language model, a folder or one of the hub, unless it is there already."""
    reads = ["num_users", "lists", "with_rationale", "max_prompt_tokens", "max_new_tokens", "batch_size", "dtype"]
    reads += ["item_first", "seed"]
    reads += ["num_samples", "temperature", "top_p", "vote_ties"] if ranking == "sampled" else []
    settings = {"ranking": ranking, **{key: getattr(recipe, key) for key in reads}}
    with StageRun(recipe, "evaluate", f"eval/{name}", [*inputs, model], settings) as run:
        if run.is_finished():
            return
        from twice_rec.llm import model_check, models  # loads torch
        from twice_rec.llm.generation import TransformersGenerator

        recipe = at_commit(recipe, model)
        place = model.name if isinstance(model, HubModel) else model
        tokenizer = model_check.checked_tokenizer(place, recipe)
        run.begin()
        llm = models.load_model(place, recipe, device=recipe.torch_device())
        generator = TransformersGenerator(llm, tokenizer, recipe.max_new_tokens)
        builder = PromptBuilder(data.catalog, data.prompt_format, tokenizer, recipe)
        batches = list(question_batches(recipe, data))
        run.finish(*evaluate_language_model(run.path, generator, batches, builder, recipe, ranking))
